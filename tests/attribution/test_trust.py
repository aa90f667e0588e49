"""Whose files are obeyed, and how files are opened that may be anybody's."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from pgguard.attribution import trust
from pgguard.attribution.trust import UntrustedError, distrust, distrust_path, open_regular, open_trusted

NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("content")
    path.chmod(0o644)
    return path


def _content(path: Path) -> bytes:
    with open_trusted(path) as file:
        return file.read()


def test_ones_own_file_is_obeyed(file: Path) -> None:
    assert _content(file) == b"content"


@pytest.mark.parametrize("mode", [0o646, 0o666, 0o602])
def test_what_anybody_may_write_is_not(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(UntrustedError, match=r"^anybody can write to it$"):
        open_trusted(file)


@needs_root
def test_what_belongs_to_somebody_else_is_not(file: Path) -> None:
    os.chown(file, NOBODY, 0)
    with pytest.raises(UntrustedError, match=r"^it belongs to user nobody$"):
        open_trusted(file)
    os.chown(file, 54321, 0)
    with pytest.raises(UntrustedError, match=r"^it belongs to user 54321$"):
        open_trusted(file)


@needs_root
def test_what_a_group_may_write_is_not_unless_the_group_is_the_owners_own(file: Path) -> None:
    file.chmod(0o664)
    assert _content(file) == b"content"
    os.chown(file, 0, 54321)
    with pytest.raises(UntrustedError, match=r"^group 54321 can write to it$"):
        open_trusted(file)
    file.chmod(0o644)
    assert _content(file) == b"content"


def test_a_group_of_the_users_own_name_is_the_users(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "TRUSTED", frozenset({1}))
    status = list(file.stat())
    status[stat.ST_MODE], status[stat.ST_UID], status[stat.ST_GID] = stat.S_IFREG | 0o664, 1, 1
    assert distrust(os.stat_result(status)) is None, "daemon's own group"
    status[stat.ST_GID] = 2
    assert distrust(os.stat_result(status)) == "group bin can write to it"


def test_null_and_terminals_are_nobodys_words() -> None:
    assert _content(Path("/dev/null")) == b""


def test_ones_own_link_and_pipe_are_followed_and_waited_for(file: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(file)
    assert _content(tmp_path / "link") == b"content"
    os.mkfifo(tmp_path / "pipe", 0o600)
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[b"later"])
    writer.start()
    assert _content(tmp_path / "pipe") == b"later"
    writer.join()


def test_a_pipe_that_nobody_writes_to_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody at all, and somebody who is gone again."""
    monkeypatch.setattr(trust, "PATIENCE", 0.05)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(TimeoutError) as raised:
        open_trusted(tmp_path / "pipe")
    assert raised.value.strerror == "nobody has written to this pipe within 0.05 s"
    monkeypatch.setattr(trust, "PATIENCE", 60)
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[b""])
    writer.start()
    assert _content(tmp_path / "pipe") == b""
    writer.join()


@needs_root
def test_somebody_elses_link_and_pipe_are_not(file: Path, tmp_path: Path) -> None:
    """The link leads to what root has written itself, for something else."""
    (tmp_path / "link").symlink_to(file)
    os.chown(tmp_path / "link", NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(UntrustedError, match=r"^it is a link made by user nobody$"):
        open_trusted(tmp_path / "link")
    os.mkfifo(tmp_path / "pipe")
    os.chown(tmp_path / "pipe", NOBODY, NOBODY)
    with pytest.raises(UntrustedError, match=r"^it belongs to user nobody$"):
        open_trusted(tmp_path / "pipe")


def test_what_is_not_there_or_a_directory_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_trusted(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        open_trusted(tmp_path)


class TestPlaces:
    """A program is started by its path, so everything on the way counts."""

    def test_ones_own(self, file: Path) -> None:
        assert distrust_path(file) is None, "in a sticky directory that is everybody's, further up"

    def test_a_directory_beside_which_somebody_may_put_a_link(self, file: Path, tmp_path: Path) -> None:
        for mode in 0o777, 0o1777:
            tmp_path.chmod(mode)
            assert distrust_path(file) == f"its directory {tmp_path} isn't safe: anybody can write to it"

    @needs_root
    def test_a_directory_that_can_be_replaced(self, tmp_path: Path) -> None:
        theirs = tmp_path / "home"
        ours = theirs / "bin"
        ours.mkdir(parents=True)
        (ours / "file").touch(0o644)
        os.chown(theirs, NOBODY, NOBODY)
        assert distrust_path(ours / "file") == f"its directory {theirs} isn't safe: it belongs to user nobody"

    @needs_root
    def test_where_a_link_leads(self, tmp_path: Path) -> None:
        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs" / "file").touch(0o755)
        os.chown(tmp_path / "theirs", NOBODY, NOBODY)
        (tmp_path / "link").symlink_to(tmp_path / "theirs" / "file")
        assert (
            distrust_path(tmp_path / "link")
            == f"its directory {tmp_path / 'theirs'} isn't safe: it belongs to user nobody"
        )


class TestAnybodysFiles:
    """Those that a guard looks at without believing them."""

    def _read(self, path: Path, reader: int | None = None) -> bytes:
        with os.fdopen(open_regular(path, reader=reader), "rb") as file:
            return file.read()

    def test_a_regular_file(self, file: Path) -> None:
        assert self._read(file) == b"content"
        assert self._read(file, NOBODY) == b"content"

    def test_a_fifo_is_neither_waited_for_nor_opened(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(PermissionError):
            open_regular(tmp_path / "pipe")
        # Whoever waits for somebody to read goes on waiting.
        with pytest.raises(OSError, match="No such device or address"):
            os.open(tmp_path / "pipe", os.O_WRONLY | os.O_NONBLOCK)

    @pytest.mark.parametrize("what", ["/dev/zero", "/dev/tty", "/", "/proc/self/mem"])
    def test_what_a_link_leads_to_is_not_opened_unless_it_is_a_file(self, what: str, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(what)
        with pytest.raises(OSError):  # noqa: PT011 - any of them
            open_regular(tmp_path / "link", reader=NOBODY)

    def test_what_the_other_user_may_not_read_is_not_read_for_it(self, file: Path) -> None:
        file.chmod(0o640)
        with pytest.raises(PermissionError):
            open_regular(file, reader=NOBODY)
        assert self._read(file, os.geteuid()) == b"content"

    def test_nothing_is_left_open(self, file: Path, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        before = len(list(Path("/proc/self/fd").iterdir()))
        for path in tmp_path / "pipe", tmp_path, tmp_path / "missing":
            with pytest.raises(OSError):  # noqa: PT011 - any of them
                open_trusted(path) if path == tmp_path else open_regular(path)
        open_trusted(file).close()
        assert len(list(Path("/proc/self/fd").iterdir())) == before
