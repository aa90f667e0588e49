"""What a guard that may have root's rights believes of files: who may have written them, and what they are.

Two things must not happen. What somebody else has written must not be obeyed: a configuration file, a program that is
run. So its owner and mode are looked at, of the very file that is read: :func:`distrust`. And what somebody else has
put somewhere must not do anything to the guard that looks at it: a FIFO that is waited for, a device that acts when it
is opened, a link to what its maker may not read himself. So only the name is looked up at first, which touches nothing,
and what has been found is opened if it is a regular file: :func:`open_regular`.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import select
import stat
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

TRUSTED = frozenset({0, os.geteuid()})
"""Who may give orders: root, and the user that the guard was started as, whoever it has become since."""

TRUST_REMEDY = "make root or the guard's user its owner, and let nobody else write to it"
"""What to do about a file that isn't trusted, an imperative."""

LINKS = 40
"""Symbolic links on one path, at most: path_resolution(7)."""

PATIENCE = 10.0
"""Seconds for somebody to write to a pipe that is to be read."""

_NAME_ONLY = os.O_PATH | os.O_CLOEXEC
"""Opens nothing: neither waits for the other end of a FIFO nor wakes a device. open(2)."""
_CONTENT = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class UntrustedError(Exception):
    """Somebody else may have written it; the message is a clause that says who."""


def distrust(status: os.stat_result, *, sticky: bool = False) -> str | None:
    """Say why a file or directory isn't to be trusted, a clause; ``None`` if only who may give orders can write it.

    A group may, if it is the owner's alone, as it is on systems that give each user a group of the same name.

    Args:
        status: of the file, not of a link to it.
        sticky: a directory may be written by others if it is sticky, as /tmp is: nobody can then replace what isn't
            his, but put something there. unlink(2)
    """
    if status.st_uid not in TRUSTED:
        return f"it belongs to {user_name(status.st_uid)}"
    if stat.S_ISCHR(status.st_mode):
        return None  # what is written to /dev/null or a terminal isn't what is read from it
    if sticky and status.st_mode & stat.S_ISVTX:
        return None
    if status.st_mode & stat.S_IWOTH:
        return "anybody can write to it"
    if status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid, status.st_uid):
        return f"group {_group_name(status.st_gid)} can write to it"
    return None


def distrust_path(path: Path) -> str | None:
    """Say why a file isn't to be trusted that something else is going to open or run by its path, as above.

    So what counts is not only the file, but who can put another one in its place: every directory on the way to it, as
    it is written and as links lead. Raises OSError: it isn't there, or can't be looked at.
    """
    found = distrust(path.stat())
    if found is not None:
        return found
    for name in dict.fromkeys((path.absolute(), path.resolve(strict=True))):
        for directory in name.parents:
            # A link that somebody has put beside it may lead to anything.
            reason = distrust(directory.stat(), sticky=directory != name.parent)
            if reason is not None:
                return f"its directory {directory} isn't safe: {reason}"
    return None


class Leader(NamedTuple):
    """Who else can make a path lead elsewhere."""

    uid: int | None
    """``None``: not one user alone, but a group, or anybody."""
    reason: str
    """What can be done, a clause."""


def find_leader(directory: Path) -> Leader | None:
    """Find out who can put another directory in the place of this one or of one above it, or lead a link elsewhere.

    Root and the guard's user aside; ``None`` if nobody can. It is the first one on the way: whoever that is can have
    all that follows be what he likes. So what root does there as him, he could have done himself.

    Raises:
        OSError: it isn't there, or can't be looked at.
    """
    here, names, links = Path("/"), deque(directory.absolute().parts[1:]), 0
    while names:
        name = names.popleft()
        if name == "..":
            here = here.parent
            continue
        entry = here / name
        above, status = here.stat(), entry.lstat()
        reason = distrust(above)
        if reason is not None:
            sticky = above.st_uid in TRUSTED and above.st_mode & stat.S_ISVTX
            uid = status.st_uid if sticky else above.st_uid
            if uid not in TRUSTED:
                return Leader(uid, f"{user_name(uid)} can replace the directory {entry}")
            if not sticky:
                return Leader(None, f"other users can replace the directory {entry} ({here} isn't safe: {reason})")
        if not stat.S_ISLNK(status.st_mode):
            here = entry
            continue
        links += 1
        if links > LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target = entry.readlink()
        here = Path("/") if target.is_absolute() else here
        names.extendleft(reversed([part for part in target.parts if part != "/"]))
    return None


def user_name(uid: int) -> str:
    """Name a user for people, whether or not the system knows it."""
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


def open_trusted(path: Path) -> BinaryIO:
    """Open a file whose content is going to be obeyed.

    It may be a link, if who may give orders has made it. It may be a pipe, which is waited for, if it is theirs, but
    not for ever: nothing ends a program meanwhile but SIGKILL.

    Raises:
        UntrustedError: somebody else may have written it.
        OSError: it isn't there, can't be opened, or is a pipe to which nobody writes.
    """
    link = path.lstat()
    is_link = stat.S_ISLNK(link.st_mode)
    if is_link and link.st_uid not in TRUSTED:
        raise UntrustedError(f"it is a link made by {user_name(link.st_uid)}")
    # What has become a link since is looked at as such, and not followed.
    name = os.open(path, _NAME_ONLY if is_link else _NAME_ONLY | os.O_NOFOLLOW)
    try:
        status = os.fstat(name)
        reason = distrust(status)
        if reason is not None:
            raise UntrustedError(reason)
        if stat.S_ISFIFO(status.st_mode):
            return _open_pipe(name)
        return Path(f"/proc/self/fd/{name}").open("rb")
    finally:
        os.close(name)


def _open_pipe(name: int) -> BinaryIO:
    """Open a pipe, of which there is a descriptor for its name alone, when something has been written to it."""
    pipe = os.fdopen(os.open(f"/proc/self/fd/{name}", _CONTENT), "rb")
    ready = select.poll()
    ready.register(pipe, select.POLLIN)
    if not ready.poll(PATIENCE * 1000):
        pipe.close()
        raise TimeoutError(errno.ETIMEDOUT, f"nobody has written to this pipe within {PATIENCE:g} s")
    os.set_blocking(pipe.fileno(), True)
    return pipe


def open_regular(path: Path, *, reader: int | None = None) -> int:
    """Open a file that may be anything and anybody's, and return its descriptor. Waits for no FIFO, opens no device.

    Args:
        path: where it is.
        reader: a user: what that one may not read by itself isn't opened either. (Whether it may enter the directory
            isn't looked at.)

    Raises:
        OSError: it isn't there, can't be read, or isn't a regular file (PermissionError).
    """
    name = os.open(path, _NAME_ONLY)
    try:
        status = os.fstat(name)
        readable = reader in {None, 0, status.st_uid} or status.st_mode & stat.S_IROTH
        if not stat.S_ISREG(status.st_mode) or not readable:
            raise PermissionError(f"{path} is not a file that the guard should read")
        return os.open(f"/proc/self/fd/{name}", _CONTENT)
    finally:
        os.close(name)


def places_on_path(name: str) -> Iterator[Path]:
    """Yield where a program of this name can be by ``PATH``, but for directories that depend on the working one."""
    for directory in os.get_exec_path():
        path = Path(directory, name)
        if path.is_absolute():
            yield path


def closed_directory(path: Path) -> Path | None:
    """Find the first directory on the way to a file that the calling thread may not enter, if there is one."""
    return next((one for one in reversed(path.parents) if one.exists() and not may_execute(one)), None)


def may_execute(path: Path) -> bool:
    """Whether the calling thread may execute a file, or enter a directory, with the rights that it has by now.

    access(2) asks for the real user instead, and of one that isn't root for what that may without its capabilities.
    """
    return os.access(path, os.X_OK, effective_ids=True)


def _is_private(gid: int, uid: int) -> bool:
    try:
        return gid == 0 or grp.getgrgid(gid).gr_name == pwd.getpwuid(uid).pw_name
    except KeyError:
        return False


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
