"""Certificates and keys: the files that they are in, what a peer has shown, and whose it is by libpq's rules.

A file is opened once, looked at and read; OpenSSL gets what was read, from memory, as it takes files alone. So what has
been looked at is what is used, and no FIFO is waited for and no device opened (:mod:`pgguard.attribution.trust`).
Whose a file may be depends on what it says: whom to trust (root certificates, revocations) only root and the guard's
own user may say. Of a private key nobody else may be able to read it: ``initialize_SSL()`` in
``fe-secure-openssl.c``.
"""

from __future__ import annotations

import base64
import ipaddress
import os
import re
import ssl
import stat
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal

from pgguard.attribution.trust import TRUST_REMEDY, UntrustedError, open_regular, open_trusted
from pgguard.faults.text import printable, shorten

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

_LIMIT: Final = 32 << 20
"""Bytes of a file, at most: lists of revocations may have many."""
_PEM: Final = b"-----BEGIN "
_ENCRYPTED: Final = re.compile(rb"-----BEGIN ENCRYPTED PRIVATE KEY-----|^Proc-Type: 4,ENCRYPTED", re.MULTILINE)
_KEY_LABELS: Final = ("PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY")
"""What a key may be that isn't in PEM form: PKCS #8, PKCS #1, SEC 1."""
_REVOCATIONS: Final = re.compile(r"[0-9a-f]{8}\.r\d+")
"""What lists of revocations are called in a directory: openssl-rehash(1)."""
_MISMATCH: Final = frozenset({"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"})
"""OpenSSL's reasons if a key is another certificate's: ``x509err.h``."""
_CALLED: Final = {"x509": "certificate", "crl": "certificate revocation list (CRL)"}
_SHOWN: Final = 100
"""Characters of a name in a certificate that are shown, at most."""


class CertificateError(ValueError):
    """A file is of no use; the message is a clause that says which, why, and what to change. No passphrase is in it.

    Nor does it look as if there were one: what stands behind the colon of ``private.key:`` or ``passphrase:`` would be
    hidden in the log (:mod:`pgguard.secrets.text`), and that is what to change.
    """


# Files


def add_roots(context: ssl.SSLContext, path: Path) -> None:
    """Trust the certificates in a file, and those that they have signed. Raises CertificateError."""
    _load(context, path, _read_trusted(path, "root certificates"), "x509")


def add_revocations(context: ssl.SSLContext, path: Path) -> None:
    """Trust no certificate that a file says is revoked; whatever is trusted needs such a list then.

    Raises:
        CertificateError: it can't be read, or holds none.
    """
    _load(context, path, _read_trusted(path, "revoked certificates"), "crl")
    context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_CHAIN


def add_revocations_of(context: ssl.SSLContext, directory: Path) -> None:
    """As :func:`add_revocations`, with all lists in a directory that ``openssl rehash`` has prepared."""
    try:
        found = sorted(name for name in os.listdir(directory) if _REVOCATIONS.fullmatch(name))  # noqa: PTH208 - names
    except OSError as error:
        raise CertificateError(f"the directory {directory} can't be read: {error.strerror}") from error
    for name in found:
        add_revocations(context, directory / name)
    if not found:
        raise CertificateError(
            f"there is no certificate revocation list in the directory {directory} that has a name like 1a2b3c4d.r0: "
            "run openssl rehash on it"
        )


def add_identity(context: ssl.SSLContext, certificate: Path, key: Path, password: str, *, passphrase: str) -> None:
    """Show a certificate, with those that have signed it, to peers that want one.

    Args:
        context: what shows it.
        certificate: the file, in PEM form.
        key: the private key's, which may be in DER form too, as pgjdbc's are.
        password: the key's, if it is encrypted; else empty.
        passphrase: what to do if that is not right, an imperative.

    Raises:
        CertificateError: one can't be read, others may read the key, or they don't belong together.
    """
    shown = read_certificate(certificate)
    secret = _read(key, "private key", _open_key)
    for form in _pem_forms(secret):
        try:
            add_made_identity(context, shown, form, password)
        except ssl.SSLError as error:
            if error.reason in _MISMATCH:
                raise CertificateError(
                    f"the private key {key} isn't that of the certificate {certificate}: name the one that is"
                ) from error
        except (OSError, ValueError):  # ValueError: a passphrase of more than 1,024 bytes
            pass
        else:
            return
    if _ENCRYPTED.search(secret):
        problem = "its passphrase is another one" if password else "it is encrypted"
        raise CertificateError(f"the private key {key} can't be used: {problem}: {passphrase}")
    raise CertificateError(f"{key} holds no private key in PEM form: name a file with BEGIN PRIVATE KEY in it")


def read_certificate(path: Path) -> bytes:
    """What a file of certificates says, in PEM form. Raises CertificateError."""
    content = _read(path, "certificate", _open)
    _load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), path, content, "x509")
    return content


def add_made_identity(context: ssl.SSLContext, certificate: bytes, key: bytes, password: str = "") -> None:
    """As :func:`add_identity`, with what is in no file of anybody's. Raises OSError: it can't be used."""
    # Without a passphrase OpenSSL would ask for one on the terminal.
    with _as_file(certificate) as shown, _as_file(key) as secret:
        context.load_cert_chain(shown, secret, password=lambda: password)


def _read_trusted(path: Path, what: str) -> bytes:
    try:
        return _read(path, what, open_trusted)
    except UntrustedError as error:
        raise CertificateError(f"the {what} in {path} aren't used: {error}: {TRUST_REMEDY}") from error


def _open(path: Path) -> BinaryIO:
    return os.fdopen(open_regular(path), "rb")


def _open_key(path: Path) -> BinaryIO:
    """Open a private key, unless others may read it, by libpq's rule. Raises OSError, CertificateError."""
    file = _open(path)
    status = os.fstat(file.fileno())
    others = stat.S_IRWXG | stat.S_IRWXO if status.st_uid else stat.S_IWGRP | stat.S_IXGRP | stat.S_IRWXO
    if not status.st_mode & others:
        return file
    file.close()
    raise CertificateError(
        f"the private key {path} may be known to other users: set its mode to 0600, or to 0640 if root owns it"
    )


def _read(path: Path, what: str, opened: Callable[[Path], BinaryIO]) -> bytes:
    """Read a file. Raises CertificateError, UntrustedError."""
    try:
        with opened(path) as file:
            content = file.read(_LIMIT + 1)
    except OSError as error:
        raise CertificateError(
            f"the {what} in {path} can't be read: {error.strerror or 'it is not a regular file'}"
        ) from error
    if len(content) > _LIMIT:
        raise CertificateError(f"{path} is larger than {_LIMIT >> 20} MiB: name another file")
    return content


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """A path by which OpenSSL reads what has been read: memory that goes with the context, memfd_create(2)."""
    fd = os.memfd_create("pgguard", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(content)
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def _load(context: ssl.SSLContext, path: Path, content: bytes, what: Literal["x509", "crl"]) -> None:
    """Take up what a file holds of certificates (``x509``), or lists of revoked ones (``crl``)."""
    # By itself OpenSSL is content with either.
    scratch = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with _as_file(content) as name, suppress(OSError):  # ssl.SSLError is one, and of an empty file another
        scratch.load_verify_locations(cafile=name)
        if scratch.cert_store_stats()[what]:
            context.load_verify_locations(cafile=name)
            return
    raise CertificateError(f"{path} holds no {_CALLED[what]} in PEM form: name another file")


def _pem_forms(content: bytes) -> Iterator[bytes]:
    """A key as OpenSSL's interface in Python takes it; in DER form it doesn't say what it is."""
    if _PEM in content:
        yield content
        return
    lines = base64.encodebytes(content)
    for label in _KEY_LABELS:
        yield b"-----BEGIN %b-----\n%b-----END %b-----\n" % (label.encode(), lines, label.encode())


# What a peer has shown


def names(certificate: Mapping[str, Any]) -> tuple[list[str], list[str], str | None]:
    """Whose a certificate is: host names, IP addresses, and the subject's common name.

    Args:
        certificate: as :meth:`ssl.SSLObject.getpeercert` tells it.
    """
    alternatives = [(str(kind), str(name)) for kind, name in certificate.get("subjectAltName", ())]
    hosts = [name for kind, name in alternatives if kind == "DNS"]
    addresses = [name for kind, name in alternatives if kind == "IP Address"]
    common = [str(value) for part in certificate.get("subject", ()) for key, value in part if key == "commonName"]
    return hosts, addresses, common[0] if common else None


def is_for(certificate: Mapping[str, Any], host: str) -> bool:
    """Whether a certificate is a host's, by ``pgtls_verify_peer_name_matches_certificate_guts()`` of libpq.

    A host's name is looked for among the names that the certificate has beside its subject; an address among the
    addresses, and the names too. Only if there is none of that kind the subject's common name counts.
    """
    hosts, addresses, common = names(certificate)
    if any(_is_like(name, host) for name in hosts) or any(_is_same(address, host) for address in addresses):
        return True
    of_its_kind = addresses if is_number(host) else hosts
    return not of_its_kind and common is not None and _is_like(common, host)


def is_number(host: str) -> bool:
    """Whether it is an IP address: ``is_ip_address()`` of libpq."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_same(address: str, host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(address.strip()) == ipaddress.ip_address(host)
    return False


def _is_like(name: str, host: str) -> bool:
    """Whether a name in a certificate, with ``*`` for the first label of several, is a host's."""
    if "\0" in name:
        return False  # CVE-2009-4034
    name, host = name.lower(), host.lower()
    if name == host:
        return True
    first, dot, rest = host.partition(".")
    return bool(first and dot) and len(name) >= 3 and name == f"*.{rest}"


def presented(connection: ssl.SSLObject) -> str | None:
    """What certificate a peer has shown, a few words, also if it isn't trusted; ``None`` if that can't be told.

    Python 3.13 has a public method for what was shown, but not for what is in it.
    """
    with suppress(Exception):
        chain = connection._sslobj.get_unverified_chain()  # type: ignore[attr-defined] # noqa: SLF001
        return describe(chain[0].get_info()) if chain else None
    return None


def describe(certificate: Mapping[str, Any]) -> str:
    """Tell for people which certificate it is."""
    hosts, addresses, common = names(certificate)
    issuer = names({"subject": certificate.get("issuer", ())})[2]
    whose = ", ".join(dict.fromkeys([*([] if common is None else [common]), *hosts, *addresses])) or "nobody"
    signed = "" if issuer is None else f", signed by {_shown(issuer)}"
    return f"for {_shown(whose)}{signed}, valid until {certificate.get('notAfter', '?')}"


def _shown(text: str) -> str:
    return shorten(printable(text), _SHOWN)
