"""Who is sent into other people's file systems, and doesn't always come back."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pgguard.attribution import hangs, scout
from pgguard.attribution.runtime import Language, Runtime, runtime_of
from pgguard.attribution.scout import Findings, look_into, serve
from tests.attribution.puppets import Puppet
from tests.hung_files import HungFiles, hung_files
from tests.proxy.conftest import short_directory

__all__ = ["short_directory"]

Puppets = Callable[[], Puppet]


@pytest.fixture
def files(short_directory: Path) -> Iterator[HungFiles]:
    with hung_files(short_directory) as files:
        yield files


def test_it_tells_what_is_there(puppet: Puppets, tmp_path: Path) -> None:
    (tmp_path / "one").write_text("content")
    (tmp_path / "two").mkdir()
    process = puppet()
    process.do(f"os.chdir({str(tmp_path)!r})")
    found = look_into(process.pid, modules=True, files=["one", "two", "three"], text="one")
    assert found == Findings(None, frozenset({"one"}), "content")
    assert look_into(1 << 30, modules=True, files=["one"], text="one") == Findings()


def test_what_never_answers_is_left_and_nobody_with_it(puppet: Puppets, files: HungFiles) -> None:
    """Another process is looked at at once; and the same one isn't looked at again."""
    bad, good = puppet(), puppet()
    bad.do(f"sys.path[:] = [path for path in sys.path if path]; os.chdir({str(files.directory)!r})")
    with pytest.raises(TimeoutError):
        look_into(bad.pid, files=["manage.py"])
    assert list(hangs.hanging().values()) == [bad.pid]
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        look_into(bad.pid, files=["manage.py"])
    assert runtime_of(bad.pid) == Runtime(), "its memory isn't read any more either"
    assert time.monotonic() - began < 0.5
    assert runtime_of(good.pid).language is Language.PYTHON


def test_when_it_answers_again_it_is_looked_at_again(puppet: Puppets, short_directory: Path) -> None:
    process = puppet()
    process.do("sys.path[:] = [path for path in sys.path if path]")
    with hung_files(short_directory) as files:
        process.do(f"os.chdir({str(files.directory)!r})")
        with pytest.raises(TimeoutError):
            look_into(process.pid, files=["manage.py"])
    process.do("os.chdir('/')")
    deadline = time.monotonic() + 30
    while True:
        try:
            assert look_into(process.pid, files=["etc/passwd"]).files == {"etc/passwd"}
        except TimeoutError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        else:
            break
    assert hangs.hanging() == {}


def test_one_that_has_been_killed_is_replaced(puppet: Puppets) -> None:
    pid = puppet().pid
    look_into(pid)
    current = scout._scouts._scout
    assert current is not None
    current._process.kill()
    current._process.wait(30)
    with pytest.raises(OSError, match=r"has not come back|Broken pipe|reset"):
        look_into(pid)
    assert look_into(pid) == Findings()


def test_where_nobody_can_be_sent_nothing_is_known(puppet: Puppets, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = puppet().pid
    scout.close()
    try:
        for program in "/nowhere/python", "/bin/false":
            monkeypatch.setattr(sys, "executable", program)
            with pytest.raises(OSError):  # noqa: PT011 - any of them
                look_into(pid)
            assert runtime_of(pid) == Runtime(Language.PYTHON)
            scout.start()
    finally:
        monkeypatch.undo()
        scout.start()
    assert look_into(pid) == Findings()


def test_it_has_nothing_of_the_guards_open(puppet: Puppets) -> None:
    look_into(puppet().pid)
    current = scout._scouts._scout
    assert current is not None
    pid = current._process.pid
    assert sorted(int(fd.name) for fd in Path(f"/proc/{pid}/fd").iterdir()) == [0, 1, 2]
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")


def test_what_it_is_asked_and_what_it_says() -> None:
    """A line each; the first one says that it is there."""
    question = {"pid": os.getpid(), "modules": True, "files": ["nothing"], "text": None}
    answers = io.StringIO()
    serve(io.StringIO(json.dumps(question) + "\n"), answers)
    assert answers.getvalue() == '\n{"modules": null, "files": [], "text": ""}\n'
