"""Files of certificates and keys: which are used, what is said of the others, and whose a certificate is."""

from __future__ import annotations

import os
import ssl
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from pgguard.proxy.certificates import (
    CertificateError,
    add_identity,
    add_revocations,
    add_revocations_of,
    add_roots,
    describe,
    is_for,
)
from tests.tls.certificates import KEY_PASSWORD, Authority

_ASK = "set its passphrase"


@pytest.fixture
def context() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def _certificate(*names: tuple[str, str], common: str | None = None) -> dict[str, Any]:
    subject = () if common is None else ((("countryName", "XX"),), (("commonName", common),))
    return {"subject": subject, "subjectAltName": names}


@pytest.mark.parametrize(
    ("certificate", "host", "fits"),
    [
        (_certificate(("DNS", "db.example")), "db.example", True),
        (_certificate(("DNS", "DB.Example")), "db.eXample", True),
        (_certificate(("DNS", "a.example"), ("DNS", "db.example")), "db.example", True),
        (_certificate(("DNS", "db.example")), "other.example", False),
        (_certificate(("DNS", "*.example")), "db.example", True),
        (_certificate(("DNS", "*.example")), "a.db.example", False),
        (_certificate(("DNS", "*.example")), "example", False),
        (_certificate(("DNS", "*.example")), ".example", False),
        (_certificate(("DNS", "d*.example")), "db.example", False),
        (_certificate(("DNS", "db.*")), "db.example", False),
        (_certificate(("DNS", "*")), "example", False),
        (_certificate(("DNS", "db.example\0.elsewhere")), "db.example", False),
        # The common name counts if there is no name beside it,
        (_certificate(common="db.example"), "db.example", True),
        (_certificate(common="*.example"), "db.example", True),
        (_certificate(("DNS", "a.example"), common="db.example"), "db.example", False),
        (_certificate(("email", "a@db.example"), common="db.example"), "db.example", True),
        (_certificate(("IP Address", "192.0.2.1"), common="db.example"), "db.example", True),
        # and of an address, if there is no address.
        (_certificate(("IP Address", "192.0.2.1")), "192.0.2.1", True),
        (_certificate(("IP Address", "2001:DB8:0:0:0:0:0:1")), "2001:db8::1", True),
        (_certificate(("IP Address", "192.0.2.1"), common="192.0.2.2"), "192.0.2.2", False),
        (_certificate(("DNS", "192.0.2.1")), "192.0.2.1", True),
        (_certificate(("DNS", "db.example"), common="192.0.2.1"), "192.0.2.1", True),
        (_certificate(("IP Address", "192.0.2.1")), "db.example", False),
        (_certificate(), "db.example", False),
        ({}, "db.example", False),
    ],
)
def test_whose_a_certificate_is(certificate: dict[str, Any], host: str, fits: bool) -> None:
    assert is_for(certificate, host) is fits


def test_what_is_said_of_a_certificate_is_one_line_and_no_longer_than_needed() -> None:
    certificate = _certificate(("DNS", "evil\nname"), ("DNS", "x" * 500), common="\x1b[31mred")
    said = describe(certificate | {"issuer": ((("commonName", "CA\t"),),), "notAfter": "Jan  1 00:00:00 2030 GMT"})
    assert said.isprintable()
    assert "signed by CA\\t, valid until Jan  1 00:00:00 2030 GMT" in said
    assert len(said) < 300


def test_a_certificate_with_its_key(authority: Authority, context: ssl.SSLContext) -> None:
    pair = authority.issue("plain", "client")
    add_identity(context, pair.cert, pair.key, "", passphrase=_ASK)


def test_a_key_with_a_passphrase(
    authority: Authority, context: ssl.SSLContext, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nobody is asked for it on the terminal, and it is never shown."""
    pair = authority.issue("locked", "client", password=KEY_PASSWORD)
    add_identity(context, pair.cert, pair.key, KEY_PASSWORD, passphrase=_ASK)
    for password, why in (
        ("", "it is encrypted"),
        ("S3CRET", "its passphrase is another one"),
        ("S3CRET" * 999, "its p"),
    ):
        with pytest.raises(
            CertificateError, match=rf"private key {pair.key} can't be used: {why}.*: {_ASK}$"
        ) as raised:
            add_identity(context, pair.cert, pair.key, password, passphrase=_ASK)
        assert "S3CRET" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("form", [serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL])
def test_a_key_in_der_form(
    authority: Authority, context: ssl.SSLContext, form: serialization.PrivateFormat, tmp_path: Path
) -> None:
    pair = authority.issue("der", "client")
    key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
    path = tmp_path / "key.der"
    path.write_bytes(key.private_bytes(serialization.Encoding.DER, form, serialization.NoEncryption()))
    path.chmod(0o600)
    add_identity(context, pair.cert, path, "", passphrase=_ASK)


@pytest.mark.parametrize(
    ("mode", "owner", "fits"),
    [
        (0o600, 0, True),
        (0o400, 0, True),
        (0o640, 0, True),
        (0o440, 0, True),
        (0o660, 0, False),
        (0o650, 0, False),
        (0o604, 0, False),
        (0o600, 65534, True),
        (0o640, 65534, False),
        (0o610, 65534, False),
    ],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_key_that_others_may_have_is_not_used(
    authority: Authority, context: ssl.SSLContext, mode: int, owner: int, fits: bool
) -> None:
    """By libpq's rule: of one that is root's, a group may read it, as Debian's ``ssl-cert`` does."""
    pair = authority.issue(f"mode-{mode:o}-{owner}", "client")
    os.chown(pair.key, owner, owner)
    pair.key.chmod(mode)
    if fits:
        add_identity(context, pair.cert, pair.key, "", passphrase=_ASK)
    else:
        with pytest.raises(
            CertificateError, match=f"the private key {pair.key} may be known to other users: set its mode to"
        ):
            add_identity(context, pair.cert, pair.key, "", passphrase=_ASK)


def test_another_ones_key(authority: Authority, context: ssl.SSLContext) -> None:
    mine, other = authority.issue("mine", "client"), authority.issue("other", "client")
    with pytest.raises(CertificateError, match=f"{other.key} isn't that of the certificate {mine.cert}"):
        add_identity(context, mine.cert, other.key, "", passphrase=_ASK)


@pytest.mark.parametrize("content", [b"", b"hello", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_or_key(
    authority: Authority, context: ssl.SSLContext, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "no.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    pair = authority.issue("a", "client")
    with pytest.raises(CertificateError, match=f"{path} holds no certificate in PEM form"):
        add_roots(context, path)
    with pytest.raises(CertificateError, match=f"{path} holds no certificate in PEM form"):
        add_identity(context, path, pair.key, "", passphrase=_ASK)
    with pytest.raises(CertificateError, match=f"{path} holds no private key"):
        add_identity(context, pair.cert, path, "", passphrase=_ASK)
    with pytest.raises(CertificateError, match=rf"{path} holds no certificate revocation list \(CRL\)"):
        add_revocations(context, path)


def test_what_can_not_be_read(authority: Authority, context: ssl.SSLContext, tmp_path: Path) -> None:
    """Nothing waits for the other end of a FIFO."""
    pair, missing, fifo = authority.issue("b", "client"), tmp_path / "missing", tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    with pytest.raises(CertificateError, match=f"the root certificates in {missing} can't be read: No such file"):
        add_roots(context, missing)
    with pytest.raises(CertificateError, match=f"the private key in {missing} can't be read: No such file"):
        add_identity(context, pair.cert, missing, "", passphrase=_ASK)
    with pytest.raises(CertificateError, match=f"the private key in {fifo} can't be read: it is not a regular file"):
        add_identity(context, pair.cert, fifo, "", passphrase=_ASK)
    with pytest.raises(CertificateError, match=f"the certificate in {tmp_path} can't be read: it is not a regular"):
        add_identity(context, tmp_path, pair.key, "", passphrase=_ASK)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_whom_to_trust_only_root_and_the_guards_user_may_say(
    authority: Authority, context: ssl.SSLContext, tmp_path: Path
) -> None:
    path = tmp_path / "root.crt"
    path.write_bytes(authority.cert.read_bytes())
    add_roots(context, path)
    path.chmod(0o666)
    with pytest.raises(
        CertificateError, match=f"the root certificates in {path} aren't used: anybody can write to it: "
    ):
        add_roots(context, path)
    path.chmod(stat.S_IRUSR)
    os.chown(path, 65534, 65534)
    with pytest.raises(
        CertificateError, match=f"{path} aren't used: it belongs to user nobody: make root or the guard"
    ):
        add_roots(context, path)


def test_lists_of_revocations_of_a_directory(authority: Authority, context: ssl.SSLContext, tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match=f"no certificate revocation list in the directory {tmp_path} .*rehash"):
        add_revocations_of(context, tmp_path)
    (tmp_path / "README").write_text("not one")
    (tmp_path / "0123abcd.r0").write_bytes(authority.revoke("some.crl").read_bytes())
    assert not context.verify_flags & ssl.VERIFY_CRL_CHECK_CHAIN
    add_revocations_of(context, tmp_path)
    assert context.verify_flags & ssl.VERIFY_CRL_CHECK_CHAIN
    assert context.cert_store_stats()["crl"] == 1
    with pytest.raises(CertificateError, match="the directory /nowhere can't be read: No such file"):
        add_revocations_of(context, Path("/nowhere"))
