"""``pgguard report``: each output where it is wanted, in the form that is wanted, and one line for what can't be."""

from __future__ import annotations

import gzip
import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from xml.etree import ElementTree as ET

import pytest

from pgguard.cli.main import main
from pgguard.faults.fault import Spread
from pgguard.reporting.jsonl import encode
from pgguard.session.verdicts import Kind
from tests.faults.samples import NOW, fault, verdict
from tests.proxy.spawned import environment, run
from tests.reporting.gathered import causes, seen

if TYPE_CHECKING:
    from tests.cli.conftest import Refused

SHARED = replace(seen(), id=1, cause=1, run="0")
AGAIN = replace(SHARED, id=2, repeat_of=1, suppressed=40, spread=Spread(42, 11, 4, NOW))
IDLE = replace(fault(verdict(Kind.IDLE_IN_TRANSACTION)), id=3, cause=2, run="0")
FAULTS = b"".join(map(encode, (SHARED, AGAIN, IDLE)))


class Report(Protocol):
    """Run ``pgguard report`` in a directory with ``faults.jsonl``: its status, and what it has printed."""

    def __call__(self, *arguments: str, file: str = "faults.jsonl") -> tuple[int, str, str]: ...


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Report:
    (tmp_path / "faults.jsonl").write_bytes(FAULTS)
    monkeypatch.chdir(tmp_path)
    for name in ("GITHUB_WORKSPACE", "GITHUB_STEP_SUMMARY", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str, file: str = "faults.jsonl") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pgguard", "report", file, *arguments])
        with pytest.raises(SystemExit) as raised:
            main()
        said = capfd.readouterr()
        return int(raised.value.code or 0), said.out, said.err

    return run


def test_text_is_what_is_printed_when_nothing_else_is_wanted(report: Report) -> None:
    status, out, err = report()
    assert (status, err) == (0, "")
    assert report("--format", "text") == (0, out, "")
    assert out.startswith("=" * 120 + "\npgguard: ERROR: shared-by-processes: ")
    assert out.splitlines()[-3] == "pgguard: 43 faults from 2 causes"


def test_the_width_of_text_is_that_of_columns(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert report()[1].startswith("=" * 60 + "\npgguard: ERROR: ")


def test_each_format_is_printed(report: Report) -> None:
    (status, junit, _), (_, github, _) = report("--format", "junit"), report("--format", "github", "--root", "/srv/app")
    assert status == 0
    assert len(ET.fromstring(junit).findall(".//failure")) == 1
    assert github.startswith("::error file=src/app.py,line=36,title=")
    assert github.count("\n::warning title=") == 1
    status, sarif, err = report("--format", "sarif", "--root", "/srv/app")
    [result] = json.loads(sarif)["runs"][0]["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "src/app.py"
    why = "nobody was seen in the application's own code"
    assert err == f"pgguard: 1 of 2 causes is no result in the SARIF file but a notification: {why}\n"


def test_the_root_is_the_workspace_or_this_directory(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    assert report("--format", "github")[1].startswith("::error title=")
    monkeypatch.setenv("GITHUB_WORKSPACE", "/srv")
    assert report("--format", "github")[1].startswith("::error file=app/src/app.py,")
    assert report("--format", "github", "--root", "/srv/app")[1].startswith("::error file=src/app.py,")
    monkeypatch.delenv("GITHUB_WORKSPACE")
    here = replace(SHARED.culprits[0], stack=(SHARED.culprits[0].stack or ())[1:2])
    frame = (here.stack or ())[0]._replace(file=str(Path.cwd() / "app.py"))
    Path("here.jsonl").write_bytes(encode(replace(SHARED, culprits=(replace(here, stack=(frame,)),))))
    assert report("--format", "github", file="here.jsonl")[1].startswith("::error file=app.py,")


def test_the_rest_goes_into_the_summary_of_the_job(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faults.jsonl").write_bytes(b"".join(map(encode, causes(13, SHARED))))
    status, out, err = report("--format", "github")
    assert (status, out.count("::error ")) == (0, 10)
    assert (
        err == "pgguard: 3 more causes: a step shows ten annotations of each level; add --markdown OUT.md to see all\n"
    )
    summary = tmp_path / "summary.md"
    summary.write_text("# Tests\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert report("--format", "github") == (0, out, "")
    assert summary.read_text().startswith("# Tests\n## pgguard: 13 faults from 13 causes\n")
    assert summary.read_text().count("\n### ") == 13
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "missing/summary.md"))
    assert report("--format", "github") == (
        0,
        out,
        "pgguard: the job's summary can't be written: GITHUB_STEP_SUMMARY: No such file or directory\n",
    )
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    report("--format", "github", "--markdown", "summary.md")
    assert summary.read_text().count("## pgguard: ") == 1, "it is written once"


def test_the_summary_of_the_job_is_no_longer_than_it_may_be(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = tmp_path / "summary.md"
    summary.write_text("x" * ((1 << 20) - 5000))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert report("--format", "github")[0] == 0
    assert (1 << 20) - 5000 < summary.stat().st_size <= 1 << 20


def test_files_are_written_and_then_nothing_is_printed(report: Report, tmp_path: Path) -> None:
    assert report("--markdown", "a.md") == (0, "", "pgguard: 43 faults from 2 causes: see a.md\n")
    assert (tmp_path / "a.md").read_text().startswith("## pgguard: 43 faults from 2 causes\n")
    assert stat.S_IMODE((tmp_path / "a.md").stat().st_mode) & 0o444
    status, out, err = report("--markdown", "a.md", "--format", "junit")
    assert (status, err) == (0, "")
    assert out.startswith("<?xml")


def test_a_page_has_its_style_within_it_or_beside_it(report: Report, tmp_path: Path) -> None:
    assert report("--html", "a.html") == (0, "", "pgguard: 43 faults from 2 causes: see a.html\n")
    assert "<style" in (tmp_path / "a.html").read_text()
    (tmp_path / "my site").mkdir()
    status, out, err = report("--html", "my site/b.html", "--css", "my style.css", "--markdown", "c.md")
    assert (status, out) == (0, "")
    assert err == "pgguard: 43 faults from 2 causes: see c.md, my style.css and my site/b.html\n"
    page = (tmp_path / "my site/b.html").read_text()
    assert "<style" not in page
    assert 'href="../my%20style.css"' in page
    assert "{" in (tmp_path / "my style.css").read_text()
    assert report("--html", "-")[1] == (tmp_path / "a.html").read_text()


def test_a_dash_is_standard_output_and_input(report: Report, tmp_path: Path) -> None:
    status, out, err = report("--markdown", "-")
    assert (status, err) == (0, "pgguard: 43 faults from 2 causes\n")
    assert out.startswith("## pgguard: ")
    command = [sys.executable, "-m", "pgguard", "report", "-", "--markdown", "-"]
    piped = subprocess.run(
        command, input=FAULTS, cwd=tmp_path, env=environment(), capture_output=True, check=True, timeout=30
    )
    assert piped.stdout.decode() == out


def test_a_compressed_file_is_read(report: Report, tmp_path: Path) -> None:
    (tmp_path / "faults.jsonl.gz").write_bytes(gzip.compress(FAULTS))
    assert report(file="faults.jsonl.gz") == report()


def test_no_faults_are_a_result(report: Report, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert report(file="empty.jsonl") == (0, "pgguard: no faults\n", "")
    assert report("--fail-on", "warning", file="empty.jsonl")[0] == 0
    assert report("--format", "github", file="empty.jsonl") == (0, "", "")
    assert json.loads(report("--format", "sarif", file="empty.jsonl")[1])["runs"][0]["results"] == []


def test_a_torn_line_is_said_and_the_rest_is_told(report: Report, tmp_path: Path) -> None:
    (tmp_path / "torn.jsonl").write_bytes(FAULTS + encode(SHARED)[:100])
    status, out, err = report(file="torn.jsonl")
    assert (status, out) == report()[:2]
    assert err == "pgguard: torn.jsonl: line 4, the last one, is cut off, and left out\n"


def test_what_is_wrong_with_a_file_is_no_command_to_a_runner_and_moves_no_cursor(
    report: Report, tmp_path: Path
) -> None:
    name = "##[error]\x1b[2J.jsonl"
    (tmp_path / name).write_bytes(FAULTS + b"x\n")
    assert report(file=name)[2].startswith("pgguard: ## [error]\\x1b[2J.jsonl: line 4 is left out: it isn't JSON: ")


@pytest.mark.parametrize(
    ("fail_on", "status", "failures"),
    [(None, 0, 1), ("never", 0, 0), ("error", 66, 1), ("warning", 66, 2)],
)
def test_the_status_says_what_was_found_if_that_is_wanted(
    report: Report, fail_on: str | None, status: int, failures: int
) -> None:
    options = () if fail_on is None else ("--fail-on", fail_on)
    assert report(*options)[0] == status
    found, junit, _ = report("--format", "junit", *options)
    assert (found, junit.count("<failure ")) == (status, failures)


def test_an_error_is_looked_for_and_not_just_any_fault(report: Report, tmp_path: Path) -> None:
    (tmp_path / "idle.jsonl").write_bytes(encode(IDLE))
    assert report("--fail-on", "error", file="idle.jsonl")[0] == 0
    assert report("--fail-on", "warning", file="idle.jsonl")[0] == 66


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("faults.jsonl", "--format", "sariff"), "--format: there is no 'sariff': did you mean sarif?"),
        (("faults.jsonl", "--format", "x"), "choose text, junit, github or sarif"),
        (("faults.jsonl", "--fail-on", "errors"), "--fail-on: there is no 'errors': did you mean error?"),
        (("missing.jsonl",), "can't read missing.jsonl: No such file or directory"),
        (("directory",), "can't read directory: Is a directory"),
        (("notes.txt",), "notes.txt: no line of it is a record of a fault: line 1 is left out: it isn't JSON: "),
        (("faults.jsonl", "--markdown", "faults.jsonl"), "--markdown faults.jsonl: FAULTS.jsonl is the same file"),
        (("faults.jsonl", "--markdown", "link.jsonl"), "--markdown link.jsonl: FAULTS.jsonl is the same file"),
        (("faults.jsonl", "--markdown", "no/a.md"), "--markdown no/a.md: there is no directory no: create it"),
        (("faults.jsonl", "--markdown", "directory"), "--markdown directory: it is a directory: name a file"),
        (("faults.jsonl", "--markdown", "notes.txt/x"), "--markdown notes.txt/x: Not a directory"),
        (("faults.jsonl", "--html", "a", "--markdown", "./a"), "--markdown a: --html is the same file: give each"),
        (("faults.jsonl", "--html", "a", "--css", "a"), "--css a: --html is the same file"),
        (("faults.jsonl", "--css", "a.css"), "--css is the style of a page: add --html"),
        (("faults.jsonl", "--html", "-", "--css", "a.css"), "--css: a page and its style are two files: name both"),
        (("faults.jsonl", "--html", "-", "--markdown", "-"), "--markdown -: --html is the same file"),
        (("faults.jsonl", "--html", "a", "--css", "no/a"), "--css no/a: there is no directory no: create it"),
        (("faults.jsonl", "--markdown", "/dev/full"), "--markdown: can't write /dev/full: No space left on device"),
        (
            ("faults.jsonl", "--markdown", "-", "--format", "junit"),
            "--format junit and --markdown - both go to standard",
        ),
        ((), "name the file that --faults has written: pgguard report FAULTS.jsonl"),
    ],
)
def test_what_cannot_be_is_one_line_that_says_what_to_change(
    arguments: tuple[str, ...], says: str, refused: Refused, tmp_path: Path
) -> None:
    (tmp_path / "faults.jsonl").write_bytes(FAULTS)
    (tmp_path / "link.jsonl").symlink_to("faults.jsonl")
    (tmp_path / "directory").mkdir()
    (tmp_path / "notes.txt").write_text("hello\n")
    refused("report", *arguments, says=says)
    assert (tmp_path / "faults.jsonl").read_bytes() == FAULTS


@pytest.mark.parametrize("name", ["there.md", "new.md"])
def test_a_file_that_may_not_be_written_is_refused_before_anything_is_read(
    name: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there.md").touch()
    monkeypatch.setattr(os, "access", lambda _, mode: mode == os.R_OK)  # root may everything
    refused("report", "missing.jsonl", "--markdown", name, says=f"--markdown {name}: this user may not ")


def test_a_reader_that_has_gone_ends_it_silently(tmp_path: Path) -> None:
    (tmp_path / "faults.jsonl").write_bytes(b"".join(map(encode, causes(60, SHARED))))
    script = f"{sys.executable} -m pgguard report faults.jsonl | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True, timeout=30
    )
    assert done.stdout.splitlines()[1:] == ["141"]
    assert done.stderr == ""


def test_a_terminal_gets_colours_and_a_file_none(tmp_path: Path) -> None:
    (tmp_path / "faults.jsonl").write_bytes(FAULTS)
    script = f"script -qec '{sys.executable} -m pgguard report faults.jsonl' /dev/null"
    variables = environment(TERM="xterm-256color")
    shown = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=variables, capture_output=True, check=True, timeout=30
    )
    assert b"\x1b[1;31mpgguard: ERROR: shared-by-processes" in shown.stdout
    assert "\x1b" not in run("report", "faults.jsonl", cwd=tmp_path).stdout
