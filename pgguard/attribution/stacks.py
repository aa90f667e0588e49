"""What Python threads were doing: functions, files and lines, through py-spy.

py-spy reads the interpreter's own structures out of the process's memory. By default it stops the process with
ptrace(2) for that, which is not harmless. A stop interrupts system calls, and some then fail with EINTR: signal(7),
"Interruption of system calls and library functions by stop signals". It turns a poll into a restart_syscall, of which
:mod:`pgguard.attribution.threads` sees less. And were py-spy killed between stopping a process and taking note of it,
the process would stay stopped.

So it is told ``--nonblocking``: it only reads, and the process notices nothing. The price is that the stack of a thread
which runs may be torn. Therefore stacks are given of threads that *sleep*, and only if each is seen in the same sleep
afterwards: a thread that didn't run has not changed its stack.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, TypeAdapter, ValidationError

from pgguard.attribution import hangs
from pgguard.attribution.runtime import is_python
from pgguard.attribution.threads import Obstacle, Sleep, find_sleep
from pgguard.attribution.trust import (
    TRUST_REMEDY,
    closed_directory,
    distrust_path,
    may_execute,
    places_on_path,
    user_name,
)

_PIECE = 65536
_OUTPUT_LIMIT = 1 << 21
"""Bytes of an answer: a hundred threads' deep stacks. While one is decoded nothing else of the guard's runs."""


class Frame(NamedTuple):
    """A call that has not returned yet."""

    function: str
    """Its name; with Python 3.11 and newer its qualified name."""
    file: str
    """As the interpreter knows it: mostly an absolute path, in the process's own file system."""
    line: int


@dataclass(frozen=True, slots=True)
class Stacks:
    """What some threads were doing in the sleep that they were asked about in."""

    frames: Mapping[Sleep, tuple[Frame, ...]] = field(default_factory=dict)
    """The innermost call first. A thread that has run meanwhile, or isn't Python's, has none."""
    problems: Mapping[int, str] = field(default_factory=dict)
    """By pid, why nothing could be found out about a whole process: a clause that can stand alone."""


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


class _NoDump(Exception):
    """Why there is none, as in :class:`Stacks`."""


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


def python_stacks(sleeps: Collection[Sleep], seconds: float = 0.5) -> Stacks:
    """Find out what sleeping threads are doing, those of one or several processes.

    For worker threads: it runs py-spy, once for each process and all at the same time. That takes 10 to 30 ms,
    most of it processor time. The processes neither stop nor notice. When it returns, no child is left behind but one
    that can't be ended yet.

    Args:
        sleeps: from :func:`waiting_threads` or :func:`find_sleep`. Whoever has by now the pid of a process that is
            gone isn't taken for it.
        seconds: at most, for all together.
    """
    deadline = time.monotonic() + seconds
    pids = dict.fromkeys(sleep.thread.pid for sleep in sleeps)
    frames: dict[Sleep, tuple[Frame, ...]] = {}
    problems: dict[int, str] = {}
    program = find_py_spy()
    if program is None:
        return Stacks(problems=dict.fromkeys(pids, lack_of_py_spy().problem))
    with contextlib.ExitStack() as stack:
        children: dict[int, subprocess.Popen[bytes]] = {}
        for pid in pids:
            try:
                _check(pid)
                children[pid] = stack.enter_context(_started(program, pid))
            except _NoDump as reason:
                problems[pid] = str(reason)
            except OSError as error:
                problems[pid] = f"py-spy can't be run: {error.strerror}"
        for pid, child in children.items():
            try:
                threads = _threads(pid, _result(child, deadline))
            except _NoDump as reason:
                problems[pid] = str(reason)
                continue
            for sleep in sleeps:
                _, started, tid, _ = sleep.thread
                if sleep.thread.pid == pid and tid in threads and find_sleep(pid, started, tid) == sleep:
                    frames[sleep] = threads[tid]
    return Stacks(frames, problems)


def _check(pid: int) -> None:
    """Raise _NoDump unless it is a Python process that may be looked at."""
    try:
        Path(f"/proc/{pid}/exe").readlink()
    except PermissionError:
        raise _NoDump(Obstacle.NOT_PERMITTED) from None
    except OSError:
        raise _NoDump("it has ended") from None
    try:
        hangs.check(pid)
    except TimeoutError as error:
        raise _NoDump(str(error.strerror)) from None
    if not is_python(pid):
        raise _NoDump("it isn't Python")


@contextlib.contextmanager
def _started(program: str, pid: int) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(  # noqa: S603 - found by find_py_spy, with a number as its only variable argument
        [program, "dump", "--json", "--nonblocking", "--pid", str(pid)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
    )
    try:
        yield child
    finally:
        for stream in filter(None, (child.stdout, child.stderr)):
            stream.close()
        # It holds nothing that would need to be put back: see the head of this module. It opens the interpreter's file,
        # which may be in a file system that never answers.
        hangs.leave(child, pid)


def _result(child: subprocess.Popen[bytes], deadline: float) -> list[_Thread]:
    try:
        output, complaint = _read(child, deadline)
        child.wait(max(0.0, deadline - time.monotonic()))
    except (TimeoutError, subprocess.TimeoutExpired):
        raise _NoDump("py-spy didn't answer in time") from None
    if child.returncode != 0:
        raise _NoDump(f"py-spy: {_shorten(complaint.decode(errors='replace'))}")
    try:
        return _DUMP.validate_json(output)
    except ValidationError:
        raise _NoDump("py-spy's answer can't be read") from None


def _read(child: subprocess.Popen[bytes], deadline: float) -> tuple[bytes, bytes]:
    """What it writes to standard output and error. How much that is, the process decides that is looked at.

    Raises TimeoutError, and _NoDump if it is too much.
    """
    said: dict[int, bytearray] = {}
    with selectors.DefaultSelector() as waiting:
        for stream in filter(None, (child.stdout, child.stderr)):
            waiting.register(stream, selectors.EVENT_READ)
            said[stream.fileno()] = bytearray()
        while waiting.get_map():
            ready = waiting.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            for key, _ in ready:
                data = os.read(key.fd, _PIECE)
                said[key.fd] += data
                if not data:
                    waiting.unregister(key.fileobj)
                if len(said[key.fd]) > _OUTPUT_LIMIT:
                    raise _NoDump("its stacks are too large")
    output, complaint = said.values()
    return bytes(output), bytes(complaint)


def _shorten(complaint: str) -> str:
    """Return what py-spy complains about and the cause at the bottom of it, without the backtrace of its own."""
    lines = [line.strip() for line in complaint.partition("Stack backtrace:")[0].splitlines() if line.strip()]
    if not lines:
        return "failed"
    message = lines[0].removeprefix("Error: ")
    return message if len(lines) == 1 else f"{message.rstrip('.')}: {re.sub('^[0-9]+: ', '', lines[-1])}"


def _threads(pid: int, dumped: list[_Thread]) -> dict[int, tuple[Frame, ...]]:
    """Return the frames by tid."""
    if len(dumped) == 1 and dumped[0].os_thread_id is None and _is_single_threaded(pid):
        dumped[0].os_thread_id = pid
    return {
        thread.os_thread_id: tuple(Frame(frame.name, frame.filename, frame.line) for frame in thread.frames)
        for thread in dumped
        if thread.os_thread_id is not None and thread.frames
    }


def _is_single_threaded(pid: int) -> bool:
    try:
        return [task.name for task in Path(f"/proc/{pid}/task").iterdir()] == [str(pid)]
    except OSError:
        return False
