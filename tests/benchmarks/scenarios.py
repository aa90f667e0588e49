"""What is measured: each scenario fills rows of the table."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from tests.benchmarks.bench import one_core
from tests.benchmarks.clock import cost, memory
from tests.benchmarks.programs import room_for_sessions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tests.benchmarks.bench import Answers, Bench, Holder, Protocol
    from tests.benchmarks.clock import Cost
    from tests.benchmarks.programs import Contender, Hops, Place

_BULK: Final = {
    "SELECT, rows of 20 bytes": ("rows", "SELECT 123456789 FROM generate_series(1, 200000)"),
    "COPY out, rows of 20 bytes": ("rows", "COPY (SELECT 12345678901234 FROM generate_series(1, 200000)) TO STDOUT"),
    "COPY in, rows of 20 bytes, one a message": ("copy", "15", "15", "COPY bench_sink FROM STDIN WHERE false"),
    "COPY in, rows of 20 bytes, 8 kB a message": ("copy", "8192", "20", "COPY bench_sink FROM STDIN WHERE false"),
    "COPY out, rows of 1 kB": ("rows", "COPY (SELECT repeat('x', 1000) FROM generate_series(1, 20000)) TO STDOUT"),
    "COPY in, rows of 1 kB": ("copy", "1000", "1000", "COPY bench_sink FROM STDIN WHERE false"),
    "SELECT, rows of 32 kB": ("rows", "SELECT repeat('x', 32000) FROM generate_series(1, 1000)"),
}
"""By what they are called: arguments of the load program, to which the seconds are added. Where each row is a
message, its size is the message's. What is copied in, the server reads and throws away. psql sends 8 kB a message; who
hands libpq row by row (Ruby's put_copy_data, PHP's pg_put_line) sends a message for each."""
_COPIED: Final = "SELECT repeat('x', 1000) FROM generate_series(1, 50000)"
_COPIED_MEGABYTES: Final = 50
_ENCRYPTED: Final = 200
"""Idle sessions with TLS: of each there is a process of PostgreSQL's."""
_AT_REST: Final = 5
"""How often what idle sessions cost is read."""
_REST_GOALS: Final = {2_000: 5.0, 10_000: 10.0}
"""Milliseconds of processor time a second, by the number of sessions."""


def exact(bench: Bench) -> None:
    """What a transaction costs the proxy, between a client and a server that cost nothing, all on one processor."""
    with one_core(), bench.fake_server() as server:
        for hops in bench.hops:
            with bench.contenders(server, hops) as contenders:
                for clients in bench.few_clients:
                    for protocol in bench.protocols:
                        what = f"CPU a transaction, {_clients(clients)}, {protocol}{_over(hops)}"
                        row = bench.results.row("exact", what, "µs", goal=1.1 if clients == 1 else 1.15)
                        for contender in bench.turns(contenders):
                            answers = bench.ask(contender, hops, clients, protocol)
                            row.add(contender.name, answers.cost.total / answers.count)
                            if clients == 1 and hops == "tcp":
                                _add_parts(bench, "exact", what, contender, answers)


def _add_parts(bench: Bench, scenario: str, what: str, contender: Contender, answers: Answers) -> None:
    for part in ("user", "system"):
        row = bench.results.row(scenario, f"— of that {part}: {what.partition(', ')[2]}", "µs")
        row.add(contender.name, getattr(answers.cost, part) / answers.count)


def pgbench(bench: Bench) -> None:
    """What a transaction costs the proxy, and how many there are a second: pgbench -S, and a real server."""
    with bench.postgresql() as server:
        for hops in bench.hops:
            with bench.contenders(server, hops) as contenders:
                for clients in bench.clients if hops == "tcp" else bench.few_clients:
                    for protocol in bench.protocols:
                        what = f"{_clients(clients)}, {protocol}{_over(hops)}"
                        spent = bench.results.row(
                            "pgbench", f"CPU a transaction, {what}", "µs", goal=1.1 if clients == 1 else 1.15
                        )
                        rate = bench.results.row(
                            "pgbench", f"transactions a second, {what}", "1/s", more_is_better=True, goal=0.95
                        )
                        for contender in bench.turns(contenders):
                            for second in bench.pgbench(contender, hops, clients, protocol):
                                spent.add(contender.name, second.cost.total / second.transactions)
                                rate.add(contender.name, second.rate)


def latency(bench: Bench) -> None:
    """By how much a transaction takes longer than without a proxy: one client, a real server, all on one processor."""
    with one_core(), bench.postgresql() as server:
        for hops in bench.hops:
            with bench.contenders(server, hops, direct=True) as contenders:
                for protocol in bench.protocols:
                    what = f"1 client, one core, {protocol}{_over(hops)}"
                    goal = 30.0 if hops == "tcp" else None
                    added = bench.results.row("latency", f"latency added, {what}", "µs", goal=goal, absolute=True)
                    p99 = bench.results.row("latency", f"p99, {what}", "µs", goal=1.1)
                    medians: dict[str, float] = {}
                    for contender in bench.turns(contenders):
                        answers = bench.ask(contender, hops, 1, protocol)
                        p99.add(contender.name, answers.p99)
                        medians[contender.name] = answers.median
                        if len(medians) == len(contenders):
                            for name, median in medians.items():
                                added.add(name, median - medians["direct"])
                            medians.clear()


def connections(bench: Bench) -> None:
    """What a connection costs the proxy for a single transaction, with one to the server."""
    # The load program's come by the thousand a second, and the proxy finds what it takes in the processor's caches.
    # PostgreSQL makes a process for each meanwhile.
    with bench.fake_server() as server:
        _connect(bench, server, "CPU a connection of thousands a second", bench.come)
    with bench.postgresql() as server:
        _connect(bench, server, "CPU a connection, PostgreSQL", bench.connections)


def _connect(bench: Bench, server: Place, what: str, come: Callable[[Contender, Hops], tuple[int, Cost]]) -> None:
    for hops in bench.hops:
        with bench.contenders(server, hops) as contenders:
            goal = 350.0 if hops == "tcp" else None
            row = bench.results.row("connections", f"{what}{_over(hops)}", "µs", goal=goal, absolute=True)
            for contender in bench.turns(contenders):
                count, costs = come(contender, hops)
                row.add(contender.name, costs.total / count)


def bulk(bench: Bench) -> None:
    """What a megabyte costs the proxy, and how many go through it in a second: a real server."""
    with bench.postgresql() as server:
        bench.execute(server, "CREATE TABLE bench_sink (line text)")
        with bench.contenders(server, "tcp") as contenders:
            for what, (mode, *arguments) in _BULK.items():
                spent = bench.results.row("bulk", f"CPU a MB: {what}", "ms", goal=1.3)
                rate = bench.results.row("bulk", f"MB a second: {what}", "MB/s", more_is_better=True)
                for contender in bench.turns(contenders):
                    megabytes, seconds, costs = bench.bytes(contender, "tcp", mode, str(bench.seconds), *arguments)
                    spent.add(contender.name, costs.total / 1000 / megabytes)
                    rate.add(contender.name, megabytes / seconds)


def idle(bench: Bench) -> None:
    """What sessions cost the proxy that do nothing."""
    for count in bench.sessions:
        _each_alone(bench, "idle", count, busy=0)


def crowd(bench: Bench) -> None:
    """Many idle sessions and some busy ones through one proxy; none may be lost."""
    _each_alone(bench, "crowd", max(bench.sessions), busy=bench.busy)


def _each_alone(bench: Bench, scenario: str, count: int, *, busy: int) -> None:
    """Start each contender in its turn, alone: what others' idle sessions cost would be in the way."""
    goal = _REST_GOALS.get(count)
    if (room := room_for_sessions() - busy) < count:
        bench.results.remark(f"{scenario}: {room:,} idle sessions instead of {count:,}: ulimit -n allows no more")
        count = room
    bench.results.remark(
        f"{scenario}: the server is the small program of the benchmark, as PostgreSQL would need {count:,} processes"
    )
    with bench.fake_server() as server:
        for _ in range(bench.starts):
            for name in bench.names[1:]:
                with (
                    bench.contender(name, server, "tcp", sessions=count + busy + 1) as contender,
                    bench.hold(contender, "tcp", count) as holder,
                ):
                    _look_at_idle(bench, scenario, contender, holder, count, busy, goal)


def _look_at_idle(
    bench: Bench, scenario: str, contender: Contender, holder: Holder, count: int, busy: int, goal: float | None
) -> None:
    """Measure while the sessions are open, and see that each of them still answers."""
    assert contender.pid is not None
    what = f"{count:,} idle sessions" + (f" before {busy} busy ones" if busy else "")
    rest = bench.results.row(scenario, f"at rest: {what}", "ms/s", goal=goal, absolute=True)
    size = bench.results.row(scenario, f"memory an idle session, of {count:,}", "kB", goal=5, absolute=True)
    begun = bench.results.row(scenario, f"CPU a session's beginning, {count:,} at once", "µs")
    empty, before = memory(contender.pid), cost(contender.pid)
    holder.begin()
    begun.add(contender.name, (cost(contender.pid) - before).total / count)
    time.sleep(bench.settle)
    for _ in range(_AT_REST):
        at, before = time.monotonic(), cost(contender.pid)
        time.sleep(bench.seconds / 2)
        rest.add(contender.name, (cost(contender.pid) - before).total / 1000 / (time.monotonic() - at))
    size.add(contender.name, (memory(contender.pid) - empty) / count)
    if busy:
        _be_busy(bench, scenario, contender, count, busy)
    holder.ask_again()


def _be_busy(bench: Bench, scenario: str, contender: Contender, count: int, busy: int) -> None:
    what = f"{busy} busy sessions beside {count:,} idle ones"
    rate = bench.results.row(scenario, f"transactions a second, {what}", "1/s", more_is_better=True, goal=0.95)
    spent = bench.results.row(scenario, f"CPU a transaction, {what}", "µs", goal=1.15)
    p99 = bench.results.row(scenario, f"p99, {what}", "µs", goal=1.1)
    for _ in range(bench.rounds):
        answers = bench.ask(contender, "tcp", busy, "simple")
        rate.add(contender.name, answers.rate)
        spent.add(contender.name, answers.cost.total / answers.count)
        p99.add(contender.name, answers.p99)


def tls(bench: Bench) -> None:
    """All of that with TLS on both sides, which HAProxy can't have; at least as good as pgbouncer is the goal."""
    with bench.postgresql() as server:
        with bench.contenders(server, "tls") as contenders:
            for clients in bench.few_clients:
                for protocol in bench.protocols:
                    _ask_with_tls(bench, contenders, clients, protocol)
            moved = bench.results.row("tls", "CPU a MB, TLS: COPY out, rows of 1 kB", "ms", goal=1)
            for contender in bench.turns(contenders):
                moved.add(contender.name, bench.copy_out(contender, _COPIED).total / 1000 / _COPIED_MEGABYTES)
            begun = bench.results.row("tls", "CPU a connection, TLS", "µs", goal=1)
            for contender in bench.turns(contenders):
                count, costs = bench.connections(contender, "tls")
                begun.add(contender.name, costs.total / count)
            names = [contender.name for contender in contenders]
        size = bench.results.row("tls", f"memory an idle session, of {_ENCRYPTED}, TLS", "kB", goal=1)
        for name in names:
            with bench.contender(name, server, "tls") as contender:
                assert contender.pid is not None
                empty = memory(contender.pid)
                with bench.sessions_with_tls(contender, _ENCRYPTED):
                    time.sleep(bench.settle)
                    size.add(name, (memory(contender.pid) - empty) / _ENCRYPTED)


def _ask_with_tls(bench: Bench, contenders: Sequence[Contender], clients: int, protocol: Protocol) -> None:
    what = f"{_clients(clients)}, {protocol}, TLS"
    spent = bench.results.row("tls", f"CPU a transaction, {what}", "µs", goal=1)
    latency = bench.results.row("tls", f"latency, {what}", "µs", goal=1)
    rate = bench.results.row("tls", f"transactions a second, {what}", "1/s", more_is_better=True, goal=1)
    for contender in bench.turns(contenders):
        for second in bench.pgbench(contender, "tls", clients, protocol):
            spent.add(contender.name, second.cost.total / second.transactions)
            latency.add(contender.name, second.latency)
            rate.add(contender.name, second.rate)


def _clients(count: int) -> str:
    return "1 client" if count == 1 else f"{count} clients"


def _over(hops: Hops) -> str:
    return ", Unix sockets" if hops == "unix" else ""


SCENARIOS: Final[Mapping[str, Callable[[Bench], None]]] = {
    "exact": exact,
    "pgbench": pgbench,
    "latency": latency,
    "connections": connections,
    "bulk": bulk,
    "idle": idle,
    "crowd": crowd,
    "tls": tls,
}
