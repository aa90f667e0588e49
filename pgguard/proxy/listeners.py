"""The sockets that clients connect to.

A Unix socket may have to stand in a directory that somebody else can write to: the application's own, or one for
everybody. Whoever can may put something in the place of anything there, at any moment. So a guard that runs as root
does nothing there by a path that leads elsewhere: the directory is pinned by a descriptor, its entries are looked at as
they are and not as what they link to, and the socket is born with its mode instead of being given one afterwards.

bind(2) alone has to be given the path: it is the address that clients are told, and to which Ruby's pg sends its cancel
requests. Where another user could lead that path elsewhere meanwhile, root binds as that user.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import trio

from pgguard.attribution.senders import ask_for_credentials
from pgguard.attribution.trust import distrust, find_leader
from pgguard.proxy.addresses import Address, TcpAddress, UnixAddress
from pgguard.proxy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pgguard.attribution.trust import Leader

Peer = tuple[Any, ...]
"""The address of a client: of a TCP connection a host and a port, and more with IPv6; of a Unix one nothing."""

BACKLOG: Final = 4096
"""Clients that may wait to be accepted. The kernel makes it ``net.core.somaxconn`` if that is less: listen(2)."""
_CONNECT_PROBE_TIMEOUT: Final = 1.0
_ANOTHER_DIRECTORY: Final = "use a directory that nobody else can move or replace"
"""What to do where somebody can lead a socket's path elsewhere, an imperative."""

logger = logging.getLogger(__name__)


class _Place:
    """Where a Unix socket stands in the file system: a directory, whatever its path comes to mean, and a name in it.

    Raises:
        OSError: there is no such directory.
    """

    def __init__(self, address: UnixAddress) -> None:
        self.address = address
        self.name = Path(address.path).name
        self.inode: int | None = None
        """Of the guard's own socket, once it is there."""
        self.leader = find_leader(Path(address.directory))
        """Who can lead the path elsewhere."""
        self.directory = os.open(address.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def look(self) -> os.stat_result | None:
        """See what stands there, a link as a link; ``None`` if nothing does. Raises OSError."""
        try:
            return os.stat(self.name, dir_fd=self.directory, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def clear(self) -> None:
        """Remove what stands there. Raises OSError."""
        with suppress(FileNotFoundError):
            os.unlink(self.name, dir_fd=self.directory)

    def leave(self) -> None:
        """Remove the guard's own socket, if it still stands there and may be removed, and let go of the directory."""
        # Who has changed to another user may not. Nobody listens on it then, and the next guard will clear it away.
        with suppress(OSError):
            found = self.look()
            if found is not None and found.st_ino == self.inode:
                self.clear()
        os.close(self.directory)

    @property
    def by_descriptor(self) -> str:
        """A path to what stands there that leads nowhere else, whatever becomes of the directory's own."""
        return f"/proc/self/fd/{self.directory}/{self.name}"

    @property
    def binder(self) -> int:
        """The user as whom the socket is made: whoever may do what making it could be abused for.

        Raises:
            ConfigurationError: that isn't one user alone.
        """
        if self.leader is None or os.geteuid() != 0:
            return os.geteuid()
        if self.leader.uid is None:
            raise ConfigurationError(f"--listen {self.address}: {self.leader.reason}: {_ANOTHER_DIRECTORY}")
        return self.leader.uid

    def remark(self) -> str | None:
        """Say who can put a socket of his own in the place of the guard's, and what to do; ``None`` if nobody can."""
        reason = distrust(os.fstat(self.directory), sticky=True)
        if reason is not None:
            return (
                f"other users can replace the socket {self.address}, because {reason}: "
                "use a directory that belongs to the guard's user, or make this one sticky (chmod +t)"
            )
        if self.leader is not None:
            return (
                f"other users can replace the socket {self.address}, because {self.leader.reason}: {_ANOTHER_DIRECTORY}"
            )
        return None


class Listener:
    """One listening socket, and what is left behind by it in the file system."""

    def __init__(self, sock: socket.socket, address: Address, place: _Place | None = None) -> None:
        sock.setblocking(False)
        if isinstance(address, TcpAddress):
            # Those that are accepted have them from it: sk_clone_lock() in net/core/sock.c, and tcp(7).
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.socket = sock
        self.address = address
        """Where it really listens: with the port that the system chose if none was given."""
        self.transport: Literal["tcp", "unix"] = "unix" if isinstance(address, UnixAddress) else "tcp"
        """As records name it."""
        self._place = place

    @property
    def remark(self) -> str | None:
        """What is to be said of where it listens; ``None`` if nothing is."""
        return None if self._place is None else self._place.remark()

    def close(self) -> None:
        """Stop accepting, and remove the socket from the file system if it is still this one."""
        self.socket.close()
        if self._place is not None:
            self._place.leave()
            self._place = None


async def open_listeners(address: Address, *, pass_credentials: bool) -> list[Listener]:
    """Listen on every address that ``address`` resolves to.

    Args:
        address: where to listen; port 0 lets the system choose one.
        pass_credentials: let the kernel name the sender of what arrives on Unix sockets.

    Raises:
        ConfigurationError: it is in use, or can't be used; all that were opened are closed again.
    """
    if isinstance(address, UnixAddress):
        return [_open_unix(address, pass_credentials=pass_credentials)]
    listeners = []
    for sock in await open_tcp(address, "--listen", backlog=BACKLOG):
        host, port = sock.getsockname()[:2]
        listeners.append(Listener(sock, TcpAddress(host, port)))
    return listeners


async def open_tcp(address: TcpAddress, option: str, *, backlog: int) -> list[socket.socket]:
    """Listen on every IP address that ``address`` resolves to.

    Args:
        address: where to listen; port 0 lets the system choose one.
        option: what has said so, for errors.
        backlog: clients that may wait to be accepted.

    Raises:
        ConfigurationError: it is in use, or can't be used; all that were opened are closed again.
    """
    opened: list[trio.SocketListener] = []
    try:
        # Nothing else goes on yet, so it is waited for here: trio would begin a thread that outlives the question, and
        # would have all the rights that the guard is about to give up.
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        hosts = dict.fromkeys(_numeric(sockaddr) for *_, sockaddr in found)
        for n, host in enumerate(hosts, 1):
            try:
                opened += await trio.open_tcp_listeners(address.port, host=host, backlog=backlog)
            except OSError as error:
                # A name may stand for an address of a family that this kernel doesn't have.
                if error.errno != errno.EAFNOSUPPORT or (n == len(hosts) and not opened):
                    raise
    except OSError as error:
        _close_all(opened)
        raise ConfigurationError(f"{option} {address}: {error.strerror or error}{_tcp_remedy(error)}") from error
    except (UnicodeError, ValueError) as error:
        raise ConfigurationError(f"{option} {address}: this can't be a host name") from error
    return [socket.socket(fileno=listener.socket.detach()) for listener in opened]


def _close_all(opened: Sequence[trio.SocketListener]) -> None:
    for listener in opened:
        listener.socket.close()


def _numeric(sockaddr: tuple[Any, ...]) -> str:
    """An address as one writes it, with the interface that a link-local one belongs to."""
    return socket.getnameinfo(sockaddr, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)[0]


def _open_unix(address: UnixAddress, *, pass_credentials: bool) -> Listener:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    place = None
    try:
        if pass_credentials:
            ask_for_credentials(sock)
        if address.path.startswith("\0"):
            sock.bind(address.path)
        else:
            place = _Place(address)
            _remove_stale(place)
            binder = place.binder
            _bind(sock, address.path, binder)
            _find_own(place, binder)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        _leave(place)
        remedy = _remedy(error, address, None if place is None else place.leader)
        raise ConfigurationError(f"--listen {address}: {error.strerror or error}{remedy}") from error
    except BaseException:
        sock.close()
        _leave(place)
        raise
    return Listener(sock, address, place)


def _leave(place: _Place | None) -> None:
    if place is not None:
        place.leave()


def _bind(sock: socket.socket, path: str, uid: int) -> None:
    """Bind a Unix socket as a user, so that everybody may connect to it, as unix_socket_permissions is by default.

    Who may is for the server's authentication to say. The mode is that of the umask, as of any file that is created:
    unix(7). A chmod(2) behind it would go wherever somebody has made the path lead in between. The umask is the whole
    process's, and so is the user, but nothing is done by any other thread before the guard serves. Raises OSError.
    """
    before, user = os.umask(0), os.geteuid()
    try:
        if uid != user:
            os.seteuid(uid)
        sock.bind(path)
    finally:
        if uid != user:
            os.seteuid(user)
        os.umask(before)


def _find_own(place: _Place, owner: int) -> None:
    """Take note of the socket that has just been bound. Raises ConfigurationError: it isn't there."""
    found = place.look()
    if found is None or not stat.S_ISSOCK(found.st_mode) or found.st_uid != owner:
        raise ConfigurationError(
            f"--listen {place.address}: somebody moved the socket, or its directory, while pgguard was opening it: "
            "use a directory that nobody else can write to"
        )
    place.inode = found.st_ino


def _tcp_remedy(error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return ": another program listens there: use another port"
        case errno.EADDRNOTAVAIL:
            return ": this host has no such address: use one of its own, or 0.0.0.0 for all of them"
        case errno.EACCES | errno.EPERM:
            return ": use port 1024 or higher"
        case _:
            return ""


def _remedy(error: OSError, address: UnixAddress, leader: Leader | None) -> str:
    match error.errno:
        case errno.EACCES | errno.EPERM if leader is not None and os.geteuid() == 0:
            return f": {leader.reason}, so pgguard creates the socket with that user's rights: {_ANOTHER_DIRECTORY}"
        case errno.ENOENT if not Path(address.directory).is_dir():
            return f": create the directory {address.directory}"
        case errno.ENOENT | errno.EACCES | errno.EPERM | errno.EROFS:
            return f": use a directory in which pgguard may create {address.path}"
        case errno.EADDRINUSE:
            return f": {address.path} exists and is not a socket: remove it, or use another DIR or PORT"
        case _:
            return ""


def _remove_stale(place: _Place) -> None:
    """Clear away a socket that nobody listens on any more.

    Raises:
        ConfigurationError: somebody does.
    """
    found = place.look()
    if found is None or not stat.S_ISSOCK(found.st_mode):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_PROBE_TIMEOUT)
        try:
            probe.connect(place.by_descriptor)
        except ConnectionRefusedError:
            place.clear()
            return
        except (FileNotFoundError, TimeoutError, BlockingIOError):  # the last: its backlog is full
            pass
    raise ConfigurationError(
        f"--listen {place.address}: another server listens on {place.address.path}: use another DIR or PORT"
    )
