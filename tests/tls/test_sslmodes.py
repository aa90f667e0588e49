"""What becomes of libpq's connections, by its settings: directly, and through a guard.

The rule: a client can't tell a guard from a server that offers what the guard offers. The one difference is what
``pg_hba.conf`` makes of a connection, as it is the guard's that the server sees.
"""

from __future__ import annotations

import itertools
import subprocess
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from tests.tls.servers import Outcome, outcome

if TYPE_CHECKING:
    from pathlib import Path

    from tests.servers import Address
    from tests.tls.certificates import Pair
    from tests.tls.conftest import StartTlsGuard
    from tests.tls.servers import Papers, TlsServer

MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
NEGOTIATIONS: Final = ("postgres", "direct")
SHOWN: Final = (None, "server", "misnamed", "expired", "self_signed", "strangers")
"""What a server, or a guard, shows its clients: nothing, or one of the certificates."""
UPSTREAM: Final = {True: "sslmode=require", False: "sslmode=disable"}
"""What a guard is told, by whether its connections to the server are to have TLS."""


class _Settings(NamedTuple):
    """What a client sets."""

    mode: str
    negotiation: str
    roots: str | None
    """Whom it trusts."""

    def outcome(self, address: Address, papers: Papers, user: str = "postgres") -> Outcome:
        roots = {} if self.roots is None else {"sslrootcert": getattr(papers, self.roots).cert}
        return outcome(address, sslmode=self.mode, sslnegotiation=self.negotiation, user=user, **roots)


TABLE: Final = [_Settings(*one) for one in itertools.product(MODES, NEGOTIATIONS, (None, "authority", "stranger"))]


def _pair(papers: Papers, shown: str | None) -> Pair | None:
    return None if shown is None else getattr(papers, shown)


@pytest.mark.parametrize("shown", [one for one in SHOWN if one != "expired"])
def test_clients_fare_as_with_a_server_that_offers_the_same(
    shown: str | None, reference: TlsServer, kept_guard: StartTlsGuard, papers: Papers
) -> None:
    pair = _pair(papers, shown)
    reference.show(pair)
    directly = {one: one.outcome(reference.tcp, papers) for one in TABLE}
    assert {made.is_made for made in directly.values()} == {True, False}
    for has_tls in (True, False) if shown in {None, "server"} else (True,):
        guard = kept_guard(UPSTREAM[has_tls], pair)
        guarded = {one: one.outcome(guard.tcp, papers) for one in TABLE}
        assert {made.server_tls for made in guarded.values()} == {None, has_tls}
        assert {one: (made.tls, made.said) for one, made in guarded.items()} == {
            one: (made.tls, made.said) for one, made in directly.items()
        }


@pytest.mark.parametrize("has_tls", [True, False])
def test_the_one_difference_is_whose_connection_the_server_sees(
    has_tls: bool, kept_guard: StartTlsGuard, papers: Papers
) -> None:
    for shown, one in itertools.product((None, "server"), TABLE):
        guard = kept_guard(UPSTREAM[has_tls], _pair(papers, shown))
        anybody = one.outcome(guard.tcp, papers)
        tls_only, plain_only = (one.outcome(guard.tcp, papers, user=user) for user in ("tls_only", "plain_only"))
        assert tls_only.is_made is (anybody.is_made and has_tls)
        assert plain_only.is_made is (anybody.is_made and not has_tls)
        if anybody.is_made:
            encryption = "SSL encryption" if has_tls else "no encryption"
            assert encryption in (tls_only, plain_only)[has_tls].said


@pytest.mark.parametrize("shown", [None, "server"])
def test_psql_says_the_same(
    shown: str | None, reference: TlsServer, kept_guard: StartTlsGuard, papers: Papers, tmp_path: Path
) -> None:
    reference.show(_pair(papers, shown))
    guard = kept_guard(UPSTREAM[True], _pair(papers, shown))
    for mode in MODES:
        said = set()
        for address in (reference.tcp, guard.tcp):
            environ = address.environ() | {
                "PGSSLMODE": mode,
                "PGSSLROOTCERT": str(papers.ca),
                "PGGSSENCMODE": "disable",
            }
            command: list[str | Path] = [reference.bindir / "psql", "-X", "-c", r"\conninfo", "-Atc", "SELECT 42"]
            done = subprocess.run(
                command,
                env=environ | {"HOME": str(tmp_path)},
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
            )
            said.add((done.returncode, (done.stdout + done.stderr).replace(str(address.port), "PORT")))
        assert len(said) == 1, said


def test_nothing_of_it_is_a_fault(kept_guard: StartTlsGuard, papers: Papers) -> None:
    guard = kept_guard(UPSTREAM[True], papers.server)
    _Settings("require", "postgres", None).outcome(guard.tcp, papers)
    assert [fault for fault in guard.faults() if fault["severity"] == "error"] == []
