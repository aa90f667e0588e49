"""The TLS that clients are offered: the certificate that they are shown, checked before anybody sees it.

What holds for PostgreSQL's own holds here: "Secure TCP/IP Connections with SSL" in the documentation, and
``be_tls_init()`` in ``be-secure-openssl.c``. TLS 1.2 and up, PostgreSQL's default ciphers, no compression, no
renegotiation, no session tickets; and with a file of CAs a client is asked for a certificate, which has to be one of
theirs if it has any. What the server would make of that certificate nobody can pass on: it is proof for one connection.
"""

from __future__ import annotations

import datetime
import ssl
from typing import TYPE_CHECKING, Final, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from pgguard.faults.text import printable, shorten
from pgguard.proxy.certificates import CertificateError, add_identity, add_made_identity, add_roots, read_certificate
from pgguard.proxy.errors import ConfigurationError
from pgguard.wire.startup import PROTOCOL

if TYPE_CHECKING:
    from pathlib import Path

SELF_SIGNED: Final = "self-signed"
"""In place of a certificate's path: one that is made when the guard starts, and is gone with it."""
_CIPHERS: Final = "HIGH:MEDIUM:+3DES:!aNULL"
"""The default of PostgreSQL's ``ssl_ciphers``, for TLS 1.2."""
_OPTIONS: Final = ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET | ssl.OP_CIPHER_SERVER_PREFERENCE
_VALID: Final = datetime.timedelta(days=3650)
_CLOCKS: Final = datetime.timedelta(days=1)
"""By how much others' clocks may be behind."""
_SHOWN: Final = 80
"""Characters of a certificate's name that are shown, at most."""
_DECRYPT: Final = "name a copy that isn't, as pgguard asks for no passphrase (openssl pkey -in KEY -out COPY)"


class Files(NamedTuple):
    """Where what clients are shown is read from."""

    certificate: Path
    key: Path


class Certificate(NamedTuple):
    """What clients are shown."""

    context: ssl.SSLContext
    """For their handshakes."""
    der: bytes
    """The certificate itself, without those that vouch for it."""
    said: str
    """What it is, for people."""


class Offer:
    """What clients are offered, which can be renewed.

    Args:
        files: where it is from; ``None``: it is made, for clients that don't check it, and never written to a disk.
        ca: the CAs that clients' certificates are to be from; ``None``: they are asked for none.

    Raises:
        ConfigurationError: clients can't be shown it; one line that says which file, and what to change.
    """

    def __init__(self, files: Files | None, ca: Path | None) -> None:
        self._files = files
        self._ca = ca
        self.certificate = _made(ca) if files is None else _loaded(files, ca)
        """That which clients are shown who come now."""

    def read_again(self) -> Certificate | None:
        """Read the files again, in any thread; ``None`` if there are none.

        Raises:
            ConfigurationError: clients can't be shown what is there now.
        """
        return None if self._files is None else _loaded(self._files, self._ca)

    def show(self, certificate: Certificate) -> bool:
        """Show what has been read again to those that come from now on; False if it is the same certificate."""
        before, self.certificate = self.certificate, certificate
        return before.der != certificate.der


def _loaded(files: Files, ca: Path | None) -> Certificate:
    context = _context(ca)
    try:
        add_identity(context, files.certificate, files.key, "", passphrase=_DECRYPT)
        [certificate, *_] = x509.load_pem_x509_certificates(read_certificate(files.certificate))
    except CertificateError as error:
        raise ConfigurationError(f"--tls-cert: {error}") from error
    except ValueError as error:  # OpenSSL has taken it
        raise ConfigurationError(
            f"--tls-cert: {files.certificate} can't be read: {error}: name another file"
        ) from error
    _check_validity(files.certificate, certificate)
    return Certificate(context, certificate.public_bytes(Encoding.DER), _said(certificate))


def _made(ca: Path | None) -> Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pgguard")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    certificate = builder.not_valid_before(now - _CLOCKS).not_valid_after(now + _VALID).sign(key, hashes.SHA256())
    context = _context(ca)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        add_made_identity(context, certificate.public_bytes(Encoding.PEM), secret)
    except OSError as error:
        raise ConfigurationError(f"--tls-cert {SELF_SIGNED}: {error.strerror}") from error
    return Certificate(context, certificate.public_bytes(Encoding.DER), "a certificate of pgguard's own (self-signed)")


def _context(ca: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= _OPTIONS
    context.num_tickets = 0
    context.set_ciphers(_CIPHERS)
    context.set_alpn_protocols([PROTOCOL])
    if ca is not None:
        try:
            add_roots(context, ca)
        except CertificateError as error:
            raise ConfigurationError(f"--tls-ca: {error}") from error
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _check_validity(path: Path, certificate: x509.Certificate) -> None:
    now = datetime.datetime.now(datetime.UTC)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if ends < now:
        raise ConfigurationError(
            f"--tls-cert: the certificate {path} has expired ({ends:%Y-%m-%d %H:%M} UTC): renew it"
        )
    if begins > now:
        raise ConfigurationError(
            f"--tls-cert: the certificate {path} isn't valid before {begins:%Y-%m-%d %H:%M} UTC: set the clock, or "
            "name another one"
        )


def _said(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    name = str(names[0].value) if names else certificate.subject.rfc4514_string()
    whose = f"the certificate of {printable(shorten(name, _SHOWN))}" if name else "a certificate that names nobody"
    return f"{whose}, valid until {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
