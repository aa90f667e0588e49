"""Who sent these bytes, over a Unix socket: the credentials that the kernel attaches to every read.

The kernel never merges what two processes sent into one read, so the credentials that come with a read are those
of the sender of all its bytes: unix(7), and ``unix_stream_read_generic`` in ``net/unix/af_unix.c``.
"""

from __future__ import annotations

import socket
import struct

_UCRED = struct.Struct("=iII")
"""``struct ucred``: pid, uid, gid. unix(7)."""

CREDENTIALS_SPACE = socket.CMSG_SPACE(_UCRED.size)
"""The ancillary buffer size to give to ``recvmsg`` and ``recvmsg_into``.

There is room for the credentials and for nothing else. The kernel writes them first, so they are ``ancdata[0][2]``,
and descriptors that a client may send along (``SCM_RIGHTS``) are discarded instead of being opened in the guard.
"""


def ask_for_credentials(listener: socket.socket) -> None:
    """Have every socket that ``listener`` accepts receive its senders' credentials.

    Accepted sockets inherit the option, and what a client sent before it was accepted carries credentials too.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)


def sender_pid(credentials: bytes) -> int | None:
    """Decode the data of an ``SCM_CREDENTIALS`` message into the sender's pid.

    ``None`` if the sender has no pid in the guard's pid namespace. It is the process, never the thread. A sender
    with CAP_SYS_ADMIN can claim another process's pid, which no database driver does.
    """
    pid: int = _UCRED.unpack(credentials)[0]
    return pid or None
