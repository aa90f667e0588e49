"""Advice on connections that ended without Terminate: by what has become of the process whose they were."""

from __future__ import annotations

import signal
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from pgguard.attribution.fates import State
from pgguard.attribution.runtime import Server
from pgguard.faults.advice import advice_for
from pgguard.faults.catalogue import CATALOGUE, Advice
from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pgguard.attribution.fates import Fate
    from pgguard.attribution.runtime import Runtime

_SETTINGS: Final = "https://www.postgresql.org/docs/current/runtime-config-"

COPY_ADVICE: Final = Advice(
    "End the COPY before closing the connection",
    "The server threw away all rows of this COPY FROM STDIN. Before closing the connection, leave the block that "
    "psycopg's cursor.copy() opens, or call libpq's PQputCopyEnd, and read the answer.",
    sources=("https://www.postgresql.org/docs/current/libpq-copy.html",),
)

_CLOSED: Final = Advice(
    "Find out what closed the socket of a process that is still running",
    "The process was still running a moment later, but no longer had the socket open. Usual causes: a timeout or a "
    "cancelled task, after which the driver drops the connection (let the server time queries out with "
    "statement_timeout); a connection object that was forgotten, and whose socket the garbage collector closed; code "
    "that closes descriptors that aren't its own, as daemons do; an exec, which closes libpq's sockets. If the process "
    "is a proxy or a tunnel, look at who was connected to it.",
    sources=(f"{_SETTINGS}client.html#GUC-STATEMENT-TIMEOUT",),
)
_SHUT_DOWN: Final = Advice(
    "Find out what shut the socket down",
    "The process is still running and still has the socket open, so the socket was not closed but shut down: "
    "shutdown(2) ends the connection for every process that has it open. Look for that call where the connection is "
    "given up after an error, and close the connection through its driver instead.",
)
_CUT: Final = Advice(
    "Look for what cut the connection",
    "The process is still running and still has the socket open, but the connection was reset. Something in between "
    "did that: a firewall, a proxy, or address translation that forgets idle connections. Keepalives prevent it "
    "(libpq's keepalives_idle), and so does a pool that closes connections before they have been idle for that long.",
    sources=("https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-KEEPALIVES-IDLE",),
)
_LEFT_OPEN: Final = "The process ended and left its connection open."
_EXITED: Final = Advice(
    "Close connections on the way out",
    "The process exited by itself and left the connection open. Close connections and pools on every path on which it "
    "can end, including an uncaught exception and sys.exit: with a block that closes at its end (with, ensure, defer), "
    "or in an exit handler. os._exit and exit! run neither, so a child of os.fork or multiprocessing that exits with "
    "them must first close what it has opened.",
)
_HANDED_DOWN: Final = (
    "The last process that had the connection open had inherited it through a fork, and exited without Terminate, "
    "which is right for a connection that isn't its own. But then nobody is left to send it: the process that opens a "
    "connection should close it before it forks, or outlive the processes that it forks."
)
_KILLED: Final = Advice(
    "Find out who killed the process",
    "SIGKILL comes from the kernel's out-of-memory killer (dmesg: 'Out of memory: Killed process'), or from a "
    "supervisor or container that had waited long enough after SIGTERM: make it wait longer than the longest query "
    "takes, and at SIGTERM finish or cancel the running query, then close the pool.",
)
_ASKED_TO_END: Final = Advice(
    "Close the pool when a signal asks the process to end",
    "Nothing closed the pool before this signal ended the process, which by default happens at once. Install a handler "
    "for SIGTERM, SIGINT and SIGHUP that finishes or cancels the running query and closes the pool (in Python, one "
    "that raises SystemExit is enough for with blocks and exit handlers to run).",
)
_CRASHED: Final = Advice(
    "Find out why the process crashed",
    "This signal means that the process did something illegal, such as an invalid memory access, or gave up by "
    "itself (abort). Look at its core dump (coredumpctl, ulimit -c) and in the kernel's log. Suspect native "
    "extensions, and threads or forked children that share a connection.",
)

CASES: Final[Mapping[str, Advice]] = MappingProxyType(
    {
        "If it was in the middle of a COPY": COPY_ADVICE,
        "If the process is still running": _CLOSED,
        "If the process is still running and has the socket open": _SHUT_DOWN,
        "If something between the process and the server did it": _CUT,
        "If the process exited": _EXITED,
        "If SIGKILL ended the process": _KILLED,
        "If another signal ended the process": _ASKED_TO_END,
        "If the process crashed": _CRASHED,
    }
)
"""The advice there is, by how the connection was closed."""

_LEAVE_AT_ONCE: Final = frozenset({Server.CELERY, Server.RQ, Server.UWSGI})
"""Those whose children run no exit handlers, and which have a hook of their own for that."""

_CRASHES: Final = frozenset(
    {signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV, signal.SIGSYS, signal.SIGTRAP}
)


def advice_on_closing(fate: Fate | None, *, was_reset: bool, is_heir: bool, runtimes: Sequence[Runtime]) -> Advice:
    """What to change when a connection ends without Terminate.

    Args:
        fate: What has become of the only process that it may have been; ``None`` if that isn't known.
        was_reset: The connection was reset instead of closed.
        is_heir: That process hasn't opened the connection: a fork had given it to it.
        runtimes: What the processes involved run.
    """
    if fate is None:
        return CATALOGUE[Kind.UNCLEAN_CLOSE].advice
    if fate.state is State.ALIVE:
        if not fate.has_socket:
            return CATALOGUE[Kind.UNCLEAN_CLOSE].advice if fate.has_socket is None else _CLOSED
        return _CUT if was_reset else _SHUT_DOWN
    if fate.state is State.KILLED:
        if fate.code in _CRASHES:
            return _CRASHED
        return _KILLED if fate.code == signal.SIGKILL else _ASKED_TO_END
    if is_heir:
        advice = advice_for(Kind.INHERITED_CONNECTION, runtimes)
        return advice._replace(text=f"{_HANDED_DOWN} {advice.text}")
    return _on_leaving(fate, runtimes)


def _on_leaving(fate: Fate, runtimes: Sequence[Runtime]) -> Advice:
    """Of a process that has left, and wasn't killed as far as is known."""
    if any(runtime.server in _LEAVE_AT_ONCE for runtime in runtimes):
        advice = advice_for(Kind.SHARED_BY_PROCESSES, runtimes)
        return advice._replace(title=_EXITED.title, text=f"{_LEFT_OPEN} {advice.text}")
    return _EXITED if fate.state is State.EXITED else CATALOGUE[Kind.UNCLEAN_CLOSE].advice
