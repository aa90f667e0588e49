"""What all scenarios share: the contenders, started, and the loads that are put on them."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import psycopg

from pgguard.demo.postgres import running_cluster
from tests.benchmarks import programs
from tests.benchmarks.clock import Cost, cost
from tests.benchmarks.programs import CannotMeasureError, Contender, Guard, Hops, Place
from tests.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.benchmarks.table import Results

AGAIN = " again"
"""What the name of the first guard ends with where it is measured a second time."""
Protocol = Literal["simple", "prepared"]
SQL = "SELECT abalance FROM pgbench_accounts WHERE aid = 1"
_PATIENCE = 60
"""Seconds that a load may take longer than it was told to."""


@dataclass(frozen=True, slots=True)
class Answers:
    """What clients got that ask one request after the other."""

    count: int
    seconds: float
    median: float
    """Latency in microseconds."""
    p99: float
    cost: Cost
    """Of what stands in between; of nothing, nothing."""

    @property
    def rate(self) -> float:
        return self.count / self.seconds


@dataclass(frozen=True, slots=True)
class Second:
    """What pgbench has done in about a second."""

    transactions: float
    seconds: float
    latency: float
    """In microseconds, the mean."""
    cost: Cost

    @property
    def rate(self) -> float:
        return self.transactions / self.seconds


@dataclass(frozen=True, slots=True)
class Holder:
    """A program that holds idle sessions, see ``client.c``: as many processes as do, each with some of them."""

    process: subprocess.Popen[str]
    count: int
    contender: Contender

    def begin(self) -> None:
        """Open them, and ask in each."""
        self._order()

    def ask_again(self) -> None:
        """Ask in each, and see that it answers as it did."""
        self._order()

    def _order(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answered = self.process.stdout.readline().strip()
        if answered != str(self.count):
            said = f"{self.contender.name}: {answered or 'none'} of {self.count} sessions answer"
            raise CannotMeasureError(f"{said}\n{self.contender.complaint()}")


@dataclass(frozen=True, slots=True)
class Bench:
    """How, and what, is measured."""

    results: Results
    guards: Sequence[Guard]
    peers: bool
    """pgbouncer and HAProxy are measured too."""
    control: bool
    """The first guard is measured twice."""
    rounds: int
    starts: int
    """How often idle sessions are opened, by each contender."""
    seconds: float
    """Of each round, for each contender."""
    hops: Sequence[Hops]
    protocols: Sequence[Protocol]
    clients: Sequence[int]
    """Numbers of clients that ask at once."""
    sessions: Sequence[int]
    """Numbers of idle sessions."""
    busy: int
    """Sessions that ask beside a crowd of idle ones."""
    settle: float
    """Seconds from when sessions have been opened until they are called idle."""
    directory: Path
    bindir: Path
    """Of PostgreSQL's programs."""
    client: str
    server: str
    """The two load programs."""

    @property
    def names(self) -> list[str]:
        """All contenders, in the order in which they are shown."""
        peers = ["pgbouncer", "HAProxy"] if self.peers else []
        return ["direct", *peers, *(guard.title for guard in self.guards), *self.twins]

    @property
    def few_clients(self) -> list[int]:
        """Of these numbers those that don't mean a crowd."""
        return [count for count in self.clients if count <= 16]

    @property
    def twins(self) -> list[str]:
        return [self.guards[0].title + AGAIN] if self.control and self.guards else []

    @contextmanager
    def contender(self, name: str, upstream: Place, hops: Hops, *, sessions: int = programs.FEW) -> Iterator[Contender]:
        """Run one of them in front of a server."""
        with ExitStack() as stack:
            if name == "direct":
                yield Contender(name, None, upstream)
            elif name == "pgbouncer":
                yield stack.enter_context(
                    programs.pgbouncer(upstream, hops, self.client, self.directory, sessions=sessions)
                )
            elif name == "HAProxy":
                yield stack.enter_context(
                    programs.haproxy(upstream, hops, self.client, self.directory, sessions=sessions)
                )
            else:
                [guard] = [one for one in self.guards if one.title == name.removesuffix(AGAIN)]
                running = programs.guard(guard, upstream, hops, self.client, self.directory, name=name)
                yield stack.enter_context(running)

    @contextmanager
    def contenders(self, upstream: Place, hops: Hops, *, direct: bool = False) -> Iterator[list[Contender]]:
        """Run all of them that there are, at once: what nobody uses costs the others nothing."""
        with ExitStack() as stack:
            names = self.names[0 if direct else 1 :]
            if hops == "tls":
                names = [name for name in names if name != "HAProxy"]  # which can't have it
            yield [stack.enter_context(self.contender(name, upstream, hops)) for name in names]

    def turns(self, contenders: Sequence[Contender]) -> Iterator[Contender]:
        """Each contender once a round; each round begins with another one."""
        for number in range(self.rounds):
            at = number % len(contenders)
            yield from (*contenders[at:], *contenders[:at])

    @contextmanager
    def postgresql(self) -> Iterator[Place]:
        """A real server with pgbench's tables, which fit into its memory. It offers TLS."""
        shown = programs.certificate(self.directory, of_nobody=True)
        settings = {"listen_addresses": "127.0.0.1", "max_connections": "500", "shared_buffers": "128MB"}
        settings |= {"ssl": "on", "ssl_cert_file": str(shown.cert), "ssl_key_file": str(shown.key)}
        with running_cluster(self.bindir, port=free_port(), settings=settings, timeout=60) as cluster:
            place = Place(cluster.socket_dir, cluster.port)
            self._run([*self._pgbench(place, "unix"), "-i", "-q", "-s", "5"])
            yield place

    @contextmanager
    def fake_server(self) -> Iterator[Place]:
        with programs.fake_server(self.server, self.directory) as place:
            yield place

    def ask(self, contender: Contender, hops: Hops, clients: int, protocol: Protocol) -> Answers:
        """Have the load program's clients ask."""
        arguments = ["ask", str(clients), str(self.seconds), protocol, SQL]
        said, spent = self._measured(contender, hops, arguments)
        count, seconds, median, p99, _ = map(float, said.split())
        return Answers(int(count), seconds, median, p99, spent)

    def bytes(self, contender: Contender, hops: Hops, *arguments: str) -> tuple[float, float, Cost]:
        """Have the load program move rows: how many MB, in how many seconds, and what it cost."""
        said, spent = self._measured(contender, hops, list(arguments))
        count, seconds = map(float, said.split())
        return count / 1e6, seconds, spent

    def pgbench(self, contender: Contender, hops: Hops, clients: int, protocol: Protocol) -> list[Second]:
        """Run pgbench, which looks rows up; what comes of each second but the first, whose beginning is missed."""
        command = [*self._pgbench(contender.place, hops), "-n", "-S", "-M", protocol, "-c", str(clients), "-P", "1"]
        command += ["-T", str(self._whole_seconds + 1)]
        slices: list[Second] = []
        last: tuple[float, Cost] | None = None
        with subprocess.Popen(
            command, env=programs.environment(hops), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            complaints = []
            for line in process.stderr:
                if not line.startswith("progress: "):
                    complaints.append(line)
                    continue
                at = time.monotonic(), self._cost(contender)
                if last is not None:
                    words = line.split()
                    seconds = at[0] - last[0]
                    slices.append(Second(float(words[3]) * seconds, seconds, float(words[6]) * 1000, at[1] - last[1]))
                last = at
            process.stdout.read()
        if process.returncode:
            raise CannotMeasureError(f"pgbench fails: {''.join(complaints)}{contender.complaint()}")
        return slices

    def connections(self, contender: Contender, hops: Hops) -> tuple[int, Cost]:
        """Have pgbench connect for each transaction: how often it did, and what that cost."""
        before = self._cost(contender)
        command = [*self._pgbench(contender.place, hops), "-n", "-S", "-C", "-c", "1", "-T", str(self._whole_seconds)]
        said = self._run(command, hops=hops)
        count = next(line.split()[-1] for line in said.splitlines() if "actually processed" in line)
        return int(count.partition("/")[0]), self._cost(contender) - before

    def come(self, contender: Contender, hops: Hops) -> tuple[int, Cost]:
        """Have the load program's clients come one after the other: how many did, and what that cost."""
        said, spent = self._measured(contender, hops, ["come", str(self.seconds), SQL])
        return int(said), spent

    @contextmanager
    def hold(self, contender: Contender, hops: Hops, count: int) -> Iterator[Holder]:
        """Prepare to open idle sessions, a hundred by each process."""
        processes = max(1, count // 100)
        command = [self.client, contender.place.address(hops), "hold", str(count), str(processes)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            yield Holder(process, count, contender)

    def copy_out(self, contender: Contender, query: str) -> Cost:
        """Have psql copy what a query yields, through TLS, and throw it away."""
        before = self._cost(contender)
        place = contender.place
        command = [str(self.bindir / "psql"), "-X", "-h", place.host("tls"), "-p", str(place.port), "-U", "postgres"]
        self._run([*command, "-o", os.devnull, "-c", f"COPY ({query}) TO STDOUT", "postgres"], contender, hops="tls")
        return self._cost(contender) - before

    @contextmanager
    def sessions_with_tls(self, contender: Contender, count: int) -> Iterator[None]:
        """Open idle sessions that have TLS, and have asked something."""
        place = contender.place
        with ExitStack() as stack:
            for _ in range(count):
                connection = psycopg.connect(
                    host=place.host("tls"), port=place.port, user="postgres", sslmode="require", autocommit=True
                )
                stack.enter_context(connection)
                connection.execute(SQL.encode())
            yield

    def execute(self, place: Place, sql: str) -> None:
        """Have the server itself do something."""
        with psycopg.connect(host=place.host("unix"), port=place.port, user="postgres", autocommit=True) as connection:
            connection.execute(sql.encode())

    @property
    def _whole_seconds(self) -> int:
        """As pgbench takes them."""
        return max(1, round(self.seconds))

    def _cost(self, contender: Contender) -> Cost:
        return Cost(0, 0, 0) if contender.pid is None else cost(contender.pid)

    def _measured(self, contender: Contender, hops: Hops, arguments: list[str]) -> tuple[str, Cost]:
        before = self._cost(contender)
        said = self._run([self.client, contender.place.address(hops), *arguments], contender)
        return said, self._cost(contender) - before

    def _pgbench(self, place: Place, hops: Hops) -> list[str]:
        program = self.bindir / "pgbench"
        if not program.exists():
            raise CannotMeasureError(f"{program} is needed, and not installed: apt-get install postgresql-contrib")
        return [str(program), "-h", place.host(hops), "-p", str(place.port), "-U", "postgres", "postgres"]

    def _run(self, command: Sequence[str], contender: Contender | None = None, *, hops: Hops = "tcp") -> str:
        environment = programs.environment(hops)
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=self.seconds + _PATIENCE
        )
        if done.returncode:
            said = "" if contender is None else contender.complaint()
            raise CannotMeasureError(f"{os.path.basename(command[0])} fails: {done.stderr}{said}")  # noqa: PTH119
        return done.stdout


@contextmanager
def one_core() -> Iterator[None]:
    """Run on one processor, with everything that is started meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
