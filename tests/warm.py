"""Guards that needn't import anything any more when they start, for tests that start one each.

Four fifths of what it costs to start a guard goes into its imports. Here a process has done them, and for each guard
that is asked for it forks: the child is given a guard's arguments, directory, environment and standard error, runs the
same program from its beginning, and ends as it would. How a guard starts that is a process of its own from the first
instruction is shown in :mod:`tests.cli`.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import BinaryIO

_REQUEST_LIMIT = 1 << 17
"""Bytes of a request, at most; environments have ten thousand."""


class WarmGuard:
    """A guard as a process: what there is of :class:`subprocess.Popen`."""

    def __init__(self, stove: _Stove, pid: int) -> None:
        self._stove = stove
        self.pid = pid
        self.returncode: int | None = None
        self._fd = os.pidfd_open(pid)  # it can't be reaped before it is asked for

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float) -> int:
        status = self._ended(timeout)
        if status is None:
            raise subprocess.TimeoutExpired("pgguard", timeout)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._fd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _ended(self, seconds: float) -> int | None:
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            if poll.poll(seconds * 1000):
                self.returncode = self._stove.ask({"reap": self.pid})
                os.close(self._fd)
        return self.returncode


class _Stove:
    """The process that has everything imported; one question at a time."""

    def __init__(self, command: Sequence[str]) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def ask(self, question: dict[str, Any], *descriptors: int) -> int:
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(question).encode()], descriptors)
            answer = self._socket.recv(64)
        assert answer, "whoever starts the guards has ended"
        return int(answer)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


_stoves: dict[tuple[str, ...], _Stove] = {}


def heat(*command: str) -> _Stove:
    """Have a process ready that starts guards, as :func:`start` does otherwise when it is asked for the first one."""
    if command not in _stoves:
        _stoves[command] = _Stove((*command, sys.executable, "-P", __file__))
    return _stoves[command]


def start(
    command: Sequence[str],
    module: str,
    arguments: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    stderr: BinaryIO,
) -> WarmGuard:
    """Start a guard.

    Args:
        command: what the process that it is a child of begins with: for other rights than those of the tests.
        module: what is run, with ``-m`` or, if it is a path, as a script.
        arguments: what it is given.
        cwd: its working directory.
        env: its environment. What Python itself wants to know of it is taken from the tests' own.
        stderr: where its standard error goes; the other streams lead nowhere.
    """
    stove = heat(*command)
    question = {"module": module, "arguments": list(arguments), "cwd": str(cwd), "env": dict(env)}
    return WarmGuard(stove, stove.ask(question, stderr.fileno()))


def close() -> None:
    """End the processes that start guards; there are to be no guards any more."""
    while _stoves:
        _stoves.popitem()[1].close()


def _serve(asked: socket.socket) -> dict[str, Any] | None:
    """Answer questions until there are no more: ``None``; or, in a child, what it is to run."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(asked, _REQUEST_LIMIT, 1)
        if not data:
            return None
        question: dict[str, Any] = json.loads(data)
        if "reap" in question:
            answer = os.waitstatus_to_exitcode(os.waitpid(question["reap"], 0)[1])
        elif answer := os.fork():
            for descriptor in descriptors:
                os.close(descriptor)
        else:
            [stderr] = descriptors
            os.dup2(stderr, 2)
            os.close(stderr)
            return question
        asked.send(str(answer).encode())


def _main(asked: socket.socket) -> None:
    import runpy  # noqa: PLC0415 - for the process alone that runs this

    import pgguard.cli.main  # noqa: PLC0415 - likewise
    import pgguard.cli.serve  # noqa: F401, PLC0415 - likewise

    gc.freeze()
    with asked:
        question = _serve(asked)
    if question is None:
        return
    os.chdir(question["cwd"])
    os.environ.clear()
    os.environ.update(question["env"])
    sys.argv[1:] = question["arguments"]
    module = question["module"]
    if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(socket.socket(fileno=int(sys.argv[1])))
