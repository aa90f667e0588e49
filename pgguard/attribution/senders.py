"""Who sent these bytes, over a Unix socket: the credentials that the kernel attaches to every read.

The kernel never merges what two processes sent into one read, so the credentials that come with a read are those
of the sender of all its bytes: unix(7), and ``unix_stream_read_generic`` in ``net/unix/af_unix.c``.

**What that can't exclude.** A process may attach credentials of its own making to what it sends, and with CAP_SYS_ADMIN
in the user namespace that its pid namespace belongs to, the pid may be any process's that it sees there
(``scm_check_creds`` in ``net/core/scm.c``): root's, on the host, or that of a container's root, of that container. No
database driver does it, and nothing in what the kernel says tells it from the truth; whoever can do it could as well
have that process send, with ptrace(2). Without that right nobody can name another process than itself. Who has called
connect(2), SO_PEERCRED, nobody can choose; nor, over TCP, whom the kernel's probe names.
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

    ``None`` if the sender has no pid in the guard's pid namespace. It is the process, never the thread.
    """
    pid: int = _UCRED.unpack(credentials)[0]
    return pid or None
