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
from pathlib import Path
from types import ModuleType

import pytest

from pgguard.attribution.runtime import Server
from pgguard.faults.advice import advice_for, advised, closing, exhaustion
from pgguard.faults.catalogue import CATALOGUE, Advice
from pgguard.session.verdicts import Kind
from tests.cli.conftest import Refused
from tests.proxy.spawned import environment, run


def test_it_lists_the_kinds(tmp_path: Path) -> None:
    done = run("explain", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for kind, entry in CATALOGUE.items():
        assert re.search(rf"^{kind} +{entry.severity} +{re.escape(entry.title)}$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("kind", Kind)
def test_it_says_everything_about_a_kind(kind: Kind, tmp_path: Path) -> None:
    done = run("explain", kind, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    entry = CATALOGUE[kind]
    words = " ".join(done.stdout.split())
    for text in entry.title, entry.severity_rule, entry.meaning, entry.cause, entry.advice.text, *entry.fixes:
        assert text in words
    assert f'{kind} = "log"' in words
    assert (f'{kind} = "reject"' in words) is entry.can_reject
    assert (f'{kind} = "drop"' in words) is entry.can_drop
    for runtime in advised(kind):
        advice = advice_for(kind, [runtime])
        assert advice.text in words
        for line in (advice.code or "").splitlines():
            assert f"\n    {line}\n".replace("    \n", "\n") in done.stdout
        for source in advice.sources:
            assert f"\n  See {source}\n" in done.stdout


@pytest.mark.parametrize(
    ("kind", "cases"),
    [(Kind.UNCLEAN_CLOSE, closing.CASES), (Kind.CONNECTION_EXHAUSTION, exhaustion.CASES)],
)
def test_it_says_what_to_change_case_by_case(kind: Kind, cases: Mapping[str, Advice], tmp_path: Path) -> None:
    words = " ".join(run("explain", kind, cwd=tmp_path).stdout.split())
    for case, advice in cases.items():
        assert f"{case}: {advice.title}. {advice.text}" in words


@pytest.mark.parametrize("module", [closing, exhaustion])
def test_no_case_is_left_out(module: ModuleType) -> None:
    whole = {value for value in vars(module).values() if isinstance(value, Advice)}
    assert whole | set(getattr(module, "_LIMITS", {}).values()) == set(module.CASES.values())


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Kind.SHARED_BY_THREADS, "its session is ended,"),
        (Kind.UNREAD_ANSWER, "its session is ended where it is an error,"),
        (Kind.PROTOCOL_VIOLATION, "its session is ended where it is an error,"),
        (Kind.UNCLEAN_CLOSE, "likewise,"),
        (Kind.IDLE_IN_TRANSACTION, "likewise,"),
    ],
)
def test_it_says_what_mode_reject_does(kind: Kind, says: str, tmp_path: Path) -> None:
    words = " ".join(run("explain", kind, cwd=tmp_path).stdout.split())
    assert f"In mode log it is recorded; in mode reject {says} unless" in words


def test_no_fix_is_said_twice(tmp_path: Path) -> None:
    said = run("explain", "shared-by-processes", cwd=tmp_path, variables={"COLUMNS": "10000"}).stdout
    paragraphs = [line for line in said.splitlines() if len(line) > 200]
    assert len(set(paragraphs)) == len(paragraphs)
    for server in Server:
        if server is not Server.PHP_FPM:
            assert server in said


@pytest.mark.parametrize("columns", ["40", "80", "132"])
def test_text_is_wrapped_and_code_is_not(columns: str, tmp_path: Path) -> None:
    said = run("explain", "shared-by-processes", cwd=tmp_path, variables={"COLUMNS": columns}).stdout
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


def test_colour_and_its_own_width_on_a_terminal(tmp_path: Path) -> None:
    variables = environment(TERM="xterm-256color")
    del variables["COLUMNS"]
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-m", "pgguard", "explain", "unclean-close"], cwd=tmp_path, env=variables, stdout=theirs
    ):
        os.close(theirs)
        said = b""
        while data := _read(ours):
            said += data
    os.close(ours)
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
