"""Opening a file to write to so that nobody but its user and root can lead it elsewhere.

A guard that runs as root may be told to write into a directory where others write too. Whoever may put a symbolic link
there would have root append to a file of his choice. The kernel refuses to follow such links in sticky directories that
everybody may write, unless it is told not to (``fs.protected_symlinks`` in proc_sys_fs(5)), and nowhere else. So the
path is walked here, one name after the other, each looked up in the directory that is held open:

- A symbolic link is followed if it belongs to root or to the user that the guard runs as. Another user's is refused.
- A file that is there must belong to root, to the guard's user, or to the one whose directory it is in; and if it is
  another user's directory, it must have no other name, which could be that of any file (``fs.protected_hardlinks``).
- Root writes to no file in a directory in which everybody may rename and replace files: one that all may write and that
  isn't sticky.

Links in ``/proc`` lead to what a process has open: those are the kernel's own, and followed as they are. So
``/dev/stdout`` and ``/proc/self/fd/N`` work as ever.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pgguard.attribution.trust import LINKS, TRUSTED, UntrustedError, user_name

if TYPE_CHECKING:
    from collections.abc import Iterator

_MODE: Final = 0o640
"""Of a new file: its records name users, databases and SQL."""
_FLAGS: Final = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
"""O_NONBLOCK: a FIFO that nobody reads is an error (ENXIO) and not a guard that hangs, open(2)."""
_LOOK: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_ATTEMPTS: Final = 8
"""Times that a file may be replaced while it is being opened."""


def open_for_appending(path: Path, *, owner: tuple[int, int] | None = None) -> int:
    """Open a file, or create it for its owner to write and its group to read; returns the descriptor.

    Args:
        path: The file.
        owner: A user and a group, who get it if it is created.

    Raises:
        OSError: It can't be opened.
        UntrustedError: It, or the way to it, is somebody else's; the message says what to change too.
    """
    return _Walk(path, owner).open()


def write_file(path: Path, text: str) -> None:
    """Write a text, in UTF-8, to a file that is opened like that, in place of what stands in it.

    A FIFO or a device, ``/dev/stdout`` for one, will do.

    Raises:
        OSError: It can't be opened, or not all of it can be written.
        UntrustedError: It, or the way to it, is somebody else's; the message says what to change too.
    """
    descriptor = open_for_appending(path)
    with os.fdopen(descriptor, "wb") as file:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.ftruncate(descriptor, 0)
        os.set_blocking(descriptor, True)
        file.write(text.encode("utf-8", "replace"))


class _Walk:
    """The way to one file, from directory to directory."""

    def __init__(self, path: Path, owner: tuple[int, int] | None) -> None:
        self._owner = owner
        self._names = deque(_names(path))
        self._shown = Path("/" if path.is_absolute() else ".")
        self._links = 0
        self._trusted = {*TRUSTED, os.geteuid()}
        self._directory = os.open("/" if path.is_absolute() else ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def open(self) -> int:
        try:
            while True:
                name = self._names.popleft()
                if self._names:
                    self._enter(name)
                    continue
                for _ in range(_ATTEMPTS):
                    if (opened := self._open_last(name)) is not None:
                        return opened
                    if self._names:
                        break  # it was a symbolic link
                else:
                    raise UntrustedError(f"{self._shown / name} is replaced again and again: name another file")
        finally:
            os.close(self._directory)

    def _enter(self, name: str) -> None:
        """Go on to a directory, by way of a symbolic link if it is one."""
        found = os.open(name, _LOOK, dir_fd=self._directory)
        try:
            if stat.S_ISLNK(os.fstat(found).st_mode):
                if not self._is_the_kernels(found):
                    self._follow(name, found)
                    return
                found, link = os.open(name, os.O_PATH | os.O_CLOEXEC, dir_fd=self._directory), found
                os.close(link)
            self._go(found)
            self._shown /= name
            found = -1
        finally:
            if found >= 0:
                os.close(found)

    def _go(self, directory: int) -> None:
        os.close(self._directory)
        self._directory = directory

    def _follow(self, name: str, link: int) -> None:
        """Put the way that a symbolic link leads in place of its name."""
        owner = os.fstat(link).st_uid
        if owner not in self._trusted:
            raise UntrustedError(
                f"{self._shown / name} is a symbolic link of {user_name(owner)}, who could point it elsewhere: "
                "name the file that it points to"
            )
        self._links += 1
        if self._links > LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target = os.readlink("", dir_fd=link)
        if target.startswith("/"):
            self._go(os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
            self._shown = Path("/")
        self._names.extendleft(reversed(list(_names(Path(target)))))

    def _open_last(self, name: str) -> int | None:
        """Open the file itself; ``None``: it is to be tried again, with what there is to do by then."""
        try:
            found = os.open(name, _LOOK, dir_fd=self._directory)
        except FileNotFoundError:
            self._check_directory()
            return self._create(name)
        try:
            is_link = stat.S_ISLNK(os.fstat(found).st_mode)
            if is_link and self._is_the_kernels(found):
                return os.open(name, _FLAGS, dir_fd=self._directory)
            if is_link:
                self._follow(name, found)
                return None
            return self._open_found(name, found)
        finally:
            os.close(found)

    def _create(self, name: str) -> int | None:
        flags = _FLAGS | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            created = os.open(name, flags, _MODE, dir_fd=self._directory)
        except FileExistsError:
            return None
        if self._owner is not None:
            os.fchown(created, *self._owner)
        return created

    def _open_found(self, name: str, found: int) -> int | None:
        self._check_directory()
        self._check_file(name, os.fstat(found))
        try:
            opened = os.open(name, _FLAGS | os.O_NOFOLLOW, dir_fd=self._directory)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP):
                return None  # it has been replaced meanwhile
            raise
        if os.path.sameopenfile(opened, found):
            return opened
        os.close(opened)
        return None

    def _check_directory(self) -> None:
        facts = os.fstat(self._directory)
        if os.geteuid() == 0 and facts.st_mode & stat.S_IWOTH and not facts.st_mode & stat.S_ISVTX:
            raise UntrustedError(
                f"anybody can replace it, because everybody can write to {self._shown}: "
                f"use another directory, or chmod o-w {self._shown}"
            )

    def _check_file(self, name: str, facts: os.stat_result) -> None:
        if not (stat.S_ISREG(facts.st_mode) or stat.S_ISFIFO(facts.st_mode)):
            return  # what else there is, only root can have made, or it can't be written to
        keeper = os.fstat(self._directory).st_uid
        if facts.st_uid not in {*self._trusted, keeper}:
            raise UntrustedError(f"it belongs to {user_name(facts.st_uid)}: name another file, or remove this one")
        if facts.st_nlink > 1 and keeper not in self._trusted:
            raise UntrustedError(
                f"it has a second name (a hard link), which {user_name(keeper)} may have made: "
                f"remove {self._shown / name}, or name another file"
            )

    @staticmethod
    def _is_the_kernels(link: int) -> bool:
        """Whether a symbolic link is one of procfs."""
        with suppress(OSError):
            return os.fstat(link).st_dev == os.stat("/proc/self", follow_symlinks=False).st_dev  # noqa: PTH116
        return False


def _names(path: Path) -> Iterator[str]:
    """A path's names, ``..`` among them."""
    names = [part for part in path.parts if part != "/"]
    yield from names or ["."]
