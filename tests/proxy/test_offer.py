"""The certificate that clients are shown: which are taken, and what is said of those that aren't."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.settings import load_settings
from pgguard.secrets.text import redact
from tests.tls.certificates import Authority, Pair, self_signed

if TYPE_CHECKING:
    from pgguard.proxy.offer import Offer


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


def offered(cert: Path | str, key: Path | None = None, ca: Path | None = None) -> Offer:
    """What is offered by the settings that the command line gives."""
    settings = load_settings({"tls_cert": str(cert), "tls_key": key, "tls_ca": ca}, None)
    offer = settings.tls()
    assert offer is not None
    return offer


def refused(cert: Path | str, key: Path | None = None, ca: Path | None = None) -> str:
    with pytest.raises(ConfigurationError) as error:
        offered(cert, key, ca)
    said = str(error.value)
    assert redact(said) == said  # what to change is shown, also if a file is called private.key
    assert "\n" not in said
    return said


def test_a_certificate_and_its_key(authority: Authority) -> None:
    pair = authority.issue("server", "db.internal")
    certificate = offered(pair.cert, pair.key).certificate
    assert certificate.der == ssl.PEM_cert_to_DER_cert(pair.cert.read_text())
    assert certificate.said.startswith("the certificate of db.internal, valid until 20")
    assert certificate.context.verify_mode is ssl.CERT_NONE


def test_one_with_those_that_vouch_for_it(authority: Authority) -> None:
    pair = authority.issue("server", "db.internal")
    own = pair.cert.read_text()
    pair.cert.write_text(own + authority.cert.read_text())
    assert offered(pair.cert, pair.key).certificate.der == ssl.PEM_cert_to_DER_cert(own)


def test_one_that_names_nobody(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(x509.Name([])).serial_number(1)
    builder = builder.public_key(key.public_key()).not_valid_before(now).not_valid_after(now + datetime.timedelta(1))
    pair = Pair(tmp_path / "cert", tmp_path / "key")
    pair.cert.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    pair.key.chmod(0o600)
    assert offered(pair.cert, pair.key).certificate.said.startswith("a certificate that names nobody, valid until 20")


def test_one_that_is_not_valid_yet(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = authority.issue("server", "db.internal")
    monkeypatch.setattr("pgguard.proxy.offer.datetime", _Yesteryear)
    assert f"the certificate {pair.cert} isn't valid before 20" in refused(pair.cert, pair.key)


class _Yesteryear:
    """A clock that is wrong."""

    UTC = datetime.UTC

    class datetime:  # noqa: N801 - as it is called
        @staticmethod
        def now(_: datetime.tzinfo) -> datetime.datetime:
            return datetime.datetime(2001, 2, 3, tzinfo=datetime.UTC)


def test_one_of_pgguards_own() -> None:
    one, other = offered("self-signed").certificate, offered("self-signed").certificate
    assert one.der != other.der
    assert one.said == "a certificate of pgguard's own (self-signed)"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_key_that_others_can_read(authority: Authority, mode: int) -> None:
    """0640 is right if root owns it."""
    pair = authority.issue("private", "db.internal")
    pair.key.chmod(mode)
    if mode == 0o640 and pair.key.stat().st_uid == 0:
        offered(pair.cert, pair.key)
        return
    said = refused(pair.cert, pair.key)
    assert said == (
        f"--tls-cert: the private key {pair.key} may be known to other users: "
        "set its mode to 0600, or to 0640 if root owns it"
    )


def test_an_encrypted_key(authority: Authority) -> None:
    pair = authority.issue("private", "db.internal", password="secret")
    said = refused(pair.cert, pair.key)
    assert f"the private key {pair.key} can't be used: it is encrypted: " in said
    assert "openssl pkey" in said
    assert "secret" not in said


def test_two_that_do_not_belong_together(authority: Authority) -> None:
    pair, other = authority.issue("server", "db.internal"), authority.issue("other", "db.internal")
    said = refused(pair.cert, other.key)
    assert f"the private key {other.key} isn't that of the certificate {pair.cert}" in said


def test_an_expired_one(authority: Authority) -> None:
    pair = authority.issue("server", "db.internal", lasts=-1)
    said = refused(pair.cert, pair.key)
    assert said.startswith(f"--tls-cert: the certificate {pair.cert} has expired (20")
    assert said.endswith(" UTC): renew it")


def test_files_that_hold_something_else(authority: Authority, tmp_path: Path) -> None:
    pair = authority.issue("private", "db.internal")
    nothing = tmp_path / "nothing"
    nothing.touch(0o600)
    assert f"{nothing} holds no certificate" in refused(nothing, pair.key)
    assert f"{nothing} holds no private key" in refused(pair.cert, nothing)
    assert f"{nothing} holds no certificate" in refused(pair.cert, pair.key, nothing)
    assert "No such file" in refused(tmp_path / "nowhere", pair.key)
    assert "not a regular file" in refused(tmp_path, pair.key)


def test_one_without_the_other(authority: Authority) -> None:
    pair = authority.issue("private", "db.internal")
    assert "--tls-key is missing" in refused(pair.cert)
    assert "makes a key: leave it out" in refused("self-signed", pair.key)
    for given in ({"tls_key": pair.key}, {"tls_ca": authority.cert}):
        with pytest.raises(ConfigurationError, match="--tls-cert is missing"):
            load_settings(given, None).tls()
    assert load_settings({}, None).tls() is None


def test_over_unix_sockets_alone_there_is_none(tmp_path: Path) -> None:
    settings = load_settings({"tls_cert": "self-signed", "listen": [f"unix:{tmp_path}"]}, None)
    assert settings.tls() is None
    assert settings.tls_remark is not None
    assert load_settings({"tls_cert": "self-signed"}, None).tls_remark is None


def test_a_renewed_one(authority: Authority) -> None:
    pair = authority.issue("server", "before")
    offer = offered(pair.cert, pair.key)
    first = offer.certificate
    same = offer.read_again()
    assert same is not None
    assert not offer.show(same)
    pair.key.write_text("torn")
    with pytest.raises(ConfigurationError, match="holds no private key"):
        offer.read_again()
    assert offer.certificate.der == first.der
    authority.issue("server", "after")
    other = offer.read_again()
    assert other is not None
    assert offer.show(other)
    assert offer.certificate.said.startswith("the certificate of after, ")
    assert offered("self-signed").read_again() is None


def handshake(offer: Offer, client: ssl.SSLContext) -> ssl.SSLObject:
    """The client's side of a handshake in memory, when both sides have ended it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server_side = offer.certificate.context.wrap_bio(to_server, to_client, server_side=True)
    client_side = client.wrap_bio(to_client, to_server, server_hostname="db.internal")
    done: set[ssl.SSLObject] = set()
    while len(done) < 2:
        for side in (client_side, server_side):
            try:
                side.do_handshake()
                done.add(side)
            except ssl.SSLWantReadError:
                pass
    return client_side


def trusting(authority: Authority | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if authority is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context.load_verify_locations(authority.cert)
    return context


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_what_clients_get(authority: Authority, version: ssl.TLSVersion) -> None:
    pair = authority.issue("server", "db.internal", ("db.internal",))
    client = trusting(authority)
    client.minimum_version = client.maximum_version = version
    client.set_alpn_protocols(["http/1.1", "postgresql"])
    found = handshake(offered(pair.cert, pair.key), client)
    assert found.selected_alpn_protocol() == "postgresql"
    assert found.version() == version.name.replace("_", ".")
    assert found.getpeercert(binary_form=True) == ssl.PEM_cert_to_DER_cert(pair.cert.read_text())
    assert found.session is None or not found.session.has_ticket


def test_older_versions_are_refused() -> None:
    client = trusting(None)
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        client.minimum_version = ssl.TLSVersion.TLSv1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        client.maximum_version = ssl.TLSVersion.TLSv1_1
    client.set_ciphers("DEFAULT:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError, match=r"UNSUPPORTED_PROTOCOL|NO_PROTOCOLS"):
        handshake(offered("self-signed"), client)


def test_clients_are_asked_for_certificates(authority: Authority, tmp_path: Path) -> None:
    offer = offered("self-signed", ca=authority.cert)
    handshake(offer, trusting(None))  # who has none needs none
    for pair, is_taken in (
        (authority.issue("client", "somebody"), True),
        (authority.issue("late", "somebody", lasts=-1), False),
        (self_signed(tmp_path, "stranger", "somebody", ()), False),
    ):
        assert _is_taken(offer, pair) is is_taken


def _is_taken(offer: Offer, pair: Pair) -> bool:
    client = trusting(None)
    client.load_cert_chain(pair.cert, pair.key)
    try:
        handshake(offer, client)
    except ssl.SSLCertVerificationError:
        return False
    return True
