from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pgguard.attribution.drivers import driver_of
from pgguard.attribution.evidence import Driver
from pgguard.attribution.images import read_image
from pgguard.attribution.runtime import Language, Library, Runtime, Server, runtime_of
from tests.attribution.puppets import Puppet
from tests.servers import needs, not_installed

Puppets = Callable[[], Puppet]

_PYTHON = "print('x', flush=True); input()"


@contextmanager
def _running(*command: str, executable: str | None = None, cwd: Path | None = None) -> Iterator[int]:
    """Run a program that says ``x`` when it is ready and ends with its input."""
    with subprocess.Popen(
        command, executable=executable, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"x"
        yield process.pid
        process.communicate(b"\n")


@pytest.mark.parametrize(
    ("language", "program", "script"),
    [
        (Language.RUBY, "ruby", "STDOUT.sync = true; print 'x'; gets"),
        (Language.PERL, "perl", "$| = 1; print 'x'; <STDIN>"),
        (Language.NODE, "node", "process.stdout.write('x'); process.stdin.resume()"),
        (Language.PYTHON, sys.executable, _PYTHON),
    ],
)
def test_an_interpreter_is_known_by_its_program(language: Language, program: str, script: str) -> None:
    if shutil.which(program) is None:
        not_installed(program)
    with _running(program, "-c" if language is Language.PYTHON else "-e", script) as pid:
        assert runtime_of(pid) == Runtime(language)


def test_php_is_known_by_its_program() -> None:
    if shutil.which("php") is None:
        not_installed("php")
    with _running("php", "-r", "echo 'x'; fgets(STDIN);") as pid:
        assert runtime_of(pid).language is Language.PHP


@needs("ruby", found=shutil.which("ruby"))
@pytest.mark.parametrize(
    ("title", "server"),
    [
        ("puma 6.4.2 (tcp://0.0.0.0:3000) [app]", Server.PUMA),
        ("puma: cluster worker 1: 4864 [app]", Server.PUMA),
        ("unicorn worker[0] -c config/unicorn.rb", Server.UNICORN),
        ("ruby /usr/bin/unicorn -c config/unicorn.rb", Server.UNICORN),
        ("/usr/bin/unicorn_rails master -c config/unicorn.rb", Server.UNICORN),
        ("Passenger RubyApp: /srv/app (production)", Server.PASSENGER),
        ("sidekiq 7.2.1 app [0 of 5 busy]", Server.SIDEKIQ),
        ("resque-2.6.0: Forked 123 at 1700000000", Server.RESQUE),
        ("pumactl status", None),
        ("tail -f log/puma.log", None),
    ],
)
def test_a_ruby_server_is_known_by_the_title_that_it_gives_itself(title: str, server: Server | None) -> None:
    with _running("ruby", "-e", f"$0 = {title!r}; STDOUT.sync = true; print 'x'; gets") as pid:
        assert runtime_of(pid) == Runtime(Language.RUBY, server)


@pytest.mark.parametrize(
    ("arguments", "server"),
    [
        (["gunicorn", "app:app"], Server.GUNICORN),
        (["-u", "./celery", "-A", "app", "worker"], Server.CELERY),
        (["-m", "celery", "worker"], Server.CELERY),
        (["./rq", "worker", "-c", "settings"], Server.RQ),
        (["app.py", "celery"], None),
    ],
)
def test_a_python_server_is_known_by_its_script(arguments: list[str], server: Server | None, tmp_path: Path) -> None:
    for name in "gunicorn", "celery", "celery.py", "app.py", "rq":
        (tmp_path / name).write_text(_PYTHON)
    with _running(sys.executable, *arguments, cwd=tmp_path) as pid:
        assert runtime_of(pid) == Runtime(Language.PYTHON, server)


@pytest.mark.parametrize(
    ("title", "server"),
    [
        ("gunicorn: worker [app]", Server.GUNICORN),
        ("[celeryd: celery@host:MainProcess]", Server.CELERY),
        ("rq:worker:f00: Listening on default", Server.RQ),
    ],
)
def test_a_python_server_is_known_by_its_title(title: str, server: Server) -> None:
    with _running(title, "-c", _PYTHON, executable=sys.executable) as pid:
        assert runtime_of(pid) == Runtime(Language.PYTHON, server)


def test_a_title_counts_only_where_the_language_fits() -> None:
    """Anybody can give a process any title."""
    with _running("puma: cluster worker 1: 4864 [app]", "-c", _PYTHON, executable=sys.executable) as pid:
        assert runtime_of(pid) == Runtime(Language.PYTHON)


def test_a_child_that_multiprocessing_has_spawned_is_known(puppet: Puppets) -> None:
    parent = puppet()
    parent.do(
        "import multiprocessing\n"
        "context = multiprocessing.get_context('spawn')\n"
        "barrier = context.Barrier(2)\n"
        "child = context.Process(target=barrier.wait)\n"
        "child.start()"
    )
    child = parent.do("child.pid")
    deadline = time.monotonic() + 30
    # Until it has executed the interpreter anew it is its parent's likeness, and for a moment nothing.
    while runtime_of(child) != Runtime(Language.PYTHON, Server.MULTIPROCESSING):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    parent.do("barrier.wait(); child.join()")


@pytest.mark.parametrize(
    ("module", "library"),
    [
        ("asyncpg", Library.ASYNCPG),
        ("psycopg", Library.PSYCOPG),
        ("psycopg2", Library.PSYCOPG2),
        ("sqlalchemy", Library.SQLALCHEMY),
        ("gevent", Library.GEVENT),
    ],
)
def test_a_python_library_with_a_compiled_part_is_known_by_that(module: str, library: Library, puppet: Puppets) -> None:
    process = puppet()
    assert runtime_of(process.pid).libraries == frozenset()
    if importlib.util.find_spec(module) is None:
        not_installed(module)
    process.do(f"import {module}")
    assert runtime_of(process.pid).libraries == {library}


def test_django_is_known_by_its_script_wherever_that_runs(tmp_path: Path) -> None:
    script = tmp_path / "manage.py"
    script.write_text(_PYTHON)
    with _running(sys.executable, str(script), "runserver") as pid:
        assert runtime_of(pid).libraries == {Library.DJANGO}


def test_django_is_known_by_what_stands_in_the_working_directory(tmp_path: Path) -> None:
    with _running(sys.executable, "-c", _PYTHON, cwd=tmp_path) as pid:
        assert runtime_of(pid).libraries == frozenset()
        (tmp_path / "manage.py").mkdir()
        assert runtime_of(pid).libraries == frozenset()
        (tmp_path / "manage.py").rmdir()
        (tmp_path / "manage.py").touch()
        assert runtime_of(pid).libraries == {Library.DJANGO}


_LOCK = """\
GEM
  remote: https://rubygems.org/
  specs:
    hanami-controller (2.3.1)
      hanami-utils (~> 2.3)
      rails (>= 7)
{gems}
PLATFORMS
  ruby

DEPENDENCIES
  activerecord
"""


@needs("ruby", found=shutil.which("ruby"))
@pytest.mark.parametrize(
    ("gems", "libraries"),
    [
        ([], set()),
        (["pg (1.5.9)"], set()),
        (["sequel (5.84.0)"], {Library.SEQUEL}),
        (["sequel_pg (1.17.1)", "rom-factory (0.13.0)"], set()),
        (["rom (5.4.2)", "rom-sql (3.7.0)", "sequel (5.84.0)"], {Library.ROM, Library.SEQUEL}),
        (["hanami (2.1.1)", "rom-sql (3.6.5)"], {Library.HANAMI, Library.ROM}),
        (["hanami (2.2.0)", "hanami-db (2.2.0)"], {Library.HANAMI, Library.HANAMI_DB}),
        (["activerecord (8.0.0)", "rails (8.0.0)"], {Library.ACTIVE_RECORD, Library.RAILS}),
    ],
)
def test_ruby_libraries_are_known_by_the_bundle_in_the_working_directory(
    gems: list[str], libraries: set[Library], tmp_path: Path
) -> None:
    (tmp_path / "Gemfile.lock").write_text(_LOCK.format(gems="\n".join(f"    {gem}" for gem in gems)))
    with _running("ruby", "-e", "STDOUT.sync = true; print 'x'; gets", cwd=tmp_path) as pid:
        assert runtime_of(pid) == Runtime(Language.RUBY, None, frozenset(libraries))


def test_a_bundle_counts_only_for_ruby(tmp_path: Path) -> None:
    (tmp_path / "Gemfile.lock").write_text(_LOCK.format(gems="    sequel (5.84.0)"))
    with _running(sys.executable, "-c", _PYTHON, cwd=tmp_path) as pid:
        assert runtime_of(pid) == Runtime(Language.PYTHON)


@needs("ruby", found=shutil.which("ruby"))
def test_what_is_no_regular_file_is_neither_waited_for_nor_read_without_end(tmp_path: Path) -> None:
    lock = tmp_path / "Gemfile.lock"
    with _running("ruby", "-e", "STDOUT.sync = true; print 'x'; gets", cwd=tmp_path) as pid:
        os.mkfifo(lock)
        assert runtime_of(pid) == Runtime(Language.RUBY)
        lock.unlink()
        lock.symlink_to("/dev/zero")
        assert runtime_of(pid) == Runtime(Language.RUBY)
        lock.unlink()
        lock.write_text(" " * (1 << 20) + "\n    sequel (5.84.0)\n")
        assert runtime_of(pid) == Runtime(Language.RUBY)


@pytest.mark.parametrize(
    ("packages", "libraries"),
    [
        (["pg"], {Library.NODE_POSTGRES}),
        (["postgres", "pg-native"], {Library.POSTGRES_JS}),
        (["pg", "postgres"], {Library.NODE_POSTGRES, Library.POSTGRES_JS}),
        ([], set()),
    ],
)
@needs("node", found=shutil.which("node"))
def test_node_packages_are_known_by_what_is_installed_in_the_working_directory(
    packages: list[str], libraries: set[Library], tmp_path: Path
) -> None:
    for package in packages:
        (tmp_path / "node_modules" / package).mkdir(parents=True)
        (tmp_path / "node_modules" / package / "package.json").touch()
    with _running("node", "-e", "process.stdout.write('x'); process.stdin.resume()", cwd=tmp_path) as pid:
        assert runtime_of(pid) == Runtime(Language.NODE, None, frozenset(libraries))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="runs x86-64 code")
@pytest.mark.parametrize(("note", "language"), [(b"Go\0\0", Language.GO), (b"GNU\0", None)])
def test_a_go_program_is_known_by_its_build_id(note: bytes, language: Language | None, tmp_path: Path) -> None:
    # write(1, "x", 1) from the stack; read(0, …, 1); exit(0)
    code = bytes.fromhex(
        "6a78 b801000000 bf01000000 4889e6 ba01000000 0f05 31c0 31ff 4889e6 ba01000000 0f05 b83c000000 31ff 0f05"
    )
    notes = struct.pack("<III", 4, 5, 3) + b"XYZ\0" + bytes(8) + struct.pack("<III", 4, 4, 4) + note + b"id\0\0"
    base, start = 0x400000, 64 + 2 * 56
    size = start + len(code) + len(notes)
    program = tmp_path / "server"
    program.write_bytes(
        struct.pack("<4sBBB9xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 2, 62, 1, base + start, 64, 0, 0, 64, 56, 2, 0, 0, 0)
        + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000)
        + struct.pack("<IIQQQQQQ", 4, 4, start + len(code), 0, 0, len(notes), len(notes), 4)
        + code
        + notes
    )
    program.chmod(0o755)
    with _running(str(program)) as pid:
        assert runtime_of(pid) == Runtime(language)


def test_a_process_that_is_gone_shows_nothing(puppet: Puppets) -> None:
    process = puppet()
    process.end()
    assert runtime_of(process.pid) == Runtime()


def test_an_image_is_read_once_and_tells_as_much_as_the_pid(puppet: Puppets) -> None:
    process = puppet()
    process.do("import psycopg2")
    image = read_image(process.pid)
    assert image is not None
    process.end()
    assert runtime_of(image) == Runtime(Language.PYTHON, None, frozenset({Library.PSYCOPG2}))
    assert driver_of(image) is Driver.LIBPQ
    assert read_image(process.pid) is None


class TestSomebodyElsesFiles:
    """What stands in the working directory of a process is its own to choose, and root may read what it may not."""

    GEMS = "GEM\n  specs:\n    sequel (5.84.0)\n"
    RUBY = ("ruby", "-e", "STDOUT.sync = true; print 'x'; gets")

    @pytest.fixture
    def libraries(self, tmp_path: Path) -> Callable[[], frozenset[Library]]:
        if shutil.which("ruby") is None:
            not_installed("ruby")

        def of_a_process_of_nobodys() -> frozenset[Library]:
            tmp_path.chmod(0o755)
            wrapper = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups") if os.geteuid() == 0 else ()
            with _running(*wrapper, *self.RUBY, cwd=tmp_path) as pid:
                return runtime_of(pid).libraries

        return of_a_process_of_nobodys

    def test_its_own_are_read(self, libraries: Callable[[], frozenset[Library]], tmp_path: Path) -> None:
        (tmp_path / "Gemfile.lock").write_text(self.GEMS)
        assert libraries() == {Library.SEQUEL}

    def test_a_link_to_what_it_may_read_is_followed(
        self, libraries: Callable[[], frozenset[Library]], tmp_path: Path
    ) -> None:
        (tmp_path / "other").write_text(self.GEMS)
        (tmp_path / "Gemfile.lock").symlink_to("other")
        assert libraries() == {Library.SEQUEL}

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root may read more than others")
    def test_a_link_to_what_it_may_not_read_is_not(
        self, libraries: Callable[[], frozenset[Library]], tmp_path: Path
    ) -> None:
        (tmp_path / "secret").write_text(self.GEMS)
        (tmp_path / "secret").chmod(0o600)
        (tmp_path / "Gemfile.lock").symlink_to("secret")
        assert libraries() == frozenset()

    @pytest.mark.parametrize("target", ["/dev/zero", "pipe", "."])
    def test_what_is_no_file_is_neither_opened_nor_waited_for(
        self, libraries: Callable[[], frozenset[Library]], tmp_path: Path, target: str
    ) -> None:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "Gemfile.lock").symlink_to(target)
        assert libraries() == frozenset()

    def test_a_file_without_end_is_read_in_part(
        self, libraries: Callable[[], frozenset[Library]], tmp_path: Path
    ) -> None:
        with (tmp_path / "Gemfile.lock").open("w") as file:
            file.write(self.GEMS)
            file.truncate(1 << 40)  # it takes no room on the disk
        assert libraries() == {Library.SEQUEL}
