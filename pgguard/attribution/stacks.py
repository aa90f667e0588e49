"""What Python's and Ruby's threads were doing: functions, files and lines.

Python's are read by py-spy, whatever the processes do. Ruby's tell it themselves, if ``pgguard run --ruby-stacks`` has
started them: :mod:`pgguard.attribution.ruby.pipes`.

py-spy reads the interpreter's own structures out of the process's memory. By default it stops the process with
ptrace(2) for that, which is not harmless. A stop interrupts system calls, and some then fail with EINTR: signal(7),
"Interruption of system calls and library functions by stop signals". It turns a poll into a restart_syscall, of which
:mod:`pgguard.attribution.threads` sees less. And were py-spy killed between stopping a process and taking note of it,
the process would stay stopped.

So it is told ``--nonblocking``: it only reads, and the process notices nothing. The price is that the stack of a thread
which runs may be torn. Therefore stacks are given of threads that *sleep*:

- of one that is in the same sleep before py-spy starts and after it has ended: it didn't run, so that its stack has not
  changed;
- or, as py-spy takes long on a busy machine, and some drivers wake now and then to look for signals (psycopg 3 every
  0.1 s), of one that was waiting for the connection before, between and after two runs of py-spy which have read the
  very same stack: what is torn is not torn twice in the same way.

A Ruby process answers when one of its threads has the interpreter's lock, so that no stack is torn. But a thread that
has run meanwhile may have been asked about in another call. So for Ruby's the same holds.

py-spy takes some 30 ms of a processor, nearly all of it before it reads. So :class:`StackReader` starts it at once, for
all processes that matter, and lets other evidence be taken meanwhile. A thread may be given the answer that it has
waited for, and run. Then py-spy is started once more as soon as it waits for the connection again.
"""

from __future__ import annotations

import os
import re
import resource
import selectors
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple, Self

from pydantic import BaseModel, TypeAdapter, ValidationError

from pgguard.attribution import hangs
from pgguard.attribution.dumps import Dump, NoDump, Seen
from pgguard.attribution.evidence import Process
from pgguard.attribution.frames import Frame, code_of, told_apart
from pgguard.attribution.processes import CMDLINE_LIMIT
from pgguard.attribution.ruby.pipes import NOT_ASKED
from pgguard.attribution.runtime import Language, language_of
from pgguard.attribution.threads import Obstacle, Sleep, Waiting, find_sleep, sleeps_of, waiting_threads
from pgguard.attribution.trust import (
    TRUST_REMEDY,
    closed_directory,
    distrust_path,
    may_execute,
    places_on_path,
    user_name,
)

if TYPE_CHECKING:
    from pgguard.attribution.ruby.pipes import RubyPipes

_PIECE = 65536
_OUTPUT_LIMIT = 1 << 21
"""Bytes of an answer: a hundred threads' deep stacks. While one is decoded nothing else of the guard's runs."""
_PAUSE = 0.002
"""Seconds between two looks at what threads do meanwhile."""
_YOUNG = 0.01
"""Seconds after its start in which py-spy is started anew rather than left to read what isn't wanted any more."""
_RUNS = 6
"""How often py-spy is started for one process, or how often it is asked."""
_RESTARTS = 2
"""How often of that it is not left to read."""
_ROUND = 0.05
"""Seconds between two looks whether it is worth going on, when the time that was meant for it is over."""
_HOPE = 0.1
"""Seconds for which a thread may be elsewhere then: one that wakes now and then is, and may wait for a processor."""
MOVED_ON = "it had moved on before it could be read"
"""Why there is no stack of a thread that does something else by now."""


@dataclass(frozen=True, slots=True)
class Stacks:
    """What some threads were doing in the sleep that they were asked about in."""

    frames: Mapping[Sleep, tuple[Frame, ...]] = field(default_factory=dict)
    """The innermost call first. A thread that has run meanwhile, or isn't Python's, has none."""
    problems: Mapping[int, str] = field(default_factory=dict)
    """By pid, why nothing could be found out about a whole process, or about those of its threads that have no frames:
    a clause that can stand alone."""
    again: Mapping[tuple[int, int], Waiting] = field(default_factory=dict)
    """By pid and tid, how those threads waited for the connection when their stacks were read that had run since they
    were asked about."""
    names: Mapping[Sleep, str] = field(default_factory=dict)
    """What those threads are called in their own language that have a name there."""


class _Frame(BaseModel):
    """What py-spy says of a frame: ``stack_trace.rs`` in its sources."""

    name: str
    filename: str
    line: int


class _Thread(BaseModel):
    """What py-spy says of a thread."""

    os_thread_id: int | None
    """Its tid; ``None`` before Python 3.11, where the interpreter doesn't know it."""
    frames: list[_Frame]


_INSTALL = "pip install 'pgguard[stacks]'"
_DUMP = TypeAdapter(list[_Thread])


class Lack(NamedTuple):
    """Why there is no py-spy to be run."""

    problem: str
    """A clause."""
    remedy: str
    """What to do about it, an imperative."""


def find_py_spy() -> str | None:
    """Find py-spy's program: where the guard's own Python is, so that its optional extra wins, or else on ``PATH``.

    It gets the guard's rights. What is beside the interpreter is as trustworthy as that; of what else is on ``PATH`` it
    is made sure that nobody else may have put it there.
    """
    return next((str(path) for path, lack in _found() if lack is None), None)


def lack_of_py_spy() -> Lack:
    """Say why :func:`find_py_spy` finds none."""
    return next((lack for _, lack in _found() if lack is not None), Lack("py-spy is not installed", _INSTALL))


def _found() -> Iterator[tuple[Path, Lack | None]]:
    """Yield where py-spy is, each with why it isn't run if it isn't; then where it may be and can't be looked for."""
    beside = [Path(sys.executable).with_name("py-spy")] if sys.executable else []
    hidden: list[tuple[Path, Lack]] = []
    for path in (*beside, *places_on_path("py-spy")):
        closed = closed_directory(path)
        if closed is not None:
            who = user_name(os.geteuid())
            problem = f"py-spy is not installed, unless it is in {path.parent}: {who} can't enter {closed}"
            hidden.append((path, Lack(problem, f"{_INSTALL} where {who} can run it")))
        elif path.is_file():
            yield path, _lack(path, trusted=path in beside)
    yield from hidden


def _lack(path: Path, *, trusted: bool) -> Lack | None:
    reason = None if trusted else _distrust(path)
    if reason is not None:
        return Lack(f"py-spy at {path} is not used: {reason}", f"{TRUST_REMEDY}, or {_INSTALL}")
    if not may_execute(path):
        who = user_name(os.geteuid())
        return Lack(f"py-spy at {path} is not used: {who} can't execute it", f"chmod a+rx {path}")
    return None


def _distrust(path: Path) -> str | None:
    try:
        return distrust_path(path)
    except OSError as error:
        return error.strerror or str(error)


class Wanted(NamedTuple):
    """A process of which stacks are wanted."""

    process: Process
    threads: Mapping[int, Sleep | None]
    """By tid, the sleep that each was seen in; ``None``: it wasn't seen to sleep."""


class _PySpy(Dump):
    """py-spy, while it reads the stacks of a process. Raises OSError: it can't be run."""

    begins_slowly = True

    def __init__(self, program: str, process: Process) -> None:
        self._process = process
        self._child = _started(program, process.pid)
        self._output = bytearray()
        self._complaint = bytearray()
        self._is_too_much = False

    @property
    def is_over(self) -> bool:
        """Whether it has ended. It isn't waited for, so that what it took can be told then."""
        if self._is_too_much:
            return True
        return not self._open and os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    @property
    def pipes(self) -> Collection[int]:
        """What it writes to."""
        return [stream.fileno() for stream in self._open]

    @property
    def _open(self) -> list[IO[bytes]]:
        streams = (self._child.stdout, self._child.stderr)
        return [stream for stream in streams if stream is not None and not stream.closed]

    def hear(self, pipe: int) -> None:
        """Take what it has written."""
        stream = next(stream for stream in self._open if stream.fileno() == pipe)
        said = self._output if stream is self._child.stdout else self._complaint
        while len(said) <= _OUTPUT_LIMIT:
            try:
                data = os.read(pipe, _PIECE)
            except BlockingIOError:
                return
            if not data:
                stream.close()
                return
            said += data
        self._is_too_much = True

    def result(self) -> Mapping[int, Seen]:
        """What it has read."""
        if self._is_too_much:
            raise NoDump("its stacks are too large")
        if self._child.returncode != 0:
            raise NoDump(f"py-spy: {_shorten(self._complaint.decode(errors='replace'))}")
        try:
            return _threads(self._process, _DUMP.validate_json(bytes(self._output)))
        except ValidationError:
            raise NoDump("py-spy's answer can't be read") from None

    def end(self) -> float:
        """End it. What can't be ended yet is left behind."""
        for stream in self._open:
            stream.close()
        before = _childrens_time()
        # It holds nothing that would need to be put back: see the head of this module. It opens the interpreter's file,
        # which may be in a file system that never answers.
        hangs.leave(self._child, self._process.pid)
        return _childrens_time() - before


@dataclass(slots=True)
class _Run:
    """One look at a process, and what its threads did before it was begun."""

    process: Process
    began: float
    before: Mapping[int, Sleep]
    """By tid, the sleeps that they were in."""
    waited: Collection[int]
    """The tids of those that waited for the connection."""
    dump: Dump


class StackReader:
    """Reads the stacks of threads of a few processes, Python's and Ruby's, beside whatever else is done.

    For one worker thread at a time; the processes neither stop nor notice. It is a context manager, at whose end no
    child is left behind but one that can't be ended yet.

    Args:
        inode: Of the client's socket of the connection that it is about; ``None``: of none.
        account: Is told how much of a processor's time each py-spy has taken, in seconds.
        ruby: Asks Ruby processes; ``None``: they aren't asked.
    """

    def __init__(
        self, inode: int | None, account: Callable[[float], None] | None = None, ruby: RubyPipes | None = None
    ) -> None:
        self._inode = inode
        self._account = account
        self._ruby = ruby
        self._program = find_py_spy()
        self._languages: dict[int, Language] = {}
        """By pid, those of the processes that have been begun."""
        self._runs: dict[int, _Run] = {}
        self._begun: Counter[int] = Counter()
        self._unsure: dict[tuple[int, int], tuple[Frame, ...]] = {}
        """What has been read of threads that had run meanwhile."""
        self._frames: dict[Sleep, tuple[Frame, ...]] = {}
        self._names: dict[Sleep, str] = {}
        self._problems: dict[int, str] = {}
        self._left: dict[int, tuple[Process, dict[int, Sleep | None]]] = {}
        """The processes, each with those of its threads that have not been read yet."""
        self._unfinished: dict[int, str] = {}
        """By pid, why those haven't been read so far."""
        self._again: dict[tuple[int, int], Waiting] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for pid in list(self._runs):
            self._end(pid)

    @property
    def found(self) -> Stacks:
        """What has been found so far."""
        problems = {**self._unfinished, **self._problems}
        return Stacks(dict(self._frames), problems, dict(self._again), dict(self._names))

    @property
    def has_any_left(self) -> bool:
        """Whether :meth:`read` had no time for a thread."""
        return bool(self._left)

    def begin(self, process: Process, tids: Collection[int] = ()) -> None:
        """Begin to read the stacks of a process, unless that has been begun; returns as soon as it has been asked for.

        Args:
            process: Whoever has by now the pid of one that is gone isn't taken for it.
            tids: Threads that will be wanted, as far as they are known. Of a process with few threads it makes no
                difference.
        """
        pid = process.pid
        if self._begun[pid] or pid in self._problems:
            return
        try:
            self._languages[pid] = self._checked(pid)
        except NoDump as reason:
            self._problems[pid] = str(reason)
            return
        self._start(process, tids)

    def _checked(self, pid: int) -> Language:
        """Make sure that it is a process whose stacks can be had. Raises NoDump."""
        language = _checked(pid)
        if language is Language.PYTHON and self._program is None:
            raise NoDump(lack_of_py_spy().problem)
        if language is Language.RUBY and self._ruby is None:
            raise NoDump(NOT_ASKED)
        return language

    def read(self, wanted: Collection[Wanted], *, until: float, returning: float) -> Iterator[Stacks]:
        """Read, and yield what has been found so far whenever that is more; ends when no more is to be expected.

        Args:
            wanted: Whose stacks.
            until: When to end in any case, in seconds of time.monotonic().
            returning: Until when to wait for threads that have run to wait for the connection again.
        """
        for process, threads in wanted:
            self.begin(process, threads)
        self._left = {one.process.pid: (one.process, dict(one.threads)) for one in wanted}
        yield from self._read(until, returning)

    def read_on(self, *, until: float, is_wanted: Callable[[], bool]) -> Iterator[Stacks]:
        """Go on with what :meth:`read` had no time for, and yield as it does.

        Ends when none of those threads is in the sleep that is asked about any more, or waits for the connection.

        Args:
            until: When to end in any case, in seconds of time.monotonic().
            is_wanted: Whether to go on.
        """
        hope = time.monotonic() + _HOPE
        while self._left and is_wanted() and (now := time.monotonic()) < min(hope, until):
            yield from self._read(min(now + _ROUND, until), until)
            if any(self._sleeps(process, threads) for process, threads in self._left.values()):
                hope = time.monotonic() + _HOPE
        if time.monotonic() >= hope:
            self._unfinished = dict.fromkeys(self._left, MOVED_ON)
            yield self.found

    def _read(self, until: float, returning: float) -> Iterator[Stacks]:
        left = self._left
        self._unfinished = {}
        while True:
            for pid, (process, threads) in list(left.items()):
                run = self._runs.get(pid)
                if run is not None and run.dump.is_over:
                    self._end(pid)
                    self._take(run, threads)
                    yield self.found
                elif run is not None and time.monotonic() - run.began < _YOUNG and self._is_vain(run, threads):
                    self._end(pid)
                is_idle = pid not in self._runs and pid not in self._problems
                if is_idle and threads and self._sleeps(process, threads):
                    self._start(process, threads)
                is_late = time.monotonic() >= returning or self._begun[pid] >= _RUNS
                if not threads or pid in self._problems or (pid not in self._runs and is_late):
                    del left[pid]
                    if threads:
                        self._problems.setdefault(pid, MOVED_ON)
            if not left or time.monotonic() >= until:
                break
            self._hear(min(_PAUSE, until - time.monotonic()))
        self._unfinished = {pid: self._late(pid) for pid in left}
        yield self.found

    def _late(self, pid: int) -> str:
        if pid not in self._runs:
            return MOVED_ON
        return "it didn't answer in time" if self._languages[pid] is Language.RUBY else "py-spy didn't answer in time"

    def _start(self, process: Process, tids: Collection[int]) -> None:
        pid, started = process.pid, process.started
        if self._begun[pid] >= _RUNS:
            return
        self._begun[pid] += 1
        before = {sleep.thread.tid: sleep for sleep in sleeps_of(process)}
        before |= {tid: sleep for tid in tids if (sleep := find_sleep(pid, started, tid)) is not None}
        waited = self._waiting(process)
        try:
            self._runs[pid] = _Run(process, time.monotonic(), before, waited, self._dump(process, tids))
        except NoDump as reason:
            self._problems[pid] = str(reason)

    def _dump(self, process: Process, tids: Collection[int]) -> Dump:
        """Begin to read a process's stacks. Raises NoDump."""
        if self._languages[process.pid] is Language.RUBY and self._ruby is not None:
            return self._ruby.ask(process, tids)
        if self._program is None:
            raise NoDump(lack_of_py_spy().problem)
        try:
            return _PySpy(self._program, process)
        except OSError as error:
            raise NoDump(f"py-spy can't be run: {error.strerror}") from None

    def _hear(self, seconds: float) -> None:
        """Take what is written, waiting so long for it at most."""
        with selectors.PollSelector() as waiting:
            pipes = {pipe: run.dump for run in self._runs.values() for pipe in run.dump.pipes}
            for pipe in pipes:
                waiting.register(pipe, selectors.EVENT_READ)
            if not pipes:
                time.sleep(max(0.0, seconds))
                return
            for key, _ in waiting.select(max(0.0, seconds)):
                pipes[key.fd].hear(key.fd)

    def _take(self, run: _Run, threads: dict[int, Sleep | None]) -> None:
        """Keep what one run has read of these threads, of which those are left out that need no other."""
        pid = run.process.pid
        try:
            dumped = run.dump.result()
        except NoDump as reason:
            self._problems[pid] = str(reason)
            return
        waiting = self._waiting(run.process)
        for tid, seen in list(threads.items()):
            found, one = dumped.get(tid), waiting.get(tid)
            sleep = find_sleep(pid, run.process.started, tid)
            if sleep is None or (one is not None and one.sleep != sleep):
                one = None
            steady = sleep is not None and sleep == run.before.get(tid)
            confirmed = found is not None and tid in run.waited and self._unsure.get((pid, tid)) == found.frames
            if found is None:
                del threads[tid]  # it isn't the language's
            elif sleep is not None and steady and sleep == seen:
                self._keep(sleep, found)
                del threads[tid]
            elif one is not None and (steady or confirmed):
                self._keep(one.sleep, found)
                self._again[pid, tid] = one
                del threads[tid]
            elif one is not None and tid in run.waited:
                self._unsure[pid, tid] = found.frames
            else:
                self._unsure.pop((pid, tid), None)

    def _keep(self, sleep: Sleep, found: Seen) -> None:
        self._frames[sleep] = found.frames
        if found.name is not None:
            self._names[sleep] = found.name

    def _is_vain(self, run: _Run, threads: Mapping[int, Sleep | None]) -> bool:
        """Whether all these threads have run since before a run was started, and not again and again."""
        if not run.dump.begins_slowly or self._begun[run.process.pid] > _RESTARTS:
            return False
        now = {tid: find_sleep(run.process.pid, run.process.started, tid) for tid in threads}
        return all(run.before.get(tid) is None or run.before[tid] != sleep for tid, sleep in now.items())

    def _sleeps(self, process: Process, threads: Mapping[int, Sleep | None]) -> bool:
        """Whether one of these threads is in the sleep that is asked about, or waits for the connection."""
        now = ((seen, find_sleep(process.pid, process.started, tid)) for tid, seen in threads.items())
        if any(seen is not None and seen == sleep for seen, sleep in now):
            return True
        return not threads.keys().isdisjoint(self._waiting(process))

    def _waiting(self, process: Process) -> dict[int, Waiting]:
        """By tid, the threads that wait to read from the connection and for nothing else."""
        if self._inode is None:
            return {}
        waits = waiting_threads([process], self._inode)
        return {one.thread.tid: one for one in waits.threads if one.readable and not one.others}

    def _end(self, pid: int) -> None:
        """End a run, over or not."""
        taken = self._runs.pop(pid).dump.end()
        if self._account is not None:
            self._account(taken)


def python_stacks(sleeps: Collection[Sleep], seconds: float = 0.5) -> Stacks:
    """Find out what sleeping threads are doing, those of one or several processes.

    For worker threads: it runs py-spy, once for each process and all at the same time. That takes 10 to 30 ms,
    most of it processor time.

    Args:
        sleeps: from :func:`waiting_threads` or :func:`find_sleep`. Whoever has by now the pid of a process that is
            gone isn't taken for it.
        seconds: at most, for all together.
    """
    until = time.monotonic() + seconds
    wanted: dict[int, dict[int, Sleep | None]] = {}
    started = {}
    for sleep in sleeps:
        wanted.setdefault(sleep.thread.pid, {})[sleep.thread.tid] = sleep
        started[sleep.thread.pid] = sleep.thread.started
    processes = {pid: Process(pid, start, 0.0, "", (), None) for pid, start in started.items()}
    with StackReader(None) as reader:
        for _ in reader.read([Wanted(processes[pid], wanted[pid]) for pid in wanted], until=until, returning=0.0):
            pass
        return reader.found


def _checked(pid: int) -> Language:
    """Make sure that it is a process that may be looked at, of a language whose stacks can be read. Raises NoDump."""
    try:
        Path(f"/proc/{pid}/exe").readlink()
    except PermissionError:
        raise NoDump(Obstacle.NOT_PERMITTED) from None
    except OSError:
        raise NoDump("it has ended") from None
    try:
        hangs.check(pid)
    except TimeoutError as error:
        raise NoDump(str(error.strerror)) from None
    language = language_of(pid)
    if language is not Language.PYTHON and language is not Language.RUBY:
        raise NoDump("it is neither Python nor Ruby")
    return language


def _started(program: str, pid: int) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(  # noqa: S603 - found by find_py_spy, with a number as its only variable argument
        [program, "dump", "--json", "--nonblocking", "--pid", str(pid)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
    )
    for stream in filter(None, (child.stdout, child.stderr)):
        os.set_blocking(stream.fileno(), False)
    return child


def _childrens_time() -> float:
    """The processor's time that children have taken which have ended, in seconds: getrusage(2)."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _shorten(complaint: str) -> str:
    """Return what py-spy complains about and the cause at the bottom of it, without the backtrace of its own."""
    lines = [line.strip() for line in complaint.partition("Stack backtrace:")[0].splitlines() if line.strip()]
    if not lines:
        return "failed"
    message = lines[0].removeprefix("Error: ")
    return message if len(lines) == 1 else f"{message.rstrip('.')}: {re.sub('^[0-9]+: ', '', lines[-1])}"


def _threads(process: Process, dumped: list[_Thread]) -> dict[int, Seen]:
    """Return the threads by tid."""
    if len(dumped) == 1 and dumped[0].os_thread_id is None and _is_single_threaded(process.pid):
        dumped[0].os_thread_id = process.pid
    is_cut = sum(len(argument.encode()) + 1 for argument in process.cmdline) >= CMDLINE_LIMIT
    code = None if is_cut else code_of(process.cmdline)
    return {
        thread.os_thread_id: Seen(
            told_apart([Frame(frame.name, frame.filename, frame.line) for frame in thread.frames], code)
        )
        for thread in dumped
        if thread.os_thread_id is not None and thread.frames
    }


def _is_single_threaded(pid: int) -> bool:
    try:
        return [task.name for task in Path(f"/proc/{pid}/task").iterdir()] == [str(pid)]
    except OSError:
        return False
