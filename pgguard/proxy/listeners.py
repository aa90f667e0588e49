"""The sockets that clients connect to."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import trio

from pgguard.attribution.senders import ask_for_credentials
from pgguard.proxy.addresses import Address, TcpAddress, UnixAddress, Upstream
from pgguard.proxy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

_BACKLOG: Final = 1024
_CONNECT_PROBE_TIMEOUT: Final = 1.0
_LOOKUP_TIMEOUT: Final = 2.0
_ANY: Final = frozenset({"0.0.0.0", "::"})  # noqa: S104 - recognized, not bound to


class Listener:
    """One listening socket, and what is left behind by it in the file system."""

    def __init__(self, sock: trio.socket.SocketType, address: Address, inode: int | None = None) -> None:
        self.socket = sock
        self.address = address
        """Where it really listens: with the port that the system chose if none was given."""
        self._inode = inode

    @property
    def transport(self) -> Literal["tcp", "unix"]:
        """As records name it."""
        return "unix" if isinstance(self.address, UnixAddress) else "tcp"

    def close(self) -> None:
        """Stop accepting, and remove the socket from the file system if it is still this one."""
        self.socket.close()
        if isinstance(self.address, UnixAddress) and self._inode is not None:
            with suppress(FileNotFoundError):
                if Path(self.address.path).stat().st_ino == self._inode:
                    Path(self.address.path).unlink()


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
    try:
        opened = await trio.open_tcp_listeners(address.port, host=address.host, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigurationError(f"--listen {address}: {error.strerror or error}{_tcp_remedy(error)}") from error
    except (UnicodeError, ValueError) as error:
        raise ConfigurationError(f"--listen {address}: there can be no such host name") from error
    listeners = []
    for listener in opened:
        host, port = listener.socket.getsockname()[:2]
        listeners.append(Listener(listener.socket, TcpAddress(host, port)))
    return listeners


def _open_unix(address: UnixAddress, *, pass_credentials: bool) -> Listener:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if pass_credentials:
            ask_for_credentials(sock)
        if not address.path.startswith("\0"):
            _remove_stale(address)
        sock.bind(address.path)
        inode = None
        if not address.path.startswith("\0"):
            # As unix_socket_permissions is by default: who may connect is for the server's authentication to say.
            Path(address.path).chmod(0o777)
            inode = Path(address.path).stat().st_ino
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigurationError(f"--listen {address}: {error.strerror or error}{_remedy(error, address)}") from error
    except BaseException:
        sock.close()
        raise
    return Listener(trio.socket.from_stdlib_socket(sock), address, inode)


def _tcp_remedy(error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return ": another program listens there, use another port"
        case errno.EADDRNOTAVAIL:
            return ": it is no address of this machine"
        case errno.EACCES | errno.EPERM:
            return ": use a port from 1024 on"
        case _:
            return ""


def _remedy(error: OSError, address: UnixAddress) -> str:
    match error.errno:
        case errno.ENOENT if not Path(address.directory).is_dir():
            return f": create the directory {address.directory}"
        case errno.ENOENT | errno.EACCES | errno.EPERM | errno.EROFS:
            return f": use a directory in which pgguard may create {address.path}"
        case errno.EADDRINUSE:
            return f": something that is no socket stands at {address.path}"
        case _:
            return ""


def _remove_stale(address: UnixAddress) -> None:
    """Clear away a socket that nobody listens on any more.

    Raises:
        ConfigurationError: somebody does.
    """
    path = Path(address.path)
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_PROBE_TIMEOUT)
        try:
            probe.connect(address.path)
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except (FileNotFoundError, TimeoutError, BlockingIOError):  # the last: its backlog is full
            pass
    raise ConfigurationError(f"--listen {address}: another server listens on {path}, use another DIR or PORT")


async def refuse_loop(listeners: Sequence[Listener], upstream: Upstream) -> None:
    """Refuse to guard the guard: each connection would make it connect to itself once more.

    Raises:
        ConfigurationError: an address of the upstream is one that it listens on.
    """
    for address in upstream.addresses:
        for listener in listeners:
            if await _leads_to(address, listener.address):
                raise ConfigurationError(
                    f"--upstream {address}: that is where pgguard itself listens: name the address of PostgreSQL"
                )


async def _leads_to(address: Address, listening: Address) -> bool:
    if isinstance(address, UnixAddress) and isinstance(listening, UnixAddress):
        return _canonical(address.path) == _canonical(listening.path)
    if isinstance(address, UnixAddress) or isinstance(listening, UnixAddress):
        return False
    if address.port != listening.port:
        return False
    hosts: set[str] = set()
    # A name that isn't known is for each client to be told of, as it may be known by then.
    with trio.move_on_after(_LOOKUP_TIMEOUT), suppress(OSError, UnicodeError):
        found = await trio.socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        hosts = {str(sockaddr[0]) for *_, sockaddr in found}
    if listening.host in _ANY:
        return any(_is_local(host) for host in hosts)
    return listening.host in hosts


def _canonical(path: str) -> str:
    return path if path.startswith("\0") else os.path.realpath(path)


def _is_local(host: str) -> bool:
    """Whether it is an address of this machine: only those can be bound to."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True
