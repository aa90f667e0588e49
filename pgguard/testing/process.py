"""The guard's process beside the tests: it does what it is asked to, and ends when the tests' process has.

It is a process of its own, so that a test that forks hands on nothing of the guard's, and one that keeps the
interpreter busy keeps nobody waiting. It is in a session of its own: no signal of a terminal reaches it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from collections import Counter, OrderedDict
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import trio

from pgguard.faults.causes import program
from pgguard.faults.fault import Role
from pgguard.faults.text import printable
from pgguard.launch.environment import rewrite, write_files
from pgguard.launch.upstream import located, private_directory
from pgguard.proxy.addresses import UnixAddress
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.losses import Loss, keep_going, remarks
from pgguard.proxy.settings import Settings, load_settings
from pgguard.reporting.console import report_of
from pgguard.reporting.jsonl import JsonLines
from pgguard.reporting.log import BoundedLog
from pgguard.reporting.record import to_record
from pgguard.reporting.sinks import Fanout, SinkError
from pgguard.running import running_guard, tend
from pgguard.testing.stretches import Stretches
from pgguard.testing.wire import Answer, Happened, Leaving, LeftOver, Question, Told, encode

if TYPE_CHECKING:
    from pgguard.faults.docket import Occurrence
    from pgguard.faults.fault import Fault
    from pgguard.proxy.addresses import Address
    from pgguard.running import RunningGuard

KEPT: Final = 4096
"""Faults that are kept to be told of: of what comes back after so many others, its first one isn't told again."""
_PIECE: Final = 1 << 16
"""Bytes of a question that are read at once."""
_ELSEWHERE: Final = frozenset(
    {
        "upstream",
        "listen",
        "databases",
        "tls_cert",
        "tls_key",
        "tls_ca",
        "faults",
        "admin",
        "admin_token_file",
        "otel",
        "user",
    }
)
"""Settings of the configuration file that are meant for a guard that serves."""
_NOT_THE_TESTS: Final = frozenset({"PGGUARD_UPSTREAM"})
"""Variables that lead to the server, and are meant for a guard."""
_LAST: Final = 5.0
"""Seconds to judge what has come of tests whose process has ended without a word."""
_SOMEWHERE: Final = "during one of several tests"
_DOERS: Final = (Role.INTRUDER, Role.CLOSER, Role.OWNER)


class Gathering:
    """What has happened in all fronts, kept until it is told.

    Args:
        parent: The pid of the tests' process.
    """

    def __init__(self, parent: int) -> None:
        self._parent = parent
        self.stretches = Stretches(0, time.time())
        self.names: dict[int | None, str] = {}
        """What stretches are called, the latest."""
        self._happened: Counter[tuple[int | None, str]] = Counter()
        self._faults: OrderedDict[str, Fault] = OrderedDict()
        self._told: set[str] = set()
        self.kinds: set[str] = set()
        """Kinds of faults that haven't been told of."""
        self._changed = trio.Event()
        self.is_stale = False
        """Something has happened since causes began anew."""
        self.said: list[str] = []

    def keep(self, key: str, fault: Fault) -> None:
        """Keep a fault that tells of all that are alike."""
        self._faults[key] = fault
        if len(self._faults) > KEPT:
            self._told.discard(self._faults.popitem(last=False)[0])

    def come(self, key: str, one: Occurrence) -> None:
        """Take note of one time that a fault has come."""
        others = [culprit.process for culprit in one.fault.culprits if culprit.pid != self._parent]
        forked = all(process is not None and process.ppid == self._parent for process in others)
        self._happened[self.stretches.of(one.since, one.until, forked=forked), key] += 1
        self.kinds.add(one.fault.kind.value)
        self.is_stale = True
        self._changed.set()

    async def until_come(self, kind: str) -> None:
        """Wait until a fault of a kind has come."""
        while kind not in self.kinds:
            self._changed = trio.Event()
            await self._changed.wait()

    def left_over(self) -> list[LeftOver]:
        """What hasn't been told."""
        return [
            LeftOver(where=self.names.get(one, _SOMEWHERE), told=_told(self._faults[key]), times=times)
            for (one, key), times in self._happened.items()
            if key in self._faults
        ]

    def taken(self) -> tuple[list[Happened], dict[str, Told]]:
        """What is to be told, which has been told then."""
        if not self._happened:
            return [], {}
        happened = [Happened(stretch=one, fault=key, times=times) for (one, key), times in self._happened.items()]
        keys = [key for _, key in self._happened if key in self._faults and key not in self._told]
        self._happened.clear()
        self.kinds.clear()
        self._told.update(keys)
        return happened, {key: _told(self._faults[key]) for key in keys}


class Front:
    """A guard's ear and its sink.

    Args:
        number: It, among the guards.
        gathering: Where its faults go.
    """

    def __init__(self, number: int, gathering: Gathering) -> None:
        self._number = number
        self._gathering = gathering

    def __str__(self) -> str:
        return "the tests' report"

    def hear(self, one: Occurrence) -> None:
        """Take note of one time that a fault has come."""
        self._gathering.come(self._key(one.fault), one)

    def record(self, fault: Fault) -> None:
        """Take a fault that is recorded; of those that are alike the first one tells of all."""
        if fault.repeat_of is None:
            self._gathering.keep(self._key(fault), fault)

    def close(self) -> None:
        """Nothing needs to be let go of."""

    def _key(self, fault: Fault) -> str:
        return f"{self._number}:{fault.repeat_of or fault.id}"


def _told(fault: Fault) -> Told:
    people = {culprit.role: culprit.process for culprit in reversed(fault.culprits)}
    programs = [program(process.cmdline) for role in _DOERS if (process := people.get(role)) is not None]
    return Told(
        record=to_record(fault),
        headline=printable(fault.headline),
        report=_report(fault),
        cause="\n".join([fault.kind, fault.severity, fault.advice.title, *programs]),
    )


def _report(fault: Fault) -> str:
    """What is printed of it, without the rule that stands above it."""
    lines = report_of(fault).splitlines()
    return "\n".join(lines[lines[0].startswith("=") :])


class Attendant:
    """Does what the tests' process asks for.

    Args:
        nursery: Where guards run.
        gathering: Where their faults go.
        stack: What is to be put in order at the end.
        parent: The pid of the tests' process.
    """

    def __init__(self, nursery: trio.Nursery, gathering: Gathering, stack: ExitStack, parent: int) -> None:
        self._nursery = nursery
        self._gathering = gathering
        self._stack = stack
        self._parent = parent
        self._guards: list[RunningGuard] = []
        self._recorders: dict[str, JsonLines] = {}
        """By the names of their files."""
        self._has_ended = False

    async def answer(self, question: Question) -> Answer:
        """Do what a question asks for. Raises nothing but for cancellation."""
        self._gathering.stretches.note_forks(question.get("forks", []))
        try:
            answer = await self._done(question)
        except ConfigurationError as error:
            answer = Answer(error=str(error))
        except Exception as error:
            logging.getLogger(__name__).exception("internal error")
            answer = Answer(error=f"internal error: {type(error).__name__}: {error}")
        answer["said"] = [*self._gathering.said]
        self._gathering.said.clear()
        return answer

    async def _done(self, question: Question) -> Answer:
        if question["do"] == "front":
            return await self._front(question)
        if question["do"] == "end":
            self._has_ended = True
            self._leave_open()
        judged = await self._settle(question)
        happened, faults = self._gathering.taken()
        if (stretch := question.get("stretch")) is not None:
            self._gathering.stretches.begin(stretch, time.time())
            self._gathering.names[stretch] = question.get("name", "")
            if len(self._gathering.names) > KEPT:
                del self._gathering.names[next(iter(self._gathering.names))]
        if question.get("anew") and self._gathering.is_stale:
            for guard in self._guards:
                guard.begin_anew()
            self._gathering.is_stale = False
        return Answer(judged=judged, happened=happened, faults=faults, sessions=self._sessions)

    @property
    def _sessions(self) -> int:
        return sum(guard.sessions for guard in self._guards)

    async def leave(self, path: Path) -> None:
        """Write down what can't be told any more, as the tests' process has ended without a word."""
        if not self._has_ended:
            await self._settle({"seconds": _LAST})
            draft = path.with_suffix(".draft")
            draft.write_text(json.dumps(Leaving(faults=self._gathering.left_over(), sessions=self._sessions)))
            draft.rename(path)

    def _leave_open(self) -> None:
        """Have those connections judged that processes have which the tests have left behind, and which they opened.

        Those of the tests' own process are closed when that ends.
        """
        for guard in self._guards:
            sessions = guard.snapshot()
            left = [one.facts.id for one in sessions if one.opener is not None and one.opener.pid != self._parent]
            guard.leave_open(left, "the tests")

    async def _settle(self, question: Question) -> bool:
        with trio.move_on_after(question.get("seconds", 0.0)) as limit:
            for guard in self._guards:
                await guard.settled()
            if (kind := question.get("awaited")) is not None:
                await self._gathering.until_come(kind)
                for guard in self._guards:
                    await guard.settled()
        return not limit.cancelled_caught

    async def _front(self, question: Question) -> Answer:
        """Put a guard in front of a server."""
        directory = self._stack.enter_context(private_directory())
        settings = settings_for(question.get("upstream", ""), directory, unix=question.get("unix", False))
        front = Front(len(self._guards), self._gathering)
        recorder = self._recorder_of(question.get("records", ""))
        sinks = Fanout([front] if recorder is None else [recorder, front], complain=self._gathering.said.append)
        guard: RunningGuard = await self._nursery.start(_run, settings, sinks, self._gathering.said)
        guard.hear(front.hear)
        self._guards.append(guard)
        before = question.get("environment", {})
        add, keep = question.get("urls", []), sorted(_NOT_THE_TESTS & before.keys())
        [guarded] = guard.fronts
        rewritten = rewrite(before, guarded.upstream, guarded.addresses, directory=directory, add=add, keep=keep)
        write_files(rewritten.files)
        self._gathering.said += [*guard.warnings, *rewritten.remarks]
        return Answer(
            address=", ".join(map(str, guard.addresses)),
            url=_url(guard.addresses[0]),
            upstream=str(guarded.upstream),
            changed={name: rewritten.environment.get(name) for name in rewritten.names},
            missing=[capability.name for capability in guard.missing],
        )

    def _recorder_of(self, path: str) -> JsonLines | None:
        """What appends faults to a file; ``None`` if there is to be none. Raises ConfigurationError."""
        if path and path not in self._recorders:
            try:
                recorder = self._recorders[path] = JsonLines(Path(path))
            except SinkError as error:
                raise ConfigurationError(f"--pgguard-records: {error}") from error
            self._stack.callback(_close, recorder)
            self._nursery.start_soon(keep_going, tend, Loss.STEP, [recorder.tend])
        return self._recorders.get(path)


def _close(recorder: JsonLines) -> None:
    with suppress(SinkError):  # nobody is left to be told
        recorder.close()


async def _run(
    settings: Settings,
    sinks: Fanout,
    said: list[str],
    *,
    task_status: trio.TaskStatus[RunningGuard] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a guard until cancelled."""
    started = False
    try:
        async with running_guard(settings, sinks) as guard:
            started = True
            task_status.started(guard)
            await guard.wait_ended()
    except ConfigurationError as error:
        if not started:
            raise
        said.append(str(error))  # it has turned out to stand in front of itself


def _url(address: Address) -> str:
    if isinstance(address, UnixAddress):
        return f"postgresql:///?host={quote(address.directory, safe='')}&port={address.port}"
    return f"postgresql://{address}"


def settings_for(upstream: str, directory: Path, *, unix: bool = False) -> Settings:
    """The settings of a guard beside tests: of the environment and the configuration file those that are for it.

    Args:
        upstream: Where PostgreSQL is: a connection string; empty: as the environment says.
        directory: Where a Unix socket may be.
        unix: There is to be one, wherever PostgreSQL is.

    Raises:
        ConfigurationError: The guard can't run with them.
    """
    variables = {name: os.environ.get(f"PGGUARD_{name.upper()}") for name in Settings.model_fields}
    config = os.environ.get("PGGUARD_CONFIG")
    given = {name: value for name, value in variables.items() if name not in _ELSEWHERE}
    settings = load_settings(given, Path(config) if config else None)
    kept = settings.model_dump(include=settings.model_fields_set - _ELSEWHERE)
    settings = located(Settings(**kept, upstream=upstream), directory)
    if not unix:
        return settings
    port = settings.server().addresses[0].port
    return settings.model_copy(update={"listen": [f"unix:{directory}:{port}"]})


async def _attend(sock: socket.socket, parent: int, leftovers: str) -> None:
    """Answer the tests' process until it ends, or has closed its end of the socket."""
    gathering = Gathering(parent)
    log = BoundedLog(gathering.said.append)
    logging.basicConfig(level=logging.WARNING, handlers=[log])
    with ExitStack() as stack:
        async with trio.open_nursery() as nursery:
            attendant = Attendant(nursery, gathering, stack, parent)
            async with trio.open_nursery() as answering:
                answering.start_soon(_end_with, parent, answering.cancel_scope)
                await _answer_all(sock, attendant)
                answering.cancel_scope.cancel()
            if leftovers:
                with suppress(OSError):  # whoever looks for them says that there are none
                    await attendant.leave(Path(leftovers))
            nursery.cancel_scope.cancel()
    log.close()
    for remark in remarks():
        print(f"pgguard: internal error: {remark}", file=sys.stderr)  # noqa: T201 - for who looks into the file


async def _answer_all(sock: socket.socket, attendant: Attendant) -> None:
    """Answer questions until no more come."""
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
    rest = b""
    with suppress(trio.BrokenResourceError):
        while piece := await stream.receive_some(_PIECE):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                question: Question = json.loads(line)
                await stream.send_all(encode(await attendant.answer(question)))


async def _end_with(parent: int, answering: trio.CancelScope) -> None:
    """Answer no more when the tests' process has ended, whoever else has its end of the socket by now."""
    try:
        process = os.pidfd_open(parent)
    except OSError:
        return  # before Linux 5.3: the end of the socket's stream has to do, or it is gone already
    try:
        if os.getppid() == parent:
            await trio.lowlevel.wait_readable(process)
        answering.cancel()
    finally:
        os.close(process)


def main(arguments: list[str]) -> None:
    """Be it.

    Args:
        arguments: The descriptor of its end of the socket; the pid of the tests' process; the file for what can't be
            told any more if that ends without a word, empty for none.
    """
    descriptor, parent, leftovers = arguments
    with socket.socket(fileno=int(descriptor)) as sock:
        trio.run(_attend, sock, int(parent), leftovers)


if __name__ == "__main__":
    main(sys.argv[1:])
