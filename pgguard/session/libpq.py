"""What libpq prints when a message comes that it didn't expect, so that a log line can be searched for.

Source: ``pqParseInput3()`` and ``pqFunctionCall3()`` in ``fe-protocol3.c``; PostgreSQL's own refusals, which libpq
passes on, from ``SocketBackend()`` in ``postgres.c`` and ``CopyGetData()`` in ``copyfromparse.c``.
"""

from __future__ import annotations

from typing import Final

_FIRST_ANSWERS: Final = {"P": "1", "B": "2", "C": "3", "S": "Z", "F": "V"}

_BUSY: Final = frozenset("123ACEGHIKNSTWZcdnt")  # the cases of pqParseInput3(), all but DataRow
_FUNCTION_CALL: Final = frozenset("AENSVZ")  # the cases of pqFunctionCall3()

_ROWS: Final = frozenset({b"SELECT", b"VALUES", b"TABLE", b"SHOW", b"EXPLAIN", b"FETCH"})
_ROWS_IF_RETURNING: Final = frozenset({b"INSERT", b"UPDATE", b"DELETE", b"MERGE"})
_NO_ROWS: Final = frozenset(
    b"""
    ABORT ALTER ANALYZE BEGIN CHECKPOINT CLOSE CLUSTER COMMENT COMMIT CREATE DEALLOCATE DECLARE DISCARD DO DROP END
    GRANT LISTEN LOAD LOCK MOVE NOTIFY PREPARE REASSIGN REFRESH REINDEX RELEASE RESET REVOKE ROLLBACK SAVEPOINT SET
    START TRUNCATE UNLISTEN VACUUM
    """.split()
)


CLOSED: Final = "server closed the connection unexpectedly"
"""What libpq prints when the server ends the session of a client that hasn't said Terminate: ``fe-misc.c``."""

CLOSED_BY_TLS: Final = "SSL connection has been closed unexpectedly"
"""The same, where TLS has been ended as well: ``fe-secure-openssl.c``, pgtls_read()."""

BAD_RECORD: Final = "SSL error: decryption failed or bad record mac"
"""What libpq prints when a record fails its integrity check, in OpenSSL's words: ``sslerr.h``, and pgtls_read() in
``fe-secure-openssl.c``. The client may find that itself, or be told: whose TLS is behind can't read what it is told."""

BAD_RECORD_BEFORE_13: Final = "SSL error: cipher operation failed"
"""The same with GCM before TLS 1.3: of several errors libpq prints the first, and since OpenSSL 3 that is the cipher's
own: ``ossl_gcm_stream_update()`` in ``ciphercommon_gcm.c``."""

IN_PROGRESS: Final = "another command is already in progress"
"""What libpq says when a command is to be sent and the last answer has not been read to its end: ``fe-exec.c``,
PQsendQueryStart()."""


def first_answer(message: str, sql: bytes | bytearray | None) -> str | None:
    """The type of the message with which the server begins its answer, if all goes well; ``None`` if it can't be told.

    It is what an idle libpq complains of, elsewhere on the same connection. A statement is known by its first word:
    one that may return rows or not, as EXECUTE and CALL may, is not guessed at.
    """
    if message != "Q":
        return _FIRST_ANSWERS.get(message)
    text = bytes(sql or b"").lstrip(b" \t\r\n(").upper()
    words = text.split(None, 1)
    word = words[0].rstrip(b";\0") if words else b""
    if word in _ROWS:
        return None if b"INTO" in text else "T"
    if word in _ROWS_IF_RETURNING:
        return "T" if b"RETURNING" in text else "C"
    return "C" if word in _NO_ROWS else None


def while_idle(message: str | None) -> str | None:
    """What an idle libpq prints when a message of this type arrives."""
    return None if message is None else f"message type 0x{ord(message):02x} arrived from server while idle"


def while_busy(message: str, *, function_call: bool) -> str | None:
    """What libpq prints when a message arrives that belongs to no answer; most it takes silently."""
    if function_call:
        return None if message in _FUNCTION_CALL else f"protocol error: id=0x{ord(message):x}"
    if message == "D":
        return 'server sent data ("D" message) without prior row description ("T" message)'
    if message in _BUSY:
        return None
    return f'unexpected response from server; first received character was "{message}"'


def lost_synchronization(message: str, length: int) -> str:
    """What libpq prints before it closes a connection whose server sent this length word."""
    signed = length - (1 << 32) if length >= 1 << 31 else length
    return f'lost synchronization with server: got message type "{message}", length {signed}'


def invalid_type(code: int, *, copy_in: bool) -> str:
    """What PostgreSQL answers to a message of a type that it doesn't take."""
    if copy_in:
        return f"unexpected message type 0x{code:02X} during COPY from stdin"
    return f"invalid frontend message type {code}"
