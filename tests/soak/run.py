"""A soak from its beginning to its end: servers, guards in front of them, and programs beside each other."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import psycopg
import trio

from tests.guard_process import GuardProcess, running_guard
from tests.servers import running_server
from tests.soak import counted_guard
from tests.soak.account import Account
from tests.soak.programs.killed import LEFT
from tests.soak.watched import Records, Sample, cpu_seconds, growth, sample
from tests.soak.workloads import Command, Kit, NotThereError, Workload

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

    from rich.console import Console

    from pgguard.faults.policy import Mode
    from tests.servers import Address, Server, Transport

_PROGRAM_SECONDS: Final = 600.0
"""How long a program may take, on a machine that is busy; then it counts as hung."""
_REST_SECONDS: Final = 90.0
"""How long a guard may take to be what it was before, when nobody uses it any more."""
_SAMPLE_SECONDS: Final = 5.0
_PROGRESS_SECONDS: Final = 60.0
_STOPPED_SECONDS: Final = 6.5
"""Longer than an answer may lie unread."""
_COMPLAINT: Final = 4000
"""Bytes that are shown of what a program has complained about."""
_TROUBLE: Final = re.compile(
    r"Traceback|had to be closed|(?:session|sends|connection|evidence|repeat|check|up) failed|could not be|"
    r"can't accept|can't append"
)
"""What the guard says only when something is wrong with itself."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done."""

    seconds: float
    seed: int
    share: float
    """Of one processor, that everything together may take."""
    at_once: int
    bulk: int
    mode: Mode
    servers: Mapping[str, Path]
    workloads: Sequence[Workload]


@dataclass(slots=True)
class Site:
    """A server, and the guard in front of it."""

    name: str
    server: Server
    guard: GuardProcess
    tasks: Path
    records: Records
    samples: list[Sample] = field(default_factory=list)

    def sample(self) -> Sample:
        return sample(self.guard.pid, self.tasks)

    @property
    def cpu_seconds(self) -> float:
        """Of the guard, and of the server with all the backends that it has had."""
        postmaster = (Path(self.server.unix.host) / "data" / "postmaster.pid").read_text().split()[0]
        return cpu_seconds(self.guard.pid) + cpu_seconds(int(postmaster), of_children=True)


def soak(plan: Plan, console: Console) -> bool:
    """Run it, and say how it went; True if all is well."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pgguard-soak-")))
        sites = [
            stack.enter_context(_site(name, bindir, directory, plan.mode, over_tcp=n % 2 == 1))
            for n, (name, bindir) in enumerate(plan.servers.items())
        ]
        kit = Kit(directory, sites[0].server.bindir, plan.bulk)
        return trio.run(_Soak(plan, sites, kit, console).run)


@contextmanager
def _site(name: str, bindir: Path, directory: Path, mode: Mode, *, over_tcp: bool) -> Iterator[Site]:
    tasks = directory / f"tasks-{name}"
    program = [sys.executable, counted_guard.__file__]
    with running_server(bindir) as server:
        upstream = server.tcp if over_tcp else server.unix
        environ = {counted_guard.VARIABLE: str(tasks)}
        with running_guard(upstream, "--mode", mode, program=program, environ=environ) as guard:
            yield Site(name, server, guard, tasks, Records(guard.records))


class _Soak:
    def __init__(self, plan: Plan, sites: Sequence[Site], kit: Kit, console: Console) -> None:
        self._plan = plan
        self._sites = sites
        self._kit = kit
        self._console = console
        self._chance = random.Random(plan.seed)
        self._workloads: list[Workload] = []
        self._account = Account(())
        self._began = 0.0
        self._cpu_before = 0.0
        self._ends = 0.0
        self._number = 0

    async def run(self) -> bool:
        self._prepare()
        self._account = Account(self._workloads)
        before = {site.name: site.sample() for site in self._sites}
        self._began = time.monotonic()
        self._cpu_before = self._cpu_seconds()
        self._ends = self._began + self._plan.seconds
        turns = self._turns()
        async with trio.open_nursery() as beside:
            beside.start_soon(self._watch)
            beside.start_soon(self._say_progress)
            with trio.move_on_after(self._plan.seconds + 2 * _PROGRAM_SECONDS) as limit:
                async with trio.open_nursery() as slots:
                    for _ in range(self._plan.at_once):
                        slots.start_soon(self._slot, turns)
            beside.cancel_scope.cancel()
        if limit.cancelled_caught:
            self._wrong("programs were still running long after time was up")
        for site in self._sites:
            await self._come_to_rest(site, before[site.name])
        return self._finish(before)

    def _prepare(self) -> None:
        """Build what has to be built, and have roles and tables ready; say which programs aren't there."""
        for workload in self._plan.workloads:
            try:
                workload.command(self._kit, 0)
            except NotThereError as missing:
                self._console.print(f"{workload.name} is left out: {missing} is not installed")
            else:
                self._workloads.append(workload)
        for site in self._sites:
            with psycopg.connect(site.server.unix.conninfo, autocommit=True) as connection:
                connection.execute(f"CREATE TABLE {LEFT} (n bigint)")
                for workload in self._workloads:
                    connection.execute(f"CREATE ROLE {workload.user} SUPERUSER LOGIN")
            # A guard is at rest when it has served a client, over each transport.
            for address in (site.guard.tcp, site.guard.unix):
                psycopg.connect(address.conninfo).close()

    # What is run when

    def _turns(self) -> Iterator[tuple[Workload, Site, Transport]]:
        """Each workload as often as its row says, in an order that the seed says, again and again."""
        first = True
        while True:
            turns: list[tuple[Workload, Site]] = []
            for workload in self._workloads:
                if not workload.once:
                    turns += [(workload, self._chance.choice(self._sites)) for _ in range(workload.turns)]
                elif first:
                    turns += [(workload, site) for site in self._sites]
            self._chance.shuffle(turns)
            for workload, site in turns:
                transport: Transport = "tcp" if workload.tcp_alone else self._chance.choice(("tcp", "unix"))
                yield workload, site, transport
            first = False

    async def _slot(self, turns: Iterator[tuple[Workload, Site, Transport]]) -> None:
        while True:
            await self._pace()
            if time.monotonic() >= self._ends:
                return
            workload, site, transport = next(turns)
            self._number += 1
            number = self._number
            where = f"{workload.name} on {site.name} over {transport}, run {number}"
            run = self._kill if workload.is_killed else self._compare
            await run(workload, site, transport, self._plan.seed * 1_000_000 + number, where)
            self._account.entries[workload.name].runs += 1

    async def _pace(self) -> None:
        """Wait until everything together has taken no more than its share."""
        while time.monotonic() < self._ends:
            taken = self._cpu_seconds() - self._cpu_before
            if taken <= self._plan.share * (time.monotonic() - self._began) + self._plan.share:
                return
            await trio.sleep(0.1)

    def _cpu_seconds(self) -> float:
        used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        own = sum(one.ru_utime + one.ru_stime for one in used)
        return own + sum(site.cpu_seconds for site in self._sites)

    # Programs

    async def _compare(self, workload: Workload, site: Site, transport: Transport, seed: int, where: str) -> None:
        """Run a program directly and through the guard, at the same time, and compare what it got."""
        command = workload.command(self._kit, seed)
        entry = self._account.entries[workload.name]
        directly, guarded = (self._kit.directory / f"{seed}-{way}" for way in ("directly", "guarded"))

        async def play_directly() -> None:
            address = site.server.at(transport)
            entry.direct_seconds += await self._play(command, workload, address, directly, f"{where}, directly")

        async def play_guarded() -> None:
            address = site.guard.at(transport)
            entry.guarded_seconds += await self._play(command, workload, address, guarded, f"{where}, guarded")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(play_directly)
            nursery.start_soon(play_guarded)
        for one, other in ((directly, guarded), (_errors(directly), _errors(guarded))):
            self._account.compare(workload, one, other, where)
            one.unlink()
            other.unlink()

    async def _play(self, command: Command, workload: Workload, address: Address, output: Path, where: str) -> float:
        """Run a program to its end; returns the seconds that it took."""
        began = time.monotonic()
        with output.open("wb") as out, _errors(output).open("w+b") as errors, tempfile.TemporaryFile() as given:
            given.write(command.stdin)
            given.seek(0)
            process = await self._start(command, workload, address, stdin=given, stdout=out, stderr=errors)
            async with _ended_with(process):
                with trio.move_on_after(_PROGRAM_SECONDS) as limit:
                    if workload.is_stopped:
                        await self._stop(process)
                    await process.wait()
            errors.seek(0)
            if limit.cancelled_caught:
                self._wrong(f"{where}: it hung")
            elif process.returncode:
                complaint = errors.read(_COMPLAINT).decode(errors="replace")
                self._wrong(f"{where}: it ended with {process.returncode}: {complaint}")
        return time.monotonic() - began

    async def _start(
        self,
        command: Command,
        workload: Workload,
        address: Address,
        *,
        stdin: IO[bytes] | int = subprocess.DEVNULL,
        stdout: IO[bytes] | int,
        stderr: IO[bytes],
    ) -> trio.Process:
        environ = address.environ() | {"PGUSER": workload.user} | command.environ
        return await trio.lowlevel.open_process(
            command.arguments,
            env=environ,
            cwd=self._kit.directory,
            start_new_session=True,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )

    async def _stop(self, process: trio.Process) -> None:
        """Stop it at some moment, for longer than an answer may lie unread."""
        with trio.move_on_after(self._chance.uniform(0.3, 2.0)):
            await process.wait()
            return
        process.send_signal(signal.SIGSTOP)
        await trio.sleep(_STOPPED_SECONDS)
        process.send_signal(signal.SIGCONT)

    async def _kill(self, workload: Workload, site: Site, transport: Transport, seed: int, where: str) -> None:
        """Run a program through the guard until it says that it is ready, and kill it."""
        command = workload.command(self._kit, seed)
        address = site.guard.at(transport)
        with tempfile.TemporaryFile() as errors:
            process = await self._start(command, workload, address, stdout=subprocess.PIPE, stderr=errors)
            said = bytearray()
            async with _ended_with(process):
                assert process.stdout is not None
                with trio.move_on_after(_PROGRAM_SECONDS):
                    while not said.endswith(b"\n") and (data := await process.stdout.receive_some()):
                        said += data
            errors.seek(0)
            if not said.endswith(b"\n"):
                complaint = errors.read(_COMPLAINT).decode(errors="replace")
                self._wrong(f"{where}: it was never ready to be killed: {complaint}")
                return
        self._account.entries[workload.name].connections_killed += json.loads(said)["connections"]
        with psycopg.connect(site.server.unix.conninfo) as connection:
            left = connection.execute(f"SELECT count(*) FROM {LEFT}").fetchone()
        if left != (0,):
            self._wrong(f"{where}: {left} rows were kept of what it had not committed")

    # The guards

    async def _watch(self) -> None:
        while True:
            for site in self._sites:
                site.samples.append(site.sample())
            self._read_records()
            await trio.sleep(_SAMPLE_SECONDS)

    def _read_records(self) -> None:
        for site in self._sites:
            for fault in site.records.new():
                if not self._account.take(fault):
                    self._console.print_json(data=fault)

    async def _say_progress(self) -> None:
        while True:
            await trio.sleep(_PROGRESS_SECONDS)
            passed = time.monotonic() - self._began
            taken = self._cpu_seconds() - self._cpu_before
            self._console.print(
                f"{passed / 60:.0f} min: {self._account.runs} runs, {self._account.rows} rows compared,"
                f" {len(self._account.wrong)} wrong; {taken / passed:.0%} of a processor; "
                + "; ".join(f"{site.name}: {_in_words(site.samples[-1])}" for site in self._sites)
            )

    async def _come_to_rest(self, site: Site, before: Sample) -> None:
        """Wait until a guard that nobody uses any more holds what it held before."""
        with trio.move_on_after(_REST_SECONDS):
            while True:
                now = site.sample()
                if (
                    now.descriptors <= before.descriptors
                    and now.tasks <= before.tasks
                    and now.threads <= before.threads
                ):
                    return
                await trio.sleep(0.2)
        self._wrong(f"{site.name}: the guard has not come to rest: {_in_words(before)} before, {_in_words(now)} after")

    # The end

    def _finish(self, before: Mapping[str, Sample]) -> bool:
        account = self._account
        passed = time.monotonic() - self._began
        taken = self._cpu_seconds() - self._cpu_before
        for site in self._sites:
            site.samples.append(site.sample())
            try:
                site.guard.stop()
            except (AssertionError, subprocess.TimeoutExpired) as error:
                self._wrong(f"{site.name}: {error}")
            for line in site.guard.stderr.splitlines():
                if _TROUBLE.search(line):
                    self._wrong(f"{site.name}: the guard said: {line}")
        self._read_records()
        account.close()
        self._console.print(account.table())
        for site in self._sites:
            self._judge_memory(site, before[site.name])
        self._console.print(
            f"{passed / 60:.1f} min, seed {self._plan.seed}: {account.runs} runs, {account.rows} rows compared,"
            f" {taken / passed:.0%} of a processor"
        )
        for wrong in account.wrong:
            self._console.print(f"WRONG: {wrong}", markup=False)
        self._console.print("something is wrong" if account.wrong else "all is well")
        return not account.wrong

    def _judge_memory(self, site: Site, before: Sample) -> None:
        samples = site.samples
        most = samples[0]._replace(
            megabytes=max(one.megabytes for one in samples),
            descriptors=max(one.descriptors for one in samples),
            threads=max(one.threads for one in samples),
            tasks=max(one.tasks for one in samples),
        )
        said = site.guard.stderr.splitlines()
        summary = next(
            (line for line in said if re.match(r"pgguard: \d+ sessions?, ", line)), "it said nothing in the end"
        )
        self._console.print(
            f"{site.name}: at first {_in_words(before)}; at most {_in_words(most)};"
            f" in the end {_in_words(samples[-1])}; {samples[-1].cpu - before.cpu:.1f} s of processor time; {summary}"
        )
        grown = growth(samples)
        if grown is None:
            self._console.print(f"{site.name}: too short to say whether memory grows")
            return
        self._console.print(
            f"{site.name}: after the warm-up memory has changed by {grown.megabytes:+.1f} MB,"
            f" {grown.per_hour:+.1f} MB an hour"
        )
        if grown.megabytes > grown.allowed:
            self._wrong(f"{site.name}: memory has grown by {grown.megabytes:.1f} MB, {grown.allowed:.1f} are allowed")

    def _wrong(self, what: str) -> None:
        self._account.wrong.append(what)
        self._console.print(f"WRONG: {what}", markup=False)


def _errors(output: Path) -> Path:
    """Where what a program says on standard error goes."""
    return output.with_name(f"{output.name}-errors")


@asynccontextmanager
async def _ended_with(process: trio.Process) -> AsyncIterator[None]:
    """End a program with all that it has started, whatever happens."""
    try:
        yield
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with trio.CancelScope(shield=True):
                await process.wait()
        if process.stdout is not None:
            await process.stdout.aclose()


def _in_words(one: Sample) -> str:
    return f"{one.megabytes:.1f} MB, {one.descriptors} descriptors, {one.threads} threads, {one.tasks} tasks"
