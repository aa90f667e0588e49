"""Opening the file of faults: wherever its user says, and nowhere else, whoever else can write there."""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pgguard.attribution.trust import UntrustedError
from pgguard.reporting.opening import open_for_appending

if TYPE_CHECKING:
    from collections.abc import Iterator

NOBODY = 65534
OTHER = 65533

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to make files of other users")


def append(path: Path, data: bytes = b"x") -> None:
    fd = open_for_appending(path)
    os.write(fd, data)
    os.close(fd)


def refuse(path: Path, says: str) -> None:
    with pytest.raises(UntrustedError, match=re.escape(says)):
        open_for_appending(path)


def own(path: Path, uid: int) -> Path:
    os.chown(path, uid, -1, follow_symlinks=False)
    return path


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file that must not be written to."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    yield victim
    assert victim.read_bytes() == b"precious"


@pytest.fixture(params=[0o700, 0o755, 0o1777], ids=oct)
def theirs(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Somebody else's directory."""
    directory = tmp_path / "theirs"
    directory.mkdir()
    directory.chmod(request.param)
    return own(directory, NOBODY)


# What goes on working


def test_a_file_is_created_and_appended_to(tmp_path: Path) -> None:
    for _ in range(2):
        append(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"xx"
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) & stat.S_IRWXO == 0


@pytest.mark.parametrize("path", ["file", "./file", "directory/../file", "directory/link/file"])
def test_paths_that_are_relative(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory/link").symlink_to("..")
    append(Path(path))
    assert (tmp_path / "file").read_bytes() == b"x"


@pytest.mark.parametrize("target", ["real", "{}/real", "directory/../real", "second"])
def test_links_of_ones_own(tmp_path: Path, target: str) -> None:
    (tmp_path / "directory").mkdir()
    (tmp_path / "second").symlink_to("real")
    (tmp_path / "link").symlink_to(target.format(tmp_path))
    append(tmp_path / "link")
    append(tmp_path / "link")
    assert (tmp_path / "real").read_bytes() == b"xx"


def test_a_link_to_a_directory_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    append(tmp_path / "link" / "file")
    assert (tmp_path / "real" / "file").read_bytes() == b"x"


def test_links_that_lead_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        open_for_appending(tmp_path / "a")


@pytest.mark.parametrize("name", ["/proc/self/fd/{}", "/dev/fd/{}"])
def test_descriptors_by_their_names(name: str, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    append(Path(name.format(writer)))
    assert os.read(reader, 10) == b"x"
    os.close(reader)
    os.close(writer)
    file = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    (tmp_path / "file").unlink()
    append(Path(name.format(file)))
    assert os.fstat(file).st_size == 1
    os.close(file)


def test_a_link_to_a_descriptor(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    (tmp_path / "link").symlink_to(f"/proc/self/fd/{writer}")
    append(tmp_path / "link")
    assert os.read(reader, 10) == b"x"
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/stdout", "/dev/stderr"])
def test_devices_and_standard_streams(path: str) -> None:
    os.close(open_for_appending(Path(path)))


def test_a_fifo_that_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    append(tmp_path / "fifo")
    assert os.read(reader, 10) == b"x"
    os.close(reader)


def test_nothing_stays_open(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    before = set(Path("/proc/self/fd").iterdir())
    for path in (tmp_path / "link", Path("/dev/stdout"), tmp_path / "nowhere" / "file", tmp_path):
        with suppress(OSError):
            os.close(open_for_appending(path))
    assert set(Path("/proc/self/fd").iterdir()) == before


@as_root
def test_root_may_write_into_a_users_directory(theirs: Path) -> None:
    """``sudo pgguard serve --faults faults.jsonl`` at home, where a file from before may be."""
    append(theirs / "file")
    assert (theirs / "file").stat().st_uid == 0
    (theirs / "theirs").touch()
    own(theirs / "theirs", NOBODY)
    append(theirs / "theirs")


# What is refused


@as_root
def test_a_planted_link_is_not_followed(theirs: Path, victim: Path) -> None:
    own_link(theirs / "faults.jsonl", victim)
    refuse(theirs / "faults.jsonl", f"{theirs}/faults.jsonl is a symbolic link of user nobody, who could point it")
    own_link(theirs / "dangling", victim.parent / "new")
    refuse(theirs / "dangling", "is a symbolic link of user nobody")
    assert not (victim.parent / "new").exists()
    own_link(theirs / "log", victim.parent)
    refuse(theirs / "log" / "victim", f"{theirs}/log is a symbolic link of user nobody")
    own_link(theirs / "descriptor", Path("/proc/self/fd/1"))
    refuse(theirs / "descriptor", "is a symbolic link of user nobody")


def own_link(link: Path, target: Path) -> None:
    link.symlink_to(target)
    own(link, NOBODY)


@as_root
def test_a_hard_link_in_somebody_elses_directory_may_be_any_file(theirs: Path, victim: Path) -> None:
    os.link(victim, theirs / "faults.jsonl")
    refuse(theirs / "faults.jsonl", "it has a second name (a hard link), which user nobody may have made")


def test_a_hard_link_in_ones_own_directory_is_ones_own(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.link(tmp_path / "file", tmp_path / "faults.jsonl")
    append(tmp_path / "faults.jsonl")


@as_root
@pytest.mark.parametrize("fifo", [False, True])
def test_a_file_of_a_third_user(tmp_path: Path, fifo: bool) -> None:
    """As with ``fs.protected_regular`` and ``fs.protected_fifos``."""
    tmp_path.chmod(0o1777)
    path = tmp_path / "faults.jsonl"
    if fifo:
        os.mkfifo(path)
    else:
        path.touch()
    own(path, NOBODY)
    refuse(path, "it belongs to user nobody: name another file, or remove this one")


@as_root
def test_a_directory_in_which_everybody_can_replace_the_file(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    refuse(
        tmp_path / "faults.jsonl",
        f"anybody can replace it, because everybody can write to {tmp_path}",
    )
    assert not (tmp_path / "faults.jsonl").exists()
    (tmp_path / "faults.jsonl").touch()
    refuse(tmp_path / "faults.jsonl", "anybody can replace it")
    tmp_path.chmod(0o1777)
    append(tmp_path / "faults.jsonl")


@as_root
def test_who_is_not_root_is_led_nowhere_either(tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard's user has a file that somebody else would like to have written to; the checks are the same."""
    monkeypatch.setattr(os, "geteuid", lambda: OTHER)
    own_link(tmp_path / "faults.jsonl", victim)
    refuse(tmp_path / "faults.jsonl", "is a symbolic link of user nobody")
    (tmp_path / "own").symlink_to(tmp_path / "file")
    own(tmp_path / "own", OTHER)
    append(tmp_path / "own")
    (tmp_path / "roots").symlink_to(tmp_path / "file")
    append(tmp_path / "roots")
    tmp_path.chmod(0o777)
    append(tmp_path / "file")


@as_root
def test_a_link_that_comes_and_goes_is_never_followed(theirs: Path, victim: Path) -> None:
    """Whoever may write there swaps a file and a link, as fast as he can."""
    path, link = theirs / "faults.jsonl", theirs / "link"
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            own_link(link, victim)
            link.rename(path)
            file = theirs / "file"
            file.touch()
            own(file, NOBODY)
            file.rename(path)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        opened = refused = 0
        deadline = time.monotonic() + 60
        while (opened < 50 or refused < 50) and time.monotonic() < deadline:
            try:
                append(path)
                opened += 1
            except UntrustedError:
                refused += 1
    finally:
        done.set()
        thread.join()
    assert opened
    assert refused
