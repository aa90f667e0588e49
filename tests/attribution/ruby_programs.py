"""Real Ruby programs that have loaded the file that answers, and wait for their standard input to go on."""

from __future__ import annotations

import os
import select
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pgguard.attribution.processes import read_process
from pgguard.attribution.ruby.loading import ruby_variables
from tests.integration.running import interpreter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pgguard.attribution.dumps import Seen
    from pgguard.attribution.evidence import Process
    from pgguard.attribution.ruby.pipes import Question, RubyPipes

SECONDS = 30.0


def environment(pipes: RubyPipes, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a program that is to answer."""
    return {**environ, **ruby_variables(environ, pipes.directory)}


class RubyProgram:
    """A running program, which says things, one a line, and waits for lines in between."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.popen = process

    @property
    def pid(self) -> int:
        return self.popen.pid

    def read(self) -> str:
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line, "it has ended"
        return line.rstrip("\n")

    def go_on(self) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()


@contextmanager
def ruby(script: str, environ: Mapping[str, str], *options: str) -> Iterator[RubyProgram]:
    command = [interpreter("ruby"), *options, "-e", f"$stdout.sync = true\n{script}"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(environ)
    ) as process:
        try:
            yield RubyProgram(process)
        finally:
            process.kill()


def process_of(pid: int) -> Process:
    process = read_process(pid)
    assert process is not None
    return process


def answer(question: Question) -> Mapping[int, Seen]:
    """Wait for an answer."""
    deadline = time.monotonic() + SECONDS
    try:
        while not question.is_over:
            assert time.monotonic() < deadline
            for pipe in select.select(question.pipes, [], [], 0.1)[0]:
                question.hear(pipe)
        return question.result()
    finally:
        question.end()


def wait_until(condition: object) -> None:
    """Wait until what is called says yes."""
    assert callable(condition)
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
