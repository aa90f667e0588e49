"""Certificates to test with, made anew: good ones, and one of each that is to be refused."""

from __future__ import annotations

import datetime
import ipaddress
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_DAY: Final = datetime.timedelta(days=1)
KEY_PASSWORD: Final = "open sesame"


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key, each in a file."""

    cert: Path
    key: Path


class Authority:
    """Somebody who signs certificates.

    Args:
        directory: where everything is written.
        name: its own, and its certificate's.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        now = _now()
        builder = _builder(self._name, self._name, self._key, now - _DAY, now + 30 * _DAY)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        signs = x509.KeyUsage(
            digital_signature=True,
            key_cert_sign=True,
            crl_sign=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        builder = builder.add_extension(signs, critical=True)
        self.cert = directory / f"{name}.crt"
        """Its own certificate: what who trusts it is given."""
        _write(self.cert, builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def issue(
        self,
        file: str,
        common_name: str,
        names: Sequence[str] = (),
        *,
        lasts: int = 30,
        password: str | None = None,
        key: ec.EllipticCurvePrivateKey | None = None,
    ) -> Pair:
        """Sign a certificate, for a server or a client.

        Args:
            file: what its files are called.
            common_name: the subject's.
            names: names and addresses that it is for, beside.
            lasts: days until it expires; if they are negative, it has.
            password: of its key's file.
            key: whose it is; by default a new one.
        """
        key = key or ec.generate_private_key(ec.SECP256R1())
        now = _now()
        builder = _builder(_named(common_name), self._name, key, now - 60 * _DAY, now + lasts * _DAY)
        builder = builder.add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = builder.add_extension(issuer, critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), False)
        return _written(self._directory, file, builder.sign(self._key, hashes.SHA256()), key, password)

    def revoke(self, file: str, *pairs: Pair) -> Path:
        """Write a list of certificates that it has revoked."""
        now = _now()
        builder = x509.CertificateRevocationListBuilder().issuer_name(self._name)
        builder = builder.last_update(now - _DAY).next_update(now + 30 * _DAY)
        for pair in pairs:
            serial = x509.load_pem_x509_certificate(pair.cert.read_bytes()).serial_number
            revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now - _DAY)
            builder = builder.add_revoked_certificate(revoked.build())
        path = self._directory / file
        signed = builder.sign(self._key, hashes.SHA256())
        _write(path, signed.public_bytes(serialization.Encoding.PEM))
        return path


def self_signed(directory: Path, file: str, common_name: str, names: Sequence[str]) -> Pair:
    """A certificate that nobody has signed but its own key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = _named(common_name), _now()
    builder = _builder(name, name, key, now - _DAY, now + 30 * _DAY)
    builder = builder.add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
    return _written(directory, file, builder.sign(key, hashes.SHA256()), key, None)


def _written(
    directory: Path, file: str, cert: x509.Certificate, key: ec.EllipticCurvePrivateKey, password: str | None
) -> Pair:
    pair = Pair(directory / f"{file}.crt", directory / f"{file}.key")
    _write(pair.cert, cert.public_bytes(serialization.Encoding.PEM))
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        encryption = serialization.BestAvailableEncryption(password.encode())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    _write(pair.key, pem, mode=0o600)
    return pair


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(data)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    begins: datetime.datetime,
    ends: datetime.datetime,
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(begins).not_valid_after(ends)
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)


def _named(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
