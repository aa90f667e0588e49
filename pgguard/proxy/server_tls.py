"""TLS to the server, as libpq does it: what a connection string says of it, and what that comes to. No connections.

What is said there, or in libpq's variables and service files, means what it means to libpq, with the same defaults:
"SSL Support" and "Parameter Key Words" in the chapter on libpq, ``fe-secure-openssl.c``, ``fe-secure-common.c`` and
``init_allowed_encryption_methods()`` in ``fe-connect.c``. In short:

=============  ======================================  ===================  ==================================
``sslmode``    is connected                            certificate          name
=============  ======================================  ===================  ==================================
disable        without TLS                             isn't checked        isn't checked
allow          without, and with if that is refused    if there are roots   isn't checked
prefer         with, and without if that isn't to be   if there are roots   isn't checked
require        with                                    if there are roots   isn't checked
verify-ca      with                                    is checked           isn't checked
verify-full    with                                    is checked           is checked
=============  ======================================  ===================  ==================================

There are roots if ``sslrootcert`` names them, or else ``~/.postgresql/root.crt`` is there. So ``require`` becomes
``verify-ca`` by that file.

A client sends its part of a key for the group that it likes best, and a server that wants another one asks again:
HelloRetryRequest, RFC 8446, 4.1.4. It costs one more round trip. PostgreSQL before version 18 wants
:data:`_ASKED_FOR` (``ssl_ecdh_curve``), OpenSSL's clients begin with another, and so libpq is asked again by each of
these servers each time. The guard offers a server that has asked for this group nothing else from then on. Should a
handshake fail that way, for whatever reason, it is begun anew with all that there is.

It differs where a mistake would go unnoticed until the first client comes, or for ever. What is named has to be there:
libpq passes over a file of certificates that isn't. And what can't be read is an error also where libpq would then
connect without TLS.
"""

from __future__ import annotations

import os
import pwd
import ssl
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakSet

from pgguard.faults.text import printable, shorten
from pgguard.proxy.certificates import (
    CertificateError,
    add_identity,
    add_revocations,
    add_revocations_of,
    add_roots,
    is_for,
    is_number,
    presented,
)
from pgguard.proxy.errors import ConfigurationError, Problem, UnfitServerError
from pgguard.proxy.transport import Handshake
from pgguard.wire.startup import PROTOCOL

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pgguard.proxy.addresses import TcpAddress
    from pgguard.proxy.transport import HandshakeFailed

_ASKED_FOR: Final = "prime256v1"
_RETRY: Final = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
_RANDOM: Final = slice(11, 43)
"""What a HelloRetryRequest has where a ServerHello has something random, behind the record's header, the message's and
the version: RFC 8446, 4.1.3."""
_KEY_SHARE: Final = bytes.fromhex("003300020017")
"""Its extension that asks for secp256r1, as :data:`_ASKED_FOR` is called there: 4.2.8 and 4.2.7."""
_REMEMBERED: Final = 256
"""Servers of which it is remembered what they have asked for."""

SYSTEM: Final = "system"
"""The roots that the system trusts, as a value of ``sslrootcert``."""
_PASSPHRASE: Final = "set its passphrase as sslpassword"  # noqa: S105 - not one
_WORDS: Final = 120
"""Characters of what OpenSSL says that are shown, at most."""


class SslMode(StrEnum):
    """Values of ``sslmode``, the weakest first."""

    DISABLE = "disable"
    ALLOW = "allow"
    PREFER = "prefer"
    REQUIRE = "require"
    VERIFY_CA = "verify-ca"
    VERIFY_FULL = "verify-full"


_WITHOUT: Final = frozenset({SslMode.DISABLE, SslMode.ALLOW, SslMode.PREFER})
_METHODS: Final = {SslMode.DISABLE: (False,), SslMode.ALLOW: (False, True), SslMode.PREFER: (True, False)}
_VERSIONS: Final = {
    "tlsv1": ssl.TLSVersion.TLSv1,
    "tlsv1.1": ssl.TLSVersion.TLSv1_1,
    "tlsv1.2": ssl.TLSVersion.TLSv1_2,
    "tlsv1.3": ssl.TLSVersion.TLSv1_3,
}
_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "sslmode": tuple(SslMode),
    "sslnegotiation": ("postgres", "direct"),
    "sslcertmode": ("allow", "disable", "require"),
    "ssl_min_protocol_version": ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"),
    "ssl_max_protocol_version": ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"),
}
"""What some keywords may say; of the versions upper and lower case are one."""


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """What a connection string and what stands behind it say of TLS, by libpq's keywords: checked, no file read yet."""

    mode: SslMode
    is_direct: bool = False
    """TLS begins with the connection: ``sslnegotiation=direct``."""
    roots: str = ""
    """A file, :data:`SYSTEM`, or nothing: the default file, if there is one. So with the others."""
    certificate: str = ""
    key: str = ""
    password: str = field(default="", repr=False)
    certificates: str = "allow"
    """Whether the server is shown a certificate: ``sslcertmode``."""
    revocations: str = ""
    revocations_in: str = ""
    """A directory of such files."""
    names_host: bool = True
    """The server is told by which name it is connected to: ``sslsni``."""
    least: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2
    most: ssl.TLSVersion | None = None

    @property
    def methods(self) -> tuple[bool, ...]:
        """How it is connected: with TLS or without, the first one first."""
        return _METHODS.get(self.mode, (True,))

    @property
    def may_be_plain(self) -> bool:
        """Whether it may come to a connection without TLS."""
        return self.mode in _WITHOUT


def read_tls(settings: Mapping[str, str]) -> TlsSettings:
    """Read what is said of TLS: as ``connectOptions2()`` in ``fe-connect.c`` checks it.

    Args:
        settings: by libpq's keywords, its defaults among them.

    Raises:
        ConfigurationError: that can't be, or contradicts itself.
    """
    given = {keyword: settings.get(keyword) or "" for keyword in _CHOICES}
    for keyword, choices in _CHOICES.items():
        is_version = keyword.endswith("_version") and given[keyword].lower() in _VERSIONS
        if given[keyword] not in {"", *choices} and not is_version:
            known = f"{', '.join(choices[:-1])} or {choices[-1]}"
            raise ConfigurationError(f"--upstream: there is no such {keyword}: use {known}")
    mode = SslMode(given["sslmode"] or SslMode.PREFER)
    roots = settings.get("sslrootcert") or ""
    is_direct = given["sslnegotiation"] == "direct"
    if roots == SYSTEM and mode is not SslMode.VERIFY_FULL:
        raise ConfigurationError(
            f"--upstream: sslmode={mode} is too weak for sslrootcert=system, as anybody can have a certificate from a "
            "public CA: use sslmode=verify-full, or leave sslmode out"
        )
    if is_direct and mode in _WITHOUT:
        raise ConfigurationError(
            f"--upstream: sslmode={mode} is too weak for sslnegotiation=direct: use sslmode=require, verify-ca or "
            "verify-full"
        )
    if settings.get("gssencmode") == "require":
        raise ConfigurationError("--upstream: gssencmode=require asks for GSSAPI encryption: use gssencmode=disable")
    least = _VERSIONS[given["ssl_min_protocol_version"].lower() or "tlsv1.2"]
    most = _VERSIONS.get(given["ssl_max_protocol_version"].lower())
    if most is not None and most < least:
        raise ConfigurationError(
            "--upstream: ssl_max_protocol_version is older than ssl_min_protocol_version, which is TLSv1.2 if it isn't "
            "given: set both"
        )
    return TlsSettings(
        mode,
        is_direct,
        roots,
        settings.get("sslcert") or "",
        settings.get("sslkey") or "",
        settings.get("sslpassword") or "",
        given["sslcertmode"] or "allow",
        settings.get("sslcrl") or "",
        settings.get("sslcrldir") or "",
        settings.get("sslsni", "1").startswith("1"),
        least,
        most,
    )


class Loaded(NamedTuple):
    """What the files say that the settings name."""

    context: ssl.SSLContext
    narrow: ssl.SSLContext
    """The same, for servers that have asked for :data:`_ASKED_FOR`: nothing else is offered them."""
    verifies: bool
    """The server's certificate is checked."""
    shows: bool
    """There is a certificate that the server is shown if it asks for one."""
    asked: WeakSet[ssl.SSLObject] | None
    """The connections whose server has asked for a certificate, if that is demanded."""


class ServerTls:
    """TLS to the server.

    Args:
        settings: which, of some ``sslmode`` but ``disable``.

    Raises:
        ConfigurationError: a file can't be used; one line that says which, and what to change.
    """

    def __init__(self, settings: TlsSettings) -> None:
        self.settings = settings
        self._loaded = load(settings)
        self._asked_for: set[TcpAddress] = set()
        """Servers that have asked for that group, and got it."""

    @property
    def verifies(self) -> bool:
        """Whether the server's certificate is checked."""
        return self._loaded.verifies

    @property
    def has_files(self) -> bool:
        """Whether something was read."""
        return self._loaded.verifies or self._loaded.shows

    def read_again(self) -> Loaded:
        """Read the files again, in any thread; nothing changes by that. Raises ConfigurationError."""
        return load(self.settings)

    def follow(self, loaded: Loaded) -> None:
        """Go by what the files say now, on connections that are made from now on."""
        self._loaded = loaded

    # One connection

    def begin(self, address: TcpAddress) -> Handshake:
        """Begin a handshake with the server at an address. Raises UnfitServerError: it can't be begun."""
        name = address.certified_name
        told = name if self.settings.names_host and name and not _is_like_number(name) else None
        try:
            context = self._loaded.narrow if address in self._asked_for else self._loaded.context
            return Handshake(context, server_side=False, hostname=told)
        except (ValueError, UnicodeError) as error:
            raise UnfitServerError(Problem.WRONG_NAME, f"{told} can't be a host's name: {error}") from error

    def remember(self, address: TcpAddress) -> None:
        """Offer a server from now on nothing but what it :func:`has_asked_for`, as a handshake with it has come off."""
        if len(self._asked_for) < _REMEMBERED:
            self._asked_for.add(address)

    def remembers(self, address: TcpAddress) -> bool:
        """Whether a server is offered nothing else."""
        return address in self._asked_for

    def forget(self, address: TcpAddress) -> None:
        """Offer it everything again."""
        self._asked_for.discard(address)

    def check(self, connection: ssl.SSLObject, address: TcpAddress) -> None:
        """See whether the server is who it should be, as the handshake is done.

        Raises:
            UnfitServerError: it isn't, or it hasn't done what it is to do.
        """
        settings = self.settings
        if settings.is_direct and connection.selected_alpn_protocol() != PROTOCOL:
            raise UnfitServerError(
                Problem.NO_ALPN, "direct TLS connection was established without ALPN protocol negotiation extension"
            )
        if self._loaded.asked is not None and connection not in self._loaded.asked:
            raise UnfitServerError(Problem.CERTIFICATE_NOT_ASKED, "server did not request an SSL certificate")
        if settings.mode is not SslMode.VERIFY_FULL:
            return
        name = address.certified_name
        certificate = connection.getpeercert() or {}
        if not is_for(certificate, name):
            raise UnfitServerError(
                Problem.WRONG_NAME,
                f"its certificate ({presented(connection) or 'of which nothing is known'}) does not match host name "
                f'"{name}"',
            )

    def explain(self, error: HandshakeFailed, connection: ssl.SSLObject) -> UnfitServerError:
        """Say why a handshake has failed."""
        cause = error.error
        if isinstance(cause, ssl.SSLCertVerificationError):
            shown = presented(connection)
            its = "its certificate" if shown is None else f"its certificate ({shown})"
            why = _words(cause.verify_message)
            return UnfitServerError(
                _VERIFICATION.get(cause.verify_code, Problem.BAD_CERTIFICATE), f"{its} is not trusted: {why}"
            )
        return self.explain_alert(str(error))

    def explain_alert(self, reason: str) -> UnfitServerError:
        """Say why a connection has failed, by OpenSSL's words."""
        problem = next((problem for words, problem in _ALERTS.items() if words in reason), Problem.HANDSHAKE)
        if problem is Problem.CERTIFICATE_REFUSED and not self._loaded.shows:
            problem = Problem.CERTIFICATE_DEMANDED
        return UnfitServerError(problem, f"SSL error: {_words(reason)}")

    def describe(self, connection: ssl.SSLObject) -> str:
        """Tell for people what TLS a server gives."""
        cipher = connection.cipher()
        name = "an unknown cipher" if cipher is None else cipher[0]
        return f"{connection.version()} with {name}, {self.certainty}"

    @property
    def certainty(self) -> str:
        """What is known of who the server is: a clause."""
        if self.settings.mode is SslMode.VERIFY_FULL:
            return "its certificate and its name are verified"
        return "its certificate is verified" if self.verifies else "its certificate is not verified"


_VERIFICATION: Final[Mapping[int, Problem]] = {
    2: Problem.UNKNOWN_CA,  # unable to get issuer certificate
    18: Problem.UNKNOWN_CA,  # self-signed certificate
    19: Problem.UNKNOWN_CA,  # self-signed certificate in certificate chain
    20: Problem.UNKNOWN_CA,  # unable to get local issuer certificate
    21: Problem.UNKNOWN_CA,  # unable to verify the first certificate
    9: Problem.NOT_YET_VALID,
    10: Problem.EXPIRED,
    23: Problem.REVOKED,
    3: Problem.NO_REVOCATIONS,  # unable to get certificate CRL
    8: Problem.NO_REVOCATIONS,  # CRL signature failure
    11: Problem.NO_REVOCATIONS,  # CRL is not yet valid
    12: Problem.NO_REVOCATIONS,  # CRL has expired
    33: Problem.NO_REVOCATIONS,  # unable to get CRL issuer certificate
}
"""By the numbers of OpenSSL's checks, ``x509_vfy.h``."""
_ALERTS: Final[Mapping[str, Problem]] = {
    "alert certificate required": Problem.CERTIFICATE_DEMANDED,
    "peer did not return a certificate": Problem.CERTIFICATE_DEMANDED,
    "alert unknown ca": Problem.CERTIFICATE_REFUSED,
    "alert bad certificate": Problem.CERTIFICATE_REFUSED,
    "alert unsupported certificate": Problem.CERTIFICATE_REFUSED,
    "alert certificate revoked": Problem.CERTIFICATE_REFUSED,
    "alert certificate expired": Problem.CERTIFICATE_REFUSED,
    "alert certificate unknown": Problem.CERTIFICATE_REFUSED,
    "alert handshake failure": Problem.CERTIFICATE_REFUSED,  # of TLS 1.2, for want of one; or of a common cipher
    "alert no application protocol": Problem.NO_ALPN,
    "alert protocol version": Problem.VERSION,
    "unsupported protocol": Problem.VERSION,
    "no protocols available": Problem.VERSION,
    "wrong version number": Problem.NO_ANSWER,
    "http request": Problem.NO_ANSWER,
    "eof occurred": Problem.HUNG_UP,
}
"""By what OpenSSL says, which is about the other side's alerts for the most part: ``sslerr.h``."""


# Files


def load(settings: TlsSettings) -> Loaded:
    """Read the files that the settings name, or libpq's default ones.

    Raises:
        ConfigurationError: one can't be used; one line that says which, and what to change.
    """
    try:
        context, verifies, shows = _context(settings)
        narrow, _, _ = _context(settings)
    except CertificateError as error:
        raise ConfigurationError(f"--upstream: {error}") from error
    narrow.set_ecdh_curve(_ASKED_FOR)
    asked = _noting_requests(context, narrow) if settings.certificates == "require" else None
    return Loaded(context, narrow, verifies, shows, asked)


def _context(settings: TlsSettings) -> tuple[ssl.SSLContext, bool, bool]:
    """What handshakes are made with, and what of :class:`Loaded` holds for it. Raises CertificateError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.options |= ssl.OP_NO_RENEGOTIATION  # in the middle of one nothing can be sent: see Tls.seal()
    context.check_hostname = False  # by libpq's rules
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("DEFAULT")  # OpenSSL's, and not Python's choice of them
    context.set_alpn_protocols([PROTOCOL])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of old versions
        context.minimum_version = settings.least
        context.maximum_version = settings.most or ssl.TLSVersion.MAXIMUM_SUPPORTED
    verifies = _add_roots(context, settings)
    if verifies:
        context.verify_mode = ssl.CERT_REQUIRED
        _add_revocations(context, settings)
    return context, verifies, _add_identity(context, settings)


def _add_roots(context: ssl.SSLContext, settings: TlsSettings) -> bool:
    """Trust whom the settings say; False if that is nobody, and nothing is checked. Raises CertificateError."""
    if settings.roots == SYSTEM:
        context.set_default_verify_paths()
        return True
    path = _named(settings.roots) or _default("root.crt")
    if path is not None:
        with _said_in("sslrootcert", settings.roots):
            add_roots(context, path)
        return True
    if settings.mode in {SslMode.VERIFY_CA, SslMode.VERIFY_FULL}:
        raise CertificateError(
            f"sslmode={settings.mode} needs root certificates, and {_directory() / 'root.crt'} does not exist: name "
            "their file as sslrootcert=PATH, or use sslrootcert=system with sslmode=verify-full"
        )
    return False


def _add_revocations(context: ssl.SSLContext, settings: TlsSettings) -> None:
    file, directory = _named(settings.revocations), _named(settings.revocations_in)
    if file is None and directory is None and settings.roots != SYSTEM:
        file = _default("root.crl")
    if file is not None:
        with _said_in("sslcrl", settings.revocations):
            add_revocations(context, file)
    if directory is not None:
        with _said_in("sslcrldir", settings.revocations_in):
            add_revocations_of(context, directory)


def _add_identity(context: ssl.SSLContext, settings: TlsSettings) -> bool:
    """Have something to show a server that asks for it; False if there is nothing. Raises CertificateError."""
    certificate = _named(settings.certificate) or _default("postgresql.crt")
    if settings.certificates == "disable":
        return False
    if certificate is None:
        if settings.certificates == "require":
            raise CertificateError("sslcertmode=require needs a certificate to show: name it as sslcert=PATH")
        return False
    if ":" in settings.key:
        raise CertificateError("sslkey names an OpenSSL engine, which pgguard doesn't use: name a file")
    key = _named(settings.key) or _directory() / "postgresql.key"
    with _said_in("sslcert", settings.certificate):
        add_identity(context, certificate, key, settings.password, passphrase=_PASSPHRASE)
    return True


@contextmanager
def _said_in(keyword: str, value: str) -> Iterator[None]:
    """Say of what is wrong with a file where it is named, if it is."""
    try:
        yield
    except CertificateError as error:
        raise CertificateError(f"{keyword}: {error}" if value else str(error)) from error


def _named(path: str) -> Path | None:
    return Path(path) if path else None


def _default(name: str) -> Path | None:
    """One of libpq's default files, if it is there."""
    path = _directory() / name
    return path if os.path.exists(path) else None  # noqa: PTH110 - it raises nothing where it may not be looked


def _directory() -> Path:
    """Where libpq's default files are: ``pqGetHomeDirectory()``."""
    home = os.environ.get("HOME")
    if not home:
        try:
            home = pwd.getpwuid(os.geteuid()).pw_dir
        except KeyError:
            home = "/"
    return Path(home, ".postgresql")


def _noting_requests(*contexts: ssl.SSLContext) -> WeakSet[ssl.SSLObject]:
    """Note which servers ask for a certificate: there is no public way to be told."""
    asked: WeakSet[ssl.SSLObject] = WeakSet()

    def note(connection: ssl.SSLObject, direction: str, _version: Any, _content: Any, message: Any, _data: Any) -> None:
        if direction == "read" and message == _CERTIFICATE_REQUEST:
            asked.add(connection)

    for context in contexts:
        context._msg_callback = note  # type: ignore[attr-defined] # noqa: SLF001
    return asked


_CERTIFICATE_REQUEST: Final = 13
"""The type of that message: RFC 8446, appendix B.3."""


def has_asked_for(raw: bytes) -> bool:
    """Whether a server's first words, if they have come in one piece, ask for the group :data:`_ASKED_FOR`."""
    return raw[_RANDOM] == _RETRY and _KEY_SHARE in raw[_RANDOM.stop :]


# Words


def _is_like_number(name: str) -> bool:
    """What libpq takes for no name to be told (SNI): digits and dots, or anything with a colon."""
    return ":" in name or not name.strip("0123456789.") or is_number(name)


def _words(reason: str) -> str:
    return shorten(printable(reason), _WORDS)
