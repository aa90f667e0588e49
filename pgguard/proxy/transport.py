"""What a connection is carried by: TLS, without a socket. Bytes in, bytes out, and no clock.

An end of a session (:class:`pgguard.proxy.ends.End`) that has no :class:`Tls` is plain: what its socket receives is
what its peer has said. One that has is read and written by way of it, in the same round of the relay:

====================  =======================================  =================================================
what the relay does   plain                                    TLS
====================  =======================================  =================================================
receive               ``recv``                                 ``recv``, then :meth:`Tls.open` what has come
send                  ``send``                                 :meth:`Tls.seal` it, then ``send`` that
say what it must      nothing                                  send :meth:`Tls.words`, after each :meth:`Tls.open`
wait for              the socket                               the socket
end its stream        ``shutdown``                             send :meth:`Tls.farewell`, then ``shutdown``
====================  =======================================  =================================================

*Nothing waits in between.* All that can be decrypted of what has been received is returned at once. What is left is the
beginning of one record, and no more; epoll, which knows nothing of it, needn't. As nothing that is to be sent is kept
either, new keys (KeyUpdate of TLS 1.3), for which reads write, are nothing more than :meth:`Tls.words`. In a
renegotiation of TLS 1.2 writes read as well, and what is to be sent would have to wait: contexts decline it.

*Most often it is one record*, whole, behind which nothing had been left. That is opened by a call or two of OpenSSL's,
and nothing is put together for it. So is what fits into one record sealed. These calls go past :class:`ssl.SSLObject`,
whose methods are Python, and do nothing else. Nor is it asked whether OpenSSL has something to say where it can't have.

*Senders belong to what was encrypted.* The kernel says who sent which bytes of the stream that it carries. So a piece
of that by one sender is opened at a time, and a record is whose bytes have completed it. Of one that several have sent
:attr:`Tls.mixed` says so.

*Handshakes* (:class:`Handshake`) are the same for clients and for servers.

Records: RFC 8446, chapter 5, and RFC 5246, chapter 6: five bytes of header, type, version and length.
"""

from __future__ import annotations

import ssl
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple, final

if TYPE_CHECKING:
    from collections.abc import Callable

    from mypy_extensions import i64

    from pgguard.identity import Sender

_HEADER: Final = 5
_FIRST_TYPE: Final = 20
_LAST_TYPE: Final = 24
_DATA: Final = 23
_MAJOR: Final = 3
"""What a record's header begins with: its type, and the major version of all versions of TLS. Type 23 is data, and in
TLS 1.3 whatever is encrypted."""
_MOST: Final = 16384 + 2048
"""Bytes of a record at most behind its header: TLSCiphertext.length in RFC 5246."""
_PLAIN: Final = 16384
"""Bytes that a record carries at most."""
_AT_ONCE: Final = _HEADER + _MOST
"""Bytes that OpenSSL is given at once: it keeps a buffer as large as the most that it has been given."""
_OVERHEAD: Final = (("TLS_", 17), ("GCM", 24), ("CHACHA20", 16))
_MOST_OVERHEAD: Final = 80
"""How many bytes more a record has than it says, by what is in its cipher's name, the first that is: in TLS 1.3 a type
and a tag, before that a tag, with GCM and 8 bytes of a nonce. Other ciphers have an explicit IV of 16 bytes, a MAC of
48 and padding of 16."""
_MARKS: Final = 16
"""How often something was sent of which it is known which bytes it has become."""
_ALERTS: Final = ("SSLV3_ALERT_", "TLSV1_ALERT_", "TLSV13_ALERT_", "SSL/TLS_ALERT_")
"""How the names of those errors begin that the other side has found, and says so: ``sslerr.h``."""


class Failure(NamedTuple):
    """Why nothing more that the other side sends can be decrypted."""

    reason: str
    """In OpenSSL's words, as in ``SSL error: decryption failed or bad record mac``."""
    is_told: bool
    """It is the other side that has failed, and says so in an alert: this record."""
    size: int
    """Bytes of the record."""
    sender: Sender | None
    """Who has completed it, if that is known."""
    begun_by: Sender | None
    """Who else has sent the beginning of it, if somebody has."""


class HandshakeFailed(Exception):
    """There will be no TLS on a connection; the message says why.

    Args:
        error: what has gone wrong.
        words: what the other side is to be sent still: an alert.
    """

    def __init__(self, error: Exception, words: bytes) -> None:
        super().__init__(_reason(error))
        self.error = error
        """As the ssl module raised it: an :class:`ssl.SSLCertVerificationError` says which check has failed."""
        self.words = words


@final
class _Mark:
    """Where something is that was said: in all that was sent, and in all that was said."""

    __slots__ = ("began", "ended", "said_from", "said_to")

    def __init__(self) -> None:
        self.began: i64 = 0
        self.ended: i64 = 0
        self.said_from: i64 = 0
        self.said_to: i64 = 0


@final
class Tls:
    """One side of a TLS connection, from when the handshake is over: made by :class:`Handshake`.

    Args:
        incoming: what the other side has sent, for OpenSSL.
        outgoing: what it is to be sent, from OpenSSL.
        ssl_object: between the two.
        before: how many bytes the other side has been sent in front of the handshake.
        is_client: the other side is, of which it is asked how much it has read.
    """

    __slots__ = (
        "_begun_by",
        "_decipher",
        "_encipher",
        "_fetch",
        "_give",
        "_has_ended",
        "_incoming",
        "_is_even",
        "_is_quiet",
        "_marked",
        "_marks",
        "_outgoing",
        "_plain_sent",
        "_rest",
        "_sent",
        "closed_by",
        "failure",
        "is_closed",
        "mixed",
        "ssl_object",
        "unopened",
    )

    def __init__(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        ssl_object: ssl.SSLObject,
        before: int,
        *,
        is_client: bool,
    ) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self.ssl_object = ssl_object
        """What is known of the connection: its version, cipher, certificates, protocol. Not to be read or written."""
        calls = _calls_of(ssl_object)
        self._give: Callable[[bytes], int] = incoming.write
        self._decipher: Callable[[int], bytes] = calls.read
        self._encipher: Callable[[bytes | memoryview], int] = calls.write
        self._fetch: Callable[[], bytes] = outgoing.read
        """Looked up once, as each record takes two of them."""
        self._is_quiet = False
        """OpenSSL has said nothing on its own account since that was fetched last."""
        self._rest = b""
        """The beginning of a record that isn't whole yet."""
        self._is_even = False
        """Everything that has come has been opened, and more can come: what comes next begins a record."""
        self._begun_by: Sender | None = None
        """Who has sent the first of it, if that is known."""
        self.mixed: Sender | None = None
        """Who has sent the beginning of a record that somebody else has completed, as :meth:`open` was called last."""
        self.unopened: deque[tuple[bytes, Sender | None]] = deque()
        """What has been received, and isn't to be opened yet, as whoever relays it has decided; by its senders."""
        self.is_closed = False
        """The other side has said that it will send no more: ``close_notify``."""
        self.closed_by: Sender | None = None
        """Who has, if that is known."""
        self.failure: Failure | None = None
        self._has_ended = False
        """The farewell has been said."""
        self._sent = before
        """Bytes that the other side has been sent, or is to be."""
        self._plain_sent = 0
        """Of those, what was said in them."""
        self._marks: list[_Mark] | None = [] if is_client else None
        """Where what was said last is; the first of the next ones takes the place of the first."""
        self._marked: i64 = 0
        """How often something was said."""

    # What comes

    @property
    def is_over(self) -> bool:
        """Whether nothing more can be read from the other side."""
        return self.is_closed or self.failure is not None

    @property
    def halfway(self) -> int:
        """How many bytes there are of a record that has begun, and hasn't ended."""
        return len(self._rest)

    def take(self, raw: bytes, sender: Sender | None) -> bytes:
        """Whole records of what has been received, for OpenSSL; what is left is kept in front of what comes next."""
        self.mixed = None
        self._is_quiet = False
        had = len(self._rest) > 0
        if had:
            raw = self._rest + raw
        whole = _whole(raw)
        first = self._begun_by if had else sender
        if whole and first is not None and sender is not None and first != sender:
            self.mixed = first
        self._begun_by = sender if whole else first
        if whole == len(raw):
            self._rest = b""
            return raw
        self._rest = raw[whole:]
        return raw[:whole]

    def open(self, raw: bytes, sender: Sender | None = None) -> bytes:
        """Decrypt what has been received; returns what it says, all of it, which is nothing if no record is whole.

        When the other side has ended, or its stream is broken, :attr:`is_over` says so, and what comes then is thrown
        away; what was said before that is returned.

        Args:
            raw: what has been received, as one sender's.
            sender: whose, if that is known.
        """
        if self._is_even and _is_one(raw):
            self.mixed = None
            self._begun_by = sender
            self._give(raw)
            return self._open_next(len(raw), raw, len(raw), sender)
        if self.is_over:
            return b""
        records = self.take(raw, sender)
        said: list[bytes] = []
        pos, end = 0, len(records)
        while True:
            if pos < end:
                stop = end if end - pos <= _AT_ONCE else pos + _whole(records[pos : pos + _AT_ONCE])
                self._give(records if pos == 0 and stop == end else records[pos:stop])
                pos = stop
            while self._incoming.pending:
                data = self._open_next(_PLAIN, records, pos, sender)
                if not data:
                    break
                said.append(data)
            if pos == end or self.is_over:
                break
        self._is_even = not self._rest and not self.is_over
        return said[0] if len(said) == 1 else b"".join(said)

    def _open_next(self, size: int, records: bytes, pos: int, sender: Sender | None) -> bytes:
        """Decrypt the next record that says something, of ``size`` bytes at most; no bytes: there is none.

        For one that does, OpenSSL has nothing to say itself.

        Args:
            size: a record's, at least.
            records: what has come.
            pos: how much of that OpenSSL has been given.
            sender: whose that is.
        """
        try:
            data = self._decipher(size)
        except ssl.SSLWantReadError:
            self._is_quiet = False
            return b""  # the last record had nothing to say to whoever reads: a session ticket, or new keys
        except ssl.SSLZeroReturnError:
            data = b""
        except ssl.SSLError as error:
            record = _record_before(records, pos - self._incoming.pending)
            begun_by = self.mixed if record.start == 0 else None
            told = (error.reason or "").startswith(_ALERTS)
            self.failure = Failure(_reason(error), told, len(record), sender, begun_by)
            self._is_even = self._is_quiet = False
            return b""
        if not data:
            self.is_closed = True
            self.closed_by = sender
            self._is_even = self._is_quiet = False
        return data

    def says_no_more_than(self, size: int, raw: bytes) -> bool:
        """Whether none of the records that have been received says more than so many bytes, whatever they say.

        OpenSSL makes none larger than it has to. Where it isn't known how much that is, this is True of some that do.
        """
        longest = self.longest_record(size)
        pos = 0
        while len(raw) - pos >= _HEADER:
            length = _HEADER + int.from_bytes(raw[pos + 3 : pos + _HEADER], "big")
            if length > longest:
                return False
            pos += length
        return True

    @property
    def cipher(self) -> str:
        """How it is encrypted, as OpenSSL calls it; in TLS 1.3 that begins with ``TLS_``."""
        cipher = self.ssl_object.cipher()  # unlike its version, a stream that has failed still has it
        return "" if cipher is None else cipher[0]

    def longest_record(self, size: int) -> int:
        """How many bytes a record may have that says so many, as far as that is known: OpenSSL makes none larger."""
        overhead = next((more for part, more in _OVERHEAD if part in self.cipher), _MOST_OVERHEAD)
        return _HEADER + size + overhead

    # What goes

    def seal(self, data: bytes | memoryview) -> bytes:
        """Encrypt something; returns what is to be sent: nothing if the connection has failed or was ended.

        Nor would there be anything in the middle of a renegotiation, so no context may allow one.
        What :meth:`words` would have returned stands in front of it.
        """
        size = len(data)
        if not size:
            return b""
        began = self._sent
        if not self._is_quiet:
            began += self._outgoing.pending
        done, sealed = self._seal_one(data)
        if 0 < done < size:
            records, more = [sealed], done
            while more and done < size:
                more, sealed = self._seal_one(memoryview(data)[done:])
                records.append(sealed)
                done += more
            sealed = b"".join(records)
        if done:
            self._sent += len(sealed)
            self._plain_sent += done
            if self._marks is not None:
                self._mark(self._marks, began, done)
        return sealed

    def _mark(self, marks: list[_Mark], began: i64, size: i64) -> None:
        """Take note of where something is that was said, of so many bytes, as it is sent behind all else."""
        if self._marked < _MARKS:
            marks.append(_Mark())
        mark = marks[self._marked % _MARKS]
        self._marked += 1
        mark.began, mark.ended = began, self._sent
        mark.said_from, mark.said_to = self._plain_sent - size, self._plain_sent

    def _seal_one(self, data: bytes | memoryview) -> tuple[int, bytes]:
        """Make a record of as much as fits into one: how much that is, 0 if none can be made; and the record."""
        try:
            done = self._encipher(data)
        except ssl.SSLError:
            self._is_quiet = False
            return 0, b""  # it is of no use any more
        return done, self._fetch()

    def words(self) -> bytes:
        """What is to be sent on TLS's own account: an alert, say. Mostly nothing, and nothing after the farewell."""
        if self._is_quiet:
            return b""
        words = self._fetch()
        self._is_quiet = True
        if self._has_ended:
            return b""
        self._sent += len(words)
        return words

    def farewell(self) -> bytes:
        """What is to be sent last: that no more will come. It may be read from still."""
        self._is_quiet = False
        try:  # noqa: SIM105 - it would take two more calls
            self.ssl_object.unwrap()
        except ssl.SSLError:
            pass  # it doesn't wait for the other side's, or is of no use any more
        words = self.words()
        self._has_ended = True
        return words

    # How much of it has been read

    def unread_at(self, position: int) -> int:
        """How many bytes of what has been said hasn't been read by who has read what was sent up to a position.

        Args:
            position: in all that the other side has been sent, from its first byte on, modulo 2**32.
        """
        return self.unread(_signed(self._sent - position))

    def unread(self, size: int) -> int:
        """How many bytes of what has been said hasn't been read by who hasn't read the last bytes that were sent.

        A record is read when it has been read to its end. Of what was said a while ago it isn't known which bytes it
        has become: it counts as read.

        Args:
            size: how many of those; they may be none.
        """
        if not self._marks:
            return 0
        position = self._sent - size
        last = self._marked - 1
        for at in range(last, last - len(self._marks), -1):
            mark = self._marks[at % _MARKS]
            if position >= mark.ended:
                return self._plain_sent - mark.said_to
            if position >= mark.began:
                said = mark.said_to - mark.said_from
                records = -(-said // _PLAIN)  # all are as long as can be but the last
                record = _PLAIN + (mark.ended - mark.began - said) // records
                return self._plain_sent - mark.said_from - (position - mark.began) // record * _PLAIN
        oldest = self._marks[self._marked % len(self._marks)]
        return self._plain_sent - oldest.said_from


class Handshake:
    """A TLS handshake with the other side of a connection.

    Args:
        context: what is demanded and shown.
        server_side: the other side is a client.
        hostname: of a server, the name that it goes by: it is told, and checked as the context says.
        before: how many bytes the other side has been sent in front of it.

    Raises:
        ValueError: the name can't be a host's.
    """

    def __init__(
        self, context: ssl.SSLContext, *, server_side: bool, hostname: str | None = None, before: int = 0
    ) -> None:
        self._incoming = ssl.MemoryBIO()
        self._waits = server_side
        """OpenSSL has to hear more before it goes on."""
        outgoing = ssl.MemoryBIO()
        ssl_object = context.wrap_bio(self._incoming, outgoing, server_side=server_side, server_hostname=hostname)
        self._shake: Callable[[], None] = _calls_of(ssl_object).do_handshake
        self.tls = Tls(self._incoming, outgoing, ssl_object, before, is_client=server_side)
        """What comes of it, to be used when it is done. What has come behind it has to be opened, before it is waited
        for more: :meth:`Tls.open` with no bytes."""
        self.is_done = False

    def hear(self, raw: bytes = b"", sender: Sender | None = None) -> bytes:
        """Take what the other side has sent, as one sender's; returns what it is to be sent.

        A client begins with nothing having been sent. A step may take a millisecond, for a signature.

        Raises:
            HandshakeFailed: there will be no TLS.
        """
        tls = self.tls
        records = tls.take(raw, sender)
        if self._waits and not records:
            return b""
        self._incoming.write(records)
        try:
            self._shake()
        except ssl.SSLWantReadError:
            self._waits = True
        except ssl.SSLError as error:
            raise HandshakeFailed(error, tls.words()) from error
        else:
            self.is_done = True
        return tls.words()


def _calls_of(ssl_object: ssl.SSLObject) -> ssl.SSLObject:
    """What has the methods of an SSLObject that only call OpenSSL: what is inside it, or itself if nothing is."""
    inside: ssl.SSLObject = getattr(ssl_object, "_sslobj", ssl_object)
    return inside


def _is_one(raw: bytes) -> bool:
    """Whether it is one record, whole, of what the other side has to say: most often it is."""
    size: i64 = len(raw)
    return (
        _HEADER < size <= _AT_ONCE and raw[0] == _DATA and raw[1] == _MAJOR and raw[3] << 8 | raw[4] == size - _HEADER
    )


def _whole(raw: bytes) -> int:
    """How many bytes are whole records; all of them, if what comes next can't be one: OpenSSL is to say so."""
    pos, size = 0, len(raw)
    while size - pos >= _HEADER:
        length = raw[pos + 3] << 8 | raw[pos + 4]
        if raw[pos + 1] != _MAJOR or length > _MOST or not _FIRST_TYPE <= raw[pos] <= _LAST_TYPE:
            return size
        if size - pos - _HEADER < length:
            break
        pos += _HEADER + length
    return pos


def _record_before(raw: bytes, end: int) -> range:
    """Where the record is that ends at a position, or goes on beyond it."""
    start = stop = 0
    while stop < end:
        start = stop
        stop = start + _HEADER + int.from_bytes(raw[start + 3 : start + _HEADER], "big")
    return range(start, min(stop, len(raw)))


def _reason(error: Exception) -> str:
    """What has gone wrong, in OpenSSL's words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason.replace("_", " ").lower()
    return str(error)


def _signed(number: int) -> int:
    """What a small difference is that has been taken modulo 2**32."""
    number &= 0xFFFFFFFF
    return number - 0x100000000 if number >> 31 else number
