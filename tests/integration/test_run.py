"""``pgguard run`` with real commands and a real server: what they do behind it, and what it says of them."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.running import PROGRAMS, interpreter
from tests.servers import Address, not_installed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tests.servers import Server

pytestmark = pytest.mark.parametrize("server", ["embedded"], indirect=True, scope="session")

SECONDS = 40.0
BEHIND = PROGRAMS / "behind"
BLIND = ("--attribution", "off")
"""Where it isn't the matter who did something: it starts sooner."""


def url(address: Address, scheme: str = "postgresql") -> str:
    return f"{scheme}://postgres@{address.host}:{address.port}/postgres"


def started(
    command: Sequence[str | Path],
    server: Server,
    cwd: Path,
    options: Sequence[str | Path] = BLIND,
    *,
    environ: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pgguard", "run", *options, "--", *command],
        cwd=cwd,
        env={**server.tcp.environ(), "DATABASE_URL": url(server.tcp), "COLUMNS": "120", **(environ or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its status, and what it has said."""
    try:
        out, said = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert "Traceback" not in said, said
    return process.returncode, out, said


def after_the_start(said: str) -> str:
    """What has been said since the guard was ready."""
    return re.split(r"(?m)^pgguard: ready on .*\n", said)[1]


SHARES = """
import os, sys, time, psycopg
connection = psycopg.connect(os.environ["DATABASE_URL"], autocommit=True, prepare_threshold=None)
connection.execute("SELECT 1")
if os.fork() == 0:
    connection.execute("SELECT 2")
    os._exit(0)
os.wait()
connection.execute("SELECT 3")
connection.close()
time.sleep(0.5)
print("shared", flush=True)
print("the end", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


def test_faults_are_told_in_the_end_and_by_the_exit_status_of_a_command_that_has_succeeded(
    server: Server, tmp_path: Path
) -> None:
    outputs = [f"--{kind}={tmp_path / kind}" for kind in ("faults", "html", "markdown")]
    runs = {
        name: started((sys.executable, "-c", SHARES, status), server, tmp_path, options)
        for name, status, options in (
            ("told", "0", outputs),
            ("never", "0", ["--fail-on=never", "--quiet"]),
            ("failed", "3", ["--fail-on=warning", "--quiet"]),
        )
    }
    done = {name: ended(process) for name, process in runs.items()}
    assert {name: status for name, (status, _, _) in done.items()} == {"told": 66, "never": 0, "failed": 3}
    assert all(out == "shared\n" for _, out, _ in done.values())
    said = after_the_start(done["told"][2])
    # Nothing while it ran; then the gravest first, in full, and the summary.
    report, _, summary = said.partition("\npgguard: 1 session, ")
    assert report.startswith("the end\n=====")
    assert "pgguard: ERROR: shared-by-processes: two processes use one connection" in report
    assert "What to change:" in report
    assert summary.index("pgguard: error: shared-by-processes") < summary.index(
        "pgguard: warning: inherited-connection"
    )
    assert summary.endswith(f"(see --fail-on)\npgguard: see {tmp_path}/markdown and {tmp_path}/html\n")
    kinds = {json.loads(line)["kind"] for line in (tmp_path / "faults").read_text().splitlines()}
    assert kinds == {"shared-by-processes", "inherited-connection"}
    assert "shared-by-processes" in (tmp_path / "html").read_text()
    assert "```mermaid" in (tmp_path / "markdown").read_text()
    for name in ("never", "failed"):
        end, whole, *causes = done[name][2].splitlines()
        assert end == "the end"
        assert whole == "pgguard: 1 session, 2 faults from 2 causes"
        assert [re.findall(r"^pgguard: (\w+): ", cause) for cause in causes] == [["error"], ["warning"]]


THREE = """
import os, psycopg, sqlalchemy
with psycopg.connect(os.environ["DATABASE_URL"]) as one, psycopg.connect("") as two:
    engine = sqlalchemy.create_engine(os.environ["SQLALCHEMY_DATABASE_URI"])
    with engine.connect() as three:
        print(three.execute(sqlalchemy.text("SELECT 3")).scalar(), flush=True)
    engine.dispose()
with psycopg.connect(os.environ["OTHER_URL"]) as other:
    pass
"""


def test_three_variables_lead_through_the_guard_and_another_servers_does_not(server: Server, tmp_path: Path) -> None:
    """``OTHER_URL`` leads to the same server by its socket, and so past the guard."""
    other = f"postgresql://postgres@/postgres?host={server.unix.host}&port={server.unix.port}"
    environ = {"SQLALCHEMY_DATABASE_URI": url(server.tcp, "postgresql+psycopg2"), "OTHER_URL": other}
    status, out, said = ended(started((sys.executable, "-c", THREE), server, tmp_path, environ=environ))
    assert (status, out) == (0, "3\n")
    assert after_the_start(said) == "pgguard: 3 sessions, no faults\n", "one line is all"
    [ready] = re.findall(r"^pgguard: ready on .*", said, re.MULTILINE)
    assert all(name in ready for name in ("DATABASE_URL", "SQLALCHEMY_DATABASE_URI", "PGPORT"))
    assert "OTHER_URL" not in ready


def test_a_server_on_a_socket_is_guarded_on_a_socket_that_goes_with_the_guard(server: Server, tmp_path: Path) -> None:
    code = "import os, psycopg; print(os.environ['PGHOST']); psycopg.connect('').close()"
    process = subprocess.Popen(
        [sys.executable, "-m", "pgguard", "run", *BLIND, "--", sys.executable, "-c", code],
        cwd=tmp_path,
        env=server.unix.environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    status, out, said = ended(process)
    assert status == 0, said
    assert after_the_start(said) == "pgguard: 1 session, no faults\n"
    assert not Path(out.strip()).exists()


def test_an_address_in_a_file_is_told_and_what_to_do(server: Server, tmp_path: Path) -> None:
    (tmp_path / "address").write_text(server.tcp.conninfo)
    code = "import psycopg; psycopg.connect(open('address').read()).close()"
    status, _, said = ended(started((sys.executable, "-c", code), server, tmp_path))
    assert status == 0
    assert "pgguard: no connection came through the guard on 127.0.0.1:" in said
    # The way out that needs no other address of the server.
    listen = [*BLIND, "--upstream", server.tcp.conninfo, "--listen", f"unix:{tmp_path}"]
    if len(os.fsencode(tmp_path)) < 90:
        (tmp_path / "address").write_text(f"host={tmp_path} user=postgres dbname=postgres")
        status, _, said = ended(started((sys.executable, "-c", code), server, tmp_path, listen))
        assert status == 0
        assert after_the_start(said) == "pgguard: 1 session, no faults\n"


# After the command


def goes_on(server: Server, cwd: Path, options: Sequence[str], *how: str) -> subprocess.Popen[str]:
    """A command that leaves a process behind, which goes on until there is a file of this name."""
    return started((sys.executable, BEHIND / "goes_on.py", "end", *how), server, cwd, options)


def announcement(process: subprocess.Popen[str]) -> str:
    """What a guard says that goes on."""
    assert process.stderr is not None
    while "; Ctrl-C ends it" not in (line := process.stderr.readline()):
        assert line
    return line


def test_the_guard_of_a_program_that_goes_on_stays_until_its_last_connection_has_ended(
    server: Server, tmp_path: Path
) -> None:
    """Be it a daemon or not; and its parent is the guard then, which so may look at its threads."""
    daemon = goes_on(server, tmp_path, [], "daemon", "works")
    child = goes_on(server, tmp_path, BLIND, "works")
    for process in (daemon, child):
        said = re.fullmatch(
            r"pgguard: \S+ has ended \(exit status 0\), but 1 connection is still open(.*): the guard goes on until it "
            r"is closed; Ctrl-C ends it\n",
            announcement(process),
        )
        assert said is not None
        assert ("goes_on.py" in said[1]) == (process is daemon), "who has it open, where that is looked at"
    (tmp_path / "end").touch()
    for process in (daemon, child):
        assert ended(process) == (0, f"done {process.pid}\n", "pgguard: 1 session, no faults\n")


def test_a_connection_that_is_left_open_is_leaked_unless_it_is_used_or_a_daemons(
    server: Server, tmp_path: Path
) -> None:
    leaked = goes_on(server, tmp_path, ["--linger=3", "--fail-on=warning"])
    others = [goes_on(server, tmp_path, ["--linger=3", "--fail-on=warning"], how) for how in ("works", "daemon")]
    status, _, said = ended(leaked)
    assert status == 66
    assert "pgguard: WARNING: leaked-connection: a connection was left open" in said
    summary = re.search(
        r"^SUMMARY: pgguard: leaked-connection: the connection that pid (\d+) \(.*\) opened was still open when the "
        r"command had ended: pid (\d+) \(.*\) has it open",
        said,
        re.MULTILINE,
    )
    assert summary is not None, said
    assert summary[1] == summary[2] != str(leaked.pid)
    for process in others:
        status, _, said = ended(process)
        assert status == 0, said
        assert "for 3 s at most" in said
        assert "leaked-connection" not in said
        assert after_the_start(said).endswith("pgguard: 1 session, no faults\n")


def test_ctrl_c_ends_a_guard_that_goes_on(server: Server, tmp_path: Path) -> None:
    process = goes_on(server, tmp_path, BLIND, "daemon")
    announcement(process)
    process.send_signal(signal.SIGINT)
    assert ended(process) == (0, "", "pgguard: 1 session, no faults\n")


# Programs that people run


def test_a_pipeline_of_a_shell(server: Server, tmp_path: Path) -> None:
    code = "import os, psycopg; print(*psycopg.connect(os.environ['DATABASE_URL']).execute('SELECT 41').fetchone())"
    shell = f'{sys.executable} -c "{code}" | sed s/1/2/; exit 5'
    status, out, said = ended(started(("sh", "-c", shell), server, tmp_path))
    assert (status, out) == (5, "42\n")
    assert after_the_start(said) == "pgguard: 1 session, no faults\n"


def test_pytest_in_two_workers(server: Server, tmp_path: Path) -> None:
    pytest_ = (sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "-c", "/dev/null")
    environ = {"PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = (*pytest_, "-p", "xdist", "--rootdir", str(tmp_path), str(BEHIND / "check_database.py"))
    status, out, said = ended(started(command, server, tmp_path, environ=environ))
    assert status == 0, out
    assert "4 passed" in out
    assert after_the_start(said) == "pgguard: 4 sessions, no faults\n"


def test_djangos_tests(server: Server, tmp_path: Path) -> None:
    command = (sys.executable, BEHIND / "site" / "manage.py", "test", BEHIND / "site")
    status, _, said = ended(started(command, server, tmp_path))
    assert status == 0, said
    assert "\nRan 1 test in " in said
    assert re.search(r"^pgguard: \d+ sessions, no faults\n\Z", said, re.MULTILINE)


def test_a_celery_worker(server: Server, tmp_path: Path) -> None:
    options = ("--app", "tasks", "--workdir", str(BEHIND))
    environ = {"TASKS": str(tmp_path / "tasks"), "PYTHONDONTWRITEBYTECODE": "1", "C_FORCE_ROOT": "1"}
    celery = (sys.executable, "-W", "ignore", "-m", "celery", *options)
    send = "import tasks; print([tasks.ask.delay(n).get(timeout=30) for n in (7, 8)])"
    shell = """
"$@" worker --concurrency 2 --pool prefork --without-gossip --without-mingle --loglevel ERROR >&2 &
$PYTHON -W ignore -c "$SEND"
kill -TERM $!
wait $!
"""
    environ |= {"PYTHON": sys.executable, "SEND": send, "PYTHONPATH": str(BEHIND)}
    status, out, said = ended(started(("sh", "-c", shell, "sh", *celery), server, tmp_path, environ=environ))
    assert (status, out) == (0, "[7, 8]\n"), said
    assert said.endswith("pgguard: 2 sessions, no faults\n")


@contextmanager
def serving(
    command: Sequence[str | Path], listening: str, server: Server, cwd: Path
) -> Iterator[tuple[subprocess.Popen[str], int, Path]]:
    """A web server behind a guard, and its port; what both say goes to a file."""
    log = cwd / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "pgguard", "run", *BLIND, "--", *command],
            cwd=cwd,
            env={**server.tcp.environ(), "DATABASE_URL": url(server.tcp), "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
        )
    try:
        deadline = time.monotonic() + SECONDS
        while (found := re.search(listening, log.read_text())) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield process, int(found[1]), log  # type: ignore[misc]
    finally:
        process.kill()
        process.wait(SECONDS)


def ask(port: int, number: int) -> str:
    """Ask a web server, until it answers."""
    deadline = time.monotonic() + SECONDS
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        try:
            connection.request("GET", f"/?{number}")
            return connection.getresponse().read().decode()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        finally:
            connection.close()


SERVERS = {
    "gunicorn": (
        (sys.executable, "-m", "gunicorn", "--chdir", str(BEHIND), "--workers", "2", "--bind", "127.0.0.1:0", "wsgi"),
        r"Listening at: http://127\.0\.0\.1:(\d+)",
        0,
    ),
    "uvicorn": (
        (
            sys.executable,
            "-m",
            "uvicorn",
            "--app-dir",
            str(BEHIND),
            "--workers",
            "2",
            "--port",
            "0",
            "asgi:application",
        ),
        r"Uvicorn running on http://127\.0\.0\.1:(\d+)",
        0,
    ),
    "puma": (
        ("bundle", "exec", "puma", "-C", "corrected.rb", "config.ru"),
        r"Listening on http://127\.0\.0\.1:(\d+)",
        128 + signal.SIGTERM,
    ),
}
"""How each is started, what it says when it listens, and its exit status at SIGTERM."""


@pytest.mark.parametrize("name", SERVERS)
def test_web_servers_with_workers_end_as_they_do_without_a_guard(name: str, server: Server, tmp_path: Path) -> None:
    command, listening, expected = SERVERS[name]
    if name == "puma":
        interpreter("ruby", "-rpg", "-rsequel", "-rpuma")
        if shutil.which("bundle") is None:
            not_installed("Bundler")
        gems = "".join(f'gem "{gem}"\n' for gem in ("puma", "pg", "sequel"))
        (tmp_path / "Gemfile").write_text(f'source "https://rubygems.org"\n{gems}')
        for file in (PROGRAMS / "puma").iterdir():
            shutil.copy(file, tmp_path)
    with serving(command, listening, server, tmp_path) as (process, port, log):
        assert [ask(port, number) for number in (3, 4)] == ["3", "4"]
        process.send_signal(signal.SIGTERM)
        status = process.wait(SECONDS)
        said = log.read_text()
    assert status == expected, said
    assert re.search(r"^pgguard: \d+ sessions?, no faults\n\Z", said, re.MULTILINE), said
