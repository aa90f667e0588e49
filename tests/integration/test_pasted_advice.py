"""Advice as its readers take it: pasted from the record into the program that misuses its connection.

Each case is a directory with such a program. It is run; the code is taken from the record of what it did and put where
its comments say, into the file that they name, at the place that the program marks, or at the file's end; and then the
program is run again. Nothing is to be left but what the advice says will be: a mention of heirs that have connections
of their own.
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from pgguard.faults.advice.rows import TAKEN_ALONG
from tests.integration.running import PROGRAMS, Program, interpreter, running, running_redis
from tests.integration.test_preforking import WebServer
from tests.servers import not_installed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import StartGuard
    from tests.guard_process import GuardProcess
    from tests.servers import Address

pytestmark = [
    pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session"),
    pytest.mark.timeout(180),
]

_FILE = r"[\w/.]+\.(?:rb|ru|py|pl|php|yml)\b"
_KINDS = {str(kind) for kind in TAKEN_ALONG}


# Pasting


def snippets(code: str) -> list[tuple[str, str]]:
    """The parts of an advice's code, and the file that each names."""
    parts = re.split(rf"\n\n(?=# [^\n]*{_FILE})", code.removeprefix("<?php "))
    return [(re.findall(_FILE, part.splitlines()[0])[0], part) for part in parts]


def paste(code: str, directory: Path) -> None:
    """Put an advice's code into a program."""
    for name, snippet in snippets(code):
        own = directory / name
        marked = [
            (file, mark)
            for file in sorted(directory.rglob("*.*"))
            if "__pycache__" not in file.parts
            for mark in (rf", {re.escape(name)}", "")
            if (mark or file == own) and _mark(mark).search(file.read_text())
        ]
        if marked:
            file, mark = marked[0]
            pasted = _mark(mark).sub(lambda match: textwrap.indent(snippet, match["indent"]) + "\n", file.read_text())  # noqa: B023
            file.write_text(pasted)
        else:
            own.parent.mkdir(exist_ok=True)
            before = own.read_text() if own.exists() else ""
            own.write_text(f"{before}\n{snippet}\n" if before else f"{snippet}\n")


def _mark(name: str) -> re.Pattern[str]:
    place = r"(\n|, in the place of\n(.*\n)*? *\S+ up to here\n)"
    return re.compile(rf"^(?P<indent> *)\S+ here goes the advice{name}{place}", re.MULTILINE)


# Running


class Case(NamedTuple):
    command: Callable[[], list[str | Path]]
    occupy: Callable[[Program, Callable[[], bool]], object] = lambda *_: None
    """Gives a program that doesn't end by itself something to do, until there was enough of it."""
    worked: Callable[[Program], object] = lambda _: None
    """Waits until one that finds something to do itself has done enough of it, as it does when it is cured."""
    more: tuple[str, ...] = ()
    """Arguments when the advice has been pasted: what its text says besides."""
    ends: signal.Signals | None = signal.SIGTERM
    """What has it end well; ``None``: it ends by itself."""


def _loaded(listening: str, booted: str) -> Callable[[Program, Callable[[], bool]], object]:
    def load(program: Program, enough: Callable[[], bool]) -> None:
        WebServer(program, listening, booted).load(100, seconds=3, patience=1, enough=enough)

    return load


def _worked(program: Program) -> None:
    program.wait_for(r"asked \d+: ", count=5)


def _ruby(*needs: str) -> Callable[[], list[str | Path]]:
    return lambda: [interpreter("ruby", *needs), "fork.rb"]


def _puma() -> list[str | Path]:
    interpreter("ruby", "-rpg", "-rsequel", "-rpuma")
    # It prints what it says to standard output.
    return ["sh", "-c", 'exec "$0" >&2', shutil.which("puma") or not_installed("Puma")]


def _unicorn() -> list[str | Path]:
    return [shutil.which("unicorn") or not_installed("Unicorn"), "-c", "config/unicorn.rb"]


def _gunicorn() -> list[str | Path]:
    options = ["--preload", "--bind", "127.0.0.1:0", "--workers", "2", "--timeout", "60", "app:application"]
    return [sys.executable, "-m", "gunicorn", *options]


def _uwsgi() -> list[str | Path]:
    """Debian's, which runs Debian's Python with what the tests have installed."""
    major, minor = sys.version_info[:2]
    command = shutil.which("uwsgi")
    if command is None or not Path(f"/usr/lib/uwsgi/plugins/python{major}{minor}_plugin.so").exists():
        not_installed("uWSGI for this Python")
    paths = [".", "/usr/lib/python3/dist-packages", sysconfig.get_path("purelib")]
    options = [
        "--http-socket",
        "127.0.0.1:0",
        "--master",
        "--die-on-term",
        "--processes",
        "2",
        "--wsgi-file",
        "wsgi.py",
    ]
    return [command, "--plugins", "python3", *(f"--pythonpath={path}" for path in paths), *options]


def _celery() -> list[str | Path]:
    return [sys.executable, "-m", "celery", "-A", "tasks", "worker", "--concurrency", "2", "--without-mingle"]


def _rq() -> list[str | Path]:
    # The file enqueue.py must have nothing to do with the worker's process.
    return ["sh", "-c", '"$0" enqueue.py && exec "$@"', sys.executable, Path(sys.executable).with_name("rq"), *_RQ]


def _python() -> list[str | Path]:
    return [sys.executable, "main.py"]


def _perl() -> list[str | Path]:
    return [interpreter("perl", "-MDBD::Pg"), "fork.pl"]


def _php() -> list[str | Path]:
    php = shutil.which("php")
    if php is None or b"pcntl\n" not in subprocess.run([php, "-m"], check=True, capture_output=True).stdout:
        not_installed("PHP with pcntl")
    return [php, "fork.php"]


_RQ = ("worker", "-c", "settings", "--burst")
_ON_GUNICORN = _loaded(r"Listening at: http://127\.0\.0\.1:(\d+)", r"Booting worker with pid: (\d+)")
_ON_PUMA = _loaded(r"Listening on http://127\.0\.0\.1:(\d+)", r"Worker \d \(PID: (\d+)\) booted")
_ON_UWSGI = _loaded(r"bound to TCP address 127\.0\.0\.1:(\d+)", r"spawned uWSGI worker \d \(pid: (\d+)")
_ON_UNICORN = _loaded(r"listening on addr=127\.0\.0\.1:(\d+)", r"#(\d+)\]  INFO -- : worker=\d ready")

CASES = {
    "puma_sequel": Case(_puma, _ON_PUMA),
    "puma_pg": Case(_puma, _ON_PUMA),
    "unicorn_pg": Case(_unicorn, _ON_UNICORN, ends=signal.SIGQUIT),
    "ruby_sequel": Case(_ruby("-rpg", "-rsequel"), ends=None),
    "ruby_pg": Case(_ruby("-rpg"), ends=None),
    "gunicorn_sqlalchemy": Case(_gunicorn, _ON_GUNICORN),
    "gunicorn_psycopg": Case(_gunicorn, _ON_GUNICORN),
    "gunicorn_psycopg2": Case(_gunicorn, _ON_GUNICORN),
    "gunicorn_django": Case(_gunicorn, _ON_GUNICORN),
    "uwsgi_sqlalchemy": Case(_uwsgi, _ON_UWSGI),
    "celery_sqlalchemy": Case(_celery, worked=_worked),
    "celery_django": Case(_celery, worked=_worked),
    "rq_sqlalchemy": Case(_rq, ends=None, more=("--worker-class", "worker.ForkingWorker")),
    "multiprocessing_sqlalchemy": Case(_python, ends=None),
    "multiprocessing_django": Case(_python, ends=None),
    "fork_psycopg": Case(_python, ends=None),
    "perl_dbi": Case(_perl, ends=None),
    "php_pdo": Case(_php, ends=None),
    "php_pgsql": Case(_php, ends=None),
}


def advised(guard: GuardProcess) -> list[str]:
    """The code that records of connections that a fork took along advise; not those of what the advice leaves.

    Of a process that was gone before it could be looked at it isn't known what it runs, and so what it needs. Repeats
    have no advice of their own.
    """
    faults = [fault for fault in guard.faults() if fault["kind"] in _KINDS and fault["severity"] != "info"]
    advice = [fault["advice"] for fault in faults if fault["repeat_of"] is None]
    return [one["code"] for one in advice if one["code"] is not None]


@pytest.fixture(scope="session")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis server for RQ's jobs: where it is."""
    with running_redis(tmp_path_factory.mktemp("redis")) as url:
        yield url


@contextmanager
def started(case: Case, directory: Path, address: Address, redis: str | None, *more: str) -> Iterator[Program]:
    """A program that connects through the guard."""
    environ = {"DATABASE_URL": f"postgresql://postgres@/postgres?host={address.host}&port={address.port}"}
    if redis is not None:
        environ["REDIS_URL"] = redis
    with running([*case.command(), *more], address, directory.parent, cwd=directory, environ=environ) as program:
        yield program


@pytest.mark.parametrize("transport", ["unix"])
@pytest.mark.parametrize("name", CASES)
def test_the_advice_cures_the_program_that_it_is_pasted_into(
    name: str, start_guard: StartGuard, transport: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    del transport
    redis = request.getfixturevalue("redis") if name.startswith("rq") else None
    case = CASES[name]
    directory = tmp_path / name
    shutil.copytree(PROGRAMS / "advice" / name, directory)
    # Where the first process was gone before it could be looked at, the next one's record is in full as well.
    guard = start_guard(unlimited=True)
    deadline = time.monotonic() + 40
    while not advised(guard):
        assert time.monotonic() < deadline, guard.faults()
        with started(case, directory, guard.unix, redis) as program:
            again = time.monotonic() + 10
            # It may hang by then, have failed, or have ended before it could be looked at.
            while not advised(guard) and not program.ended and time.monotonic() < again:
                case.occupy(program, lambda: bool(advised(guard)))
                time.sleep(0.02)
    guard.stop()
    code = advised(guard)[0]

    paste(code, directory)
    guard = start_guard()
    with started(case, directory, guard.unix, redis, *case.more) as program:
        for _ in range(3):
            case.occupy(program, lambda: False)
        case.worked(program)
        if case.ends is not None:
            program.send_signal(case.ends)
        status = program.wait()
        log = program.log
    assert status == 0 or case.ends is not None, log
    guard.stop()
    left = [
        f"{fault['kind']}, {fault['severity']}: {fault['summary']}"
        for fault in guard.faults()
        if (fault["kind"], fault["severity"]) != ("inherited-connection", "info")
    ]
    assert left == [], f"{code}\n{log}"
