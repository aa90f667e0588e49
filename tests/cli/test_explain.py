"""``pgguard explain`` as people and scripts run it."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from types import ModuleType

import pytest

from pgguard.attribution.runtime import Language, Library, Server
from pgguard.cli.explain import explain, software_names
from pgguard.faults.advice import advice_for, advised, advised_software, closing, exhaustion
from pgguard.faults.catalogue import CATALOGUE, Advice
from pgguard.session.verdicts import Kind
from tests.cli.conftest import Refused
from tests.proxy.spawned import environment, run


def test_it_lists_the_kinds(tmp_path: Path) -> None:
    done = run("explain", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for kind, entry in CATALOGUE.items():
        assert re.search(rf"^{kind} +{entry.severity} +{re.escape(entry.title)}$", done.stdout, re.MULTILINE)


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def _printed(capsys: pytest.CaptureFixture[str], kind: str, *software: str) -> str:
    assert explain(kind, software) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", Kind)
def test_it_says_everything_about_a_kind(kind: Kind, capsys: pytest.CaptureFixture[str]) -> None:
    said = _printed(capsys, kind)
    entry = CATALOGUE[kind]
    words = " ".join(said.split())
    for text in entry.title, entry.severity_rule, entry.meaning, entry.cause, entry.advice.text, *entry.fixes:
        assert text in words
    assert f'{kind} = "log"' in words
    assert (f'{kind} = "reject"' in words) is entry.can_reject
    assert (f'{kind} = "drop"' in words) is entry.can_drop
    assert len(said.splitlines()) <= 110
    for what in advised_software(kind):
        assert str(what) in words, "what there is code for is listed"
    for runtime in advised(kind):
        code = advice_for(kind, [runtime]).code
        assert code is None or code not in said, "and isn't shown unless it is asked for"


@pytest.mark.parametrize(
    ("kind", "cases"),
    [(Kind.UNCLEAN_CLOSE, closing.CASES), (Kind.CONNECTION_EXHAUSTION, exhaustion.CASES)],
)
def test_it_says_what_to_change_case_by_case(
    kind: Kind, cases: Mapping[str, Advice], capsys: pytest.CaptureFixture[str]
) -> None:
    words = " ".join(_printed(capsys, kind).split())
    for case, advice in cases.items():
        assert f"{case}: {advice.title}. {advice.text}" in words


@pytest.mark.parametrize("module", [closing, exhaustion])
def test_no_case_is_left_out(module: ModuleType) -> None:
    whole = {value for value in vars(module).values() if isinstance(value, Advice)}
    assert whole | set(getattr(module, "_LIMITS", {}).values()) == set(module.CASES.values())


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Kind.SHARED_BY_THREADS, "also ends the session."),
        (Kind.UNREAD_ANSWER, "also ends the session if it is an error."),
        (Kind.PROTOCOL_VIOLATION, "also ends the session if it is an error."),
        (Kind.UNCLEAN_CLOSE, "does the same."),
        (Kind.IDLE_IN_TRANSACTION, "does the same."),
    ],
)
def test_it_says_what_mode_reject_does(kind: Kind, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = " ".join(_printed(capsys, kind).split())
    assert f"Mode log records it. Mode reject {says} The configuration file can say otherwise:" in words


# For what the application runs


@pytest.mark.parametrize("kind", Kind)
def test_all_advice_can_be_had_by_naming_what_it_is_for(kind: Kind, capsys: pytest.CaptureFixture[str]) -> None:
    for runtime in advised(kind):
        advice = advice_for(kind, [runtime])
        names = [str(what) for what in (*runtime.libraries, runtime.server) if what is not None]
        said = _printed(capsys, kind, *(names or [str(runtime.language)]))
        words = " ".join(said.split())
        assert f"What to change in {' with '.join(names) or runtime.language}: " in words
        assert advice.text in words
        for line in (advice.code or "").splitlines():
            assert f"\n    {line}\n".replace("    \n", "\n") in said
        for source in advice.sources:
            assert f"\n  See {source}\n" in said
        assert len(said.splitlines()) <= 90


@pytest.mark.parametrize("software", [Server, Library, Language])
def test_whatever_advice_is_for_can_be_named(software: type[StrEnum], capsys: pytest.CaptureFixture[str]) -> None:
    known = advised_software()
    assert {str(what) for what in known if isinstance(what, software)} <= set(software_names())
    for what in software:
        if what in known:
            kind = next(kind for kind in Kind if what in advised_software(kind))
            assert what in _printed(capsys, kind, what.upper().replace(" ", "-"))


@pytest.mark.parametrize(
    ("name", "is_for"),
    [("activerecord", "Active Record"), ("Rails", "Active Record"), ("node", "Node.js"), ("golang", "Go")],
)
def test_other_names_will_do(name: str, is_for: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = next(kind for kind in Kind if is_for in map(str, advised_software(kind)))
    assert f"What to change in {is_for}" in _printed(capsys, kind, name)


def test_what_runs_together_is_named_together(capsys: pytest.CaptureFixture[str]) -> None:
    said = _printed(capsys, "shared-by-processes", "gunicorn", "Django")
    assert "What to change in Django with gunicorn" in said
    assert "connections.close_all()" in said
    assert "gunicorn.conf.py" in said


def test_of_a_language_it_lists_what_there_is_more_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    said = " ".join(_printed(capsys, "shared-by-processes", "python").split())
    assert (
        "pgguard explain shared-by-processes --for NAME, where NAME is one of: asyncpg, Celery, Django, gunicorn, "
        in said
    )
    assert "Puma" not in said


def test_where_there_is_nothing_special_it_says_what_holds_in_general(capsys: pytest.CaptureFixture[str]) -> None:
    said = " ".join(_printed(capsys, "untracked", "puma").split())
    assert CATALOGUE[Kind.UNTRACKED].advice.text in said


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["gunicron"], "--for gunicron: there is no advice for that: did you mean gunicorn?"),
        (["Djangoo"], "did you mean Django?"),
        (["cobol"], "--for cobol: there is no advice for that: choose from Active Record, "),
        (["puma", "django"], "--for: one process doesn't run both Ruby and Python: ask for one at a time"),
    ],
)
def test_what_there_is_no_advice_for(names: list[str], says: str, refused: Refused) -> None:
    refused("explain", "unread-answer", *(part for name in names for part in ("--for", name)), says=says)


def test_advice_is_for_a_kind(refused: Refused) -> None:
    refused("explain", "--for", "puma", says="--for needs a kind of fault: pgguard explain KIND --for puma")


@pytest.mark.parametrize("columns", ["40", "80", "132"])
def test_text_is_wrapped_and_code_is_not(columns: str, tmp_path: Path) -> None:
    arguments = "explain", "shared-by-processes", "--for", "puma"
    said = run(*arguments, cwd=tmp_path, variables={"COLUMNS": columns}).stdout
    for line in said.splitlines():
        assert line == line.rstrip()
        assert len(line) <= int(columns) or line.startswith(("    ", "  See "))
    assert "      ActiveRecord::Base.connection_pool.disconnect! if defined?(ActiveRecord::Base)\n" in said


def test_80_columns_and_plain_text_where_there_is_no_terminal(tmp_path: Path) -> None:
    variables = environment()
    del variables["COLUMNS"]
    done = subprocess.run(
        [sys.executable, "-m", "pgguard", "explain", "unclean-close"],
        check=True,
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "\x1b" not in done.stdout
    widest = max(len(line) for line in done.stdout.splitlines() if not line.startswith(("    ", "  See ")))
    assert 60 < widest <= 80


def _on_a_terminal(lines: int, cwd: Path, *arguments: str, **variables: str) -> bytes:
    """What a terminal of so many lines and 60 columns shows."""
    environ = environment(TERM="xterm-256color", **variables)
    for size in "COLUMNS", "LINES":
        environ.pop(size, None)
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, 60, 0, 0))
    command = [sys.executable, "-m", "pgguard", "explain", *arguments]
    with subprocess.Popen(command, cwd=cwd, env=environ, stdin=theirs, stdout=theirs):
        os.close(theirs)
        said = b""
        while data := _read(ours):
            said += data
    os.close(ours)
    return said


def test_what_is_more_than_a_screen_goes_to_the_pager(tmp_path: Path) -> None:
    """As git's output does; and what fits doesn't."""
    pager = tmp_path / "pager"
    pager.write_text("#!/bin/sh\necho LESS is $LESS\ncat\n")
    pager.chmod(0o755)
    paged = _on_a_terminal(24, tmp_path, "unclean-close", PAGER=str(pager))
    assert paged.startswith(b"LESS is FRX\r\n")
    assert b"\x1b[1;33munclean-close" in paged
    assert b"LESS is mine" in _on_a_terminal(24, tmp_path, "unclean-close", PAGER=str(pager), LESS="mine")
    assert b"LESS is" not in _on_a_terminal(1000, tmp_path, "unclean-close", PAGER=str(pager))


def test_colour_and_its_own_width_on_a_terminal(tmp_path: Path) -> None:
    said = _on_a_terminal(1000, tmp_path, "unclean-close")
    assert b"\x1b[1;33munclean-close" in said
    plain = re.sub(rb"\x1b\[[\d;]*m", b"", said).decode()
    widest = max(len(line.rstrip()) for line in plain.splitlines() if not line.startswith(("    ", "  See ")))
    assert 45 < widest <= 60


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except OSError:  # EIO: nobody has the other side open any more
        return b""


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("shared-by-procesess", "did you mean shared-by-processes?"),
        ("Unclean_Close", "did you mean unclean-close?"),
        ("exhaustion", "did you mean connection-exhaustion?"),
        ("unread", "did you mean unread-answer?"),
        ("idle_in", "did you mean idle-in-transaction?"),
        ("shared", "did you mean shared-by-processes or shared-by-threads?"),
        ("terminate", "did you mean foreign-terminate?"),
        ("xyzzy", "pgguard explain lists them"),
        ("two\nlines", "pgguard explain lists them"),
        ("", "pgguard explain lists them"),
    ],
)
def test_an_unknown_kind_is_refused_and_the_closest_named(kind: str, says: str, refused: Refused) -> None:
    refused("explain", kind, says=says)
