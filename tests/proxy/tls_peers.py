"""Who speaks TLS with the guard, without a socket, and certificates for both."""

from __future__ import annotations

import datetime
import ssl
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pgguard.proxy.transport import Handshake

if TYPE_CHECKING:
    from pgguard.proxy.transport import Tls

HOST = "db.example"


@cache
def certificate() -> bytes:
    """A certificate that its own key has signed, and the key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - datetime.timedelta(days=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=1))
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
    signed = builder.sign(key, hashes.SHA256())
    encoding = serialization.Encoding.PEM
    pem = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return signed.public_bytes(encoding) + pem


@cache
def server_context(version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3, *, tickets: int = 0) -> ssl.SSLContext:
    """What a server shows and demands: as PostgreSQL, it gives out no tickets unless it is told to."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = version
    context.num_tickets = tickets
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(certificate())
        context.load_cert_chain(file.name)
    return context


@cache
def client_context(*, trusts: bool = True) -> ssl.SSLContext:
    """What a client demands: the certificate, under its name."""
    context = ssl.create_default_context()
    if trusts:
        context.load_verify_locations(cadata=certificate().split(b"-----BEGIN PRIVATE")[0].decode())
    return context


class Peer:
    """The other side of one of the guard's connections, after the handshake.

    Args:
        server_side: it is a server.
        context: as the ssl module has it.
        guards: the guard's.
        before: bytes that it has been sent before.
    """

    def __init__(
        self,
        *,
        server_side: bool,
        context: ssl.SSLContext | None = None,
        guards: ssl.SSLContext | None = None,
        before: int = 0,
    ) -> None:
        mine, other = (server_context, client_context) if server_side else (client_context, server_context)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.ssl = (context or mine()).wrap_bio(
            self.incoming, self.outgoing, server_side=server_side, server_hostname=None if server_side else HOST
        )
        handshake = Handshake(
            guards or other(), server_side=not server_side, hostname=HOST if server_side else None, before=before
        )
        raw = handshake.hear() if server_side else b""
        while not self._is_done(raw) or (self.outgoing.pending and not handshake.is_done):
            raw = handshake.hear(self.outgoing.read())
        assert handshake.is_done
        self.tls: Tls = handshake.tls
        """The guard's side."""

    def _is_done(self, raw: bytes) -> bool:
        self.incoming.write(raw)
        try:
            self.ssl.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def say(self, data: bytes) -> bytes:
        """Encrypt something; returns what is to be received."""
        done = 0
        while done < len(data):
            done += self.ssl.write(data[done:])
        return self.outgoing.read()

    def hear(self, raw: bytes) -> bytes:
        """Decrypt what has been sent. Raises ssl.SSLError: it isn't in order, or says that something else wasn't."""
        self.incoming.write(raw)
        said = b""
        while True:
            try:
                data = self.ssl.read(1 << 20)
            except ssl.SSLWantReadError:
                return said
            if not data:
                return said
            said += data

    def end(self) -> bytes:
        """Say that no more will come; returns what is to be received."""
        with suppress(ssl.SSLError):
            self.ssl.unwrap()
        return self.outgoing.read()
