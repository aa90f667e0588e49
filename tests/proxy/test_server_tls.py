"""TLS to the server: what a connection string says of it, by libpq's rules, and what is read at the start."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from pgguard.proxy.addresses import TcpAddress, parse_upstream
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.server_tls import ServerTls, SslMode, TlsSettings
from tests.servers import free_port, not_installed
from tests.tls.certificates import KEY_PASSWORD, Authority

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home directory with libpq's directory in it, and nothing in that."""
    for name in os.environ:
        if name.startswith("PG"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".postgresql").mkdir()
    return tmp_path / ".postgresql"


def _tls(conninfo: str) -> ServerTls:
    tls = parse_upstream(f"host=db.example {conninfo}").tls
    assert tls is not None
    return tls


def test_the_defaults_are_libpqs() -> None:
    tls = _tls("")
    assert tls.settings == TlsSettings(SslMode.PREFER)
    assert not tls.verifies
    assert parse_upstream("host=db.example sslmode=disable").tls is None


@pytest.mark.parametrize(
    "upstream", ["host=/run/pg sslmode=verify-full", "host=@pg sslrootcert=/nowhere sslmode=require"]
)
def test_there_is_no_tls_on_a_unix_socket(upstream: str) -> None:
    """As in libpq: nothing that it would take is looked for either."""
    assert parse_upstream(upstream).tls is None


@pytest.mark.parametrize(
    ("mode", "methods"),
    [
        ("allow", (False, True)),
        ("prefer", (True, False)),
        ("require", (True,)),
        ("verify-ca", (True,)),
        ("verify-full", (True,)),
    ],
)
def test_what_is_tried_first(mode: str, methods: tuple[bool, ...], home: Path, authority: Authority) -> None:
    shutil.copy(authority.cert, home / "root.crt")
    assert _tls(f"sslmode={mode}").settings.methods == methods


def test_variables_and_services_stand_behind_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PGSSLMODE", "require")
    monkeypatch.setenv("PGSSLNEGOTIATION", "direct")
    monkeypatch.setenv("PGSSLMINPROTOCOLVERSION", "TLSv1.3")
    monkeypatch.setenv("PGSSLSNI", "0")
    monkeypatch.setenv("PGREQUIREPEER", "postgres")
    settings = _tls("").settings
    assert settings == TlsSettings(SslMode.REQUIRE, is_direct=True, names_host=False, least=ssl.TLSVersion.TLSv1_3)
    assert parse_upstream("").peer == "postgres"
    assert _tls("sslmode=prefer sslnegotiation=postgres sslsni=1").settings.mode is SslMode.PREFER
    monkeypatch.delenv("PGSSLNEGOTIATION")
    (tmp_path / "services").write_text("[app]\nsslmode=prefer\nssl_max_protocol_version=tlsv1.3\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    assert _tls("service=app").settings.mode is SslMode.PREFER
    assert _tls("service=app").settings.most is ssl.TLSVersion.TLSv1_3


def test_the_systems_roots_check_the_name_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the default there, wherever the roots are named; somebody else's default isn't."""
    assert _tls("sslrootcert=system").settings.mode is SslMode.VERIFY_FULL
    monkeypatch.setenv("PGSSLROOTCERT", "system")
    assert _tls("").settings.mode is SslMode.VERIFY_FULL
    assert _tls("sslrootcert=''").settings.mode is SslMode.PREFER
    assert os.environ["PGSSLROOTCERT"] == "system"
    monkeypatch.setenv("PGSSLMODE", "verify-ca")
    with pytest.raises(ConfigurationError, match="sslmode=verify-ca is too weak for sslrootcert=system"):
        _tls("")


@pytest.mark.parametrize(
    ("conninfo", "says"),
    [
        ("sslmode=on", "there is no such sslmode: use disable, allow, prefer, require, verify-ca or verify-full"),
        ("sslmode=REQUIRE", "there is no such sslmode: use disable,"),
        ("sslmode=tlsv1.2", "there is no such sslmode: use disable,"),
        ("sslnegotiation=fast", "there is no such sslnegotiation: use postgres or direct"),
        ("sslcertmode=maybe", "there is no such sslcertmode: use allow, disable or require"),
        ("ssl_min_protocol_version=SSLv3", "there is no such ssl_min_protocol_version: use TLSv1, TLSv1.1,"),
        ("ssl_max_protocol_version=TLSv1.1", "ssl_max_protocol_version is older than ssl_min_protocol_version"),
        ("sslrootcert=system sslmode=require", "sslmode=require is too weak for sslrootcert=system"),
        ("sslnegotiation=direct", "sslmode=prefer is too weak for sslnegotiation=direct: use sslmode=require"),
        ("gssencmode=require", "use gssencmode=disable"),
        (
            "sslmode=verify-ca",
            "needs root certificates, and HOME/root.crt does not exist: name their file as sslrootcert=",
        ),
        ("sslmode=verify-full", "or use sslrootcert=system with sslmode=verify-full"),
        ("sslrootcert=/nowhere", "the root certificates in /nowhere can't be read: No such file or directory"),
        ("sslcert=/nowhere", "the certificate in /nowhere can't be read: No such file or directory"),
        ("sslcert=CERT", "the private key in HOME/postgresql.key can't be read: No such file or directory"),
        ("sslcert=CERT sslkey=pkcs11:x", "sslkey names an OpenSSL engine"),
        ("sslcert=CERT sslkey=LOCKED", "private key LOCKED can't be used: it is encrypted: set its passphrase as"),
        ("sslcert=CERT sslkey=LOCKED sslpassword=S3CRET", "its passphrase is another one"),
        ("sslrootcert=ROOT sslcrl=/nowhere", "the revoked certificates in /nowhere can't be read"),
        ("sslrootcert=ROOT sslcrl=ROOT", "ROOT holds no certificate revocation list"),
        ("sslrootcert=ROOT sslcrldir=/nowhere", "the directory /nowhere can't be read"),
        ("sslcertmode=require", "sslcertmode=require needs a certificate to show: name it as sslcert=PATH"),
        ("hostaddr=192.0.2.1 host='' sslmode=verify-full sslrootcert=ROOT", "give its name, too, as host=NAME"),
    ],
)
def test_what_can_not_be_is_an_error_at_the_start(conninfo: str, says: str, home: Path, authority: Authority) -> None:
    pair, locked = authority.issue("client", "client"), authority.issue("locked", "client", password=KEY_PASSWORD)
    paths = {"CERT": pair.cert, "LOCKED": locked.key, "ROOT": authority.cert, "HOME": home}
    for name, path in paths.items():
        conninfo, says = conninfo.replace(name, str(path)), says.replace(name, str(path))
    with pytest.raises(ConfigurationError) as raised:
        parse_upstream(f"host=db.example {conninfo}")
    said = str(raised.value)
    assert said.startswith("--upstream: ")
    assert says in said
    assert "\n" not in said
    assert "S3CRET" not in said


def test_without_tls_nothing_is_read() -> None:
    assert parse_upstream("host=db.example sslmode=disable sslrootcert=/nowhere sslcert=/nowhere").tls is None


@pytest.mark.parametrize("mode", ["allow", "prefer", "require"])
def test_libpqs_default_files_are_used_if_they_are_there(mode: str, home: Path, authority: Authority) -> None:
    """So ``require`` checks the certificate as ``verify-ca`` does, where somebody has put a root certificate."""
    assert not _tls(f"sslmode={mode}").verifies
    shutil.copy(authority.cert, home / "root.crt")
    assert _tls(f"sslmode={mode}").verifies
    assert _tls(f"sslmode={mode}").read_again().context.cert_store_stats() == {"crl": 0, "x509": 1, "x509_ca": 1}
    shutil.copy(authority.revoke("none.crl"), home / "root.crl")
    assert _tls(f"sslmode={mode}").read_again().context.cert_store_stats()["crl"] == 1
    assert not _tls(f"sslmode={mode}").read_again().shows
    pair = authority.issue("own", "client")
    shutil.copy(pair.cert, home / "postgresql.crt")
    with pytest.raises(ConfigurationError, match=f"the private key in {home}/postgresql.key can't be read: No such"):
        _tls(f"sslmode={mode}")
    assert not _tls(f"sslmode={mode} sslcertmode=disable").read_again().shows
    shutil.copy(pair.key, home / "postgresql.key")
    assert _tls(f"sslmode={mode}").read_again().shows
    (home / "root.crt").write_text("nonsense")
    with pytest.raises(ConfigurationError, match=f"{home}/root.crt holds no certificate in PEM form"):
        _tls(f"sslmode={mode}")


def test_a_passphrase_is_not_shown(authority: Authority) -> None:
    locked = authority.issue("shown", "client", password=KEY_PASSWORD)
    upstream = parse_upstream(f"host=db.example sslcert={locked.cert} sslkey={locked.key} sslpassword='{KEY_PASSWORD}'")
    assert upstream.tls is not None
    assert KEY_PASSWORD not in repr((upstream, upstream.tls, upstream.tls.settings)) + str(upstream)


def test_what_a_url_says_of_tls_is_kept(authority: Authority) -> None:
    """Also by other libraries, in their words, and with a passphrase."""
    locked = authority.issue("url", "client", password=KEY_PASSWORD)
    files = f"sslcert={locked.cert}&sslkey={locked.key}&sslrootcert={authority.cert}"
    url = f"jdbc:postgresql://db.example/app?ssl=true&{files}&sslpassword={KEY_PASSWORD.replace(' ', '%20')}"
    tls = parse_upstream(url).tls
    assert tls is not None
    assert (tls.settings.mode, tls.verifies, tls.read_again().shows) == (SslMode.REQUIRE, True, True)
    for said, mode in (
        ("ssl=verify-full&sslrootcert=system", SslMode.VERIFY_FULL),
        ("ssl=false", SslMode.PREFER),
        ("ssl=true&sslmode=prefer", SslMode.PREFER),
        ("sslmode=no-verify", SslMode.REQUIRE),
    ):
        tls = parse_upstream(f"postgresql+asyncpg://db.example/app?{said}").tls
        assert tls is not None
        assert tls.settings.mode is mode, said


def test_the_name_is_the_hosts_also_beside_its_number() -> None:
    [address] = parse_upstream("host=db.example hostaddr=192.0.2.7").addresses
    assert isinstance(address, TcpAddress)
    assert (str(address), address.certified_name) == ("192.0.2.7:5432", "db.example")
    [address] = parse_upstream("hostaddr=192.0.2.7").addresses
    assert isinstance(address, TcpAddress)
    assert address.certified_name == ""
    [address] = parse_upstream("host=192.0.2.7").addresses
    assert isinstance(address, TcpAddress)
    assert address.certified_name == "192.0.2.7"


@pytest.mark.parametrize(
    ("host", "told"),
    [("db.example", "db.example"), ("192.0.2.7", None), ("1.2.3", None), ("::1", None), ("", None)],
)
def test_names_alone_are_told(host: str, told: str | None) -> None:
    """As ``initialize_SSL()`` does: server name indication is not for addresses."""
    address = TcpAddress("192.0.2.7", 5432, named=host)
    tls = _tls("")
    assert tls.begin(address).tls.ssl_object.server_hostname == told
    assert _tls("sslsni=0").begin(address).tls.ssl_object.server_hostname is None


def test_what_was_read_is_kept_until_it_is_said_to_go_by_what_there_is_now(home: Path, authority: Authority) -> None:
    tls = _tls("")
    shutil.copy(authority.cert, home / "root.crt")
    loaded = tls.read_again()
    before = tls.certainty
    tls.follow(loaded)
    assert (before, tls.certainty) == ("its certificate is not verified", "its certificate is verified")
    (home / "root.crt").write_text("nonsense")
    with pytest.raises(ConfigurationError, match="holds no certificate"):
        tls.read_again()
    assert tls.verifies


@pytest.mark.parametrize("version", ["TLSv1", "tlsv1.1"])
def test_old_versions_can_be_asked_for(version: str) -> None:
    context = _tls(f"ssl_min_protocol_version={version} ssl_max_protocol_version=TLSv1.2").read_again().context
    assert context.minimum_version < ssl.TLSVersion.TLSv1_2 == context.maximum_version


def test_what_is_not_used_is_said() -> None:
    assert (
        parse_upstream("host=db.example sslkeylogfile=/tmp/keys").remark == "--upstream: pgguard ignores sslkeylogfile"
    )
    assert parse_upstream("host=db.example sslcompression=1").remark is None


def test_nothing_is_lost_while_a_server_asks_for_new_keys(tmp_path: Path, authority: Authority) -> None:
    """Whoever renegotiates can send nothing meanwhile. OpenSSL's server asks for it; Python's can't."""
    if shutil.which("openssl") is None:
        not_installed("openssl")
    pair = authority.issue("renegotiating", "localhost", ["localhost"])
    port = free_port()
    command = ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-cert", str(pair.cert), "-key", str(pair.key)]
    heard = tmp_path / "heard"
    with heard.open("wb") as file:
        server = subprocess.Popen([*command, "-tls1_2"], stdin=subprocess.PIPE, stdout=file)
    with server, contextlib.ExitStack() as stack:
        stack.callback(server.kill)
        assert server.stdin is not None
        _wait_for(heard, b"ACCEPT")
        tls = _tls(f"host=localhost hostaddr=127.0.0.1 port={port} sslmode=require")
        sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
        handshake = tls.begin(TcpAddress("localhost", port))
        sock.sendall(handshake.hear())
        while not handshake.is_done:
            sock.sendall(handshake.hear(sock.recv(65536)))
        connection = handshake.tls
        sock.sendall(connection.seal(b"before\n"))
        _wait_for(heard, b"before\n")
        server.stdin.write(b"r\n")
        server.stdin.flush()
        connection.open(sock.recv(65536))
        assert connection.failure is None
        assert connection.words()  # that it won't
        assert connection.seal(b"meanwhile\n")


def _wait_for(path: Path, said: bytes) -> None:
    deadline = time.monotonic() + 30
    while said not in path.read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.02)
