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
    "End the COPY before the connection is closed",
    "The server has thrown away all rows of this COPY FROM STDIN. Leave the block that psycopg's cursor.copy() opens, "
    "or call libpq's PQputCopyEnd, and read the answer, before the connection is closed.",
    sources=("https://www.postgresql.org/docs/current/libpq-copy.html",),
)

_CLOSED: Final = Advice(
    "Find out what closes the socket of a process that lives on",
    "The process was alive a moment later and hadn't the socket open any more. Usual causes: a timeout or a cancelled "
    "task, after which the driver drops the connection (let the server do the timing with statement_timeout); a "
    "connection object that was forgotten, whose socket the garbage collector closes; code that closes descriptors "
    "that aren't its own, as daemons do; an exec, which closes libpq's sockets. If it is a proxy or a tunnel, look at "
    "who was connected to it.",
    sources=(f"{_SETTINGS}client.html#GUC-STATEMENT-TIMEOUT",),
)
_SHUT_DOWN: Final = Advice(
    "Find out what shuts the socket down",
    "The process is alive and has the socket open still, so it was shut down and not closed: by shutdown(2), which "
    "works on the connection for all that have it open. Look for it where the connection is given up after an error, "
    "and close the connection through its driver instead.",
)
_CUT: Final = Advice(
    "Look for what has cut the connection",
    "The process is alive and has the socket open still, and the connection was reset. Something in between did that: "
    "a firewall, a proxy, or address translation that forgets idle connections. Keepalives keep it from that "
    "(libpq's keepalives_idle), as does a pool that closes connections before they have been idle for as long.",
    sources=("https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-KEEPALIVES-IDLE",),
)
_LEFT_OPEN: Final = "The process has ended and left open what it had connected."
_EXITED: Final = Advice(
    "Close connections on the way out",
    "The process has exited by itself and left the connection open. Close connections and pools on every path that "
    "ends it, an uncaught exception and sys.exit included: with a block that closes at its end (with, ensure, defer), "
    "or in an exit handler. os._exit and exit! run neither: a child of os.fork or multiprocessing that leaves through "
    "them closes what it has opened before it does.",
)
_HANDED_DOWN: Final = (
    "The last that had the connection open was a process that a fork had given it to, and that said no goodbye for it, "
    "as is right for what isn't its own. Nobody is left to say it then: whoever opened a connection closes it before "
    "it forks, or outlives those that it has forked."
)
_KILLED: Final = Advice(
    "Find out who has killed the process",
    "SIGKILL comes from the kernel's out-of-memory killer (dmesg: 'Out of memory: Killed process'), or from a "
    "supervisor or container whose patience after SIGTERM has ended: give it longer than the longest query takes, and "
    "at SIGTERM finish or cancel the running query, then close the pool.",
)
_ASKED_TO_END: Final = Advice(
    "Close the pool when a signal asks the process to end",
    "Nothing has closed the pool before this signal ended the process, which by default it does at once. Install a "
    "handler for SIGTERM, SIGINT and SIGHUP that finishes or cancels the running query and closes the pool (in Python "
    "one that raises SystemExit is enough for with blocks and exit handlers to run).",
)
_CRASHED: Final = Advice(
    "Find out why the process has crashed",
    "This signal is sent to a process that has done what it mustn't, or has given up by itself (abort). Look at its "
    "core dump (coredumpctl, ulimit -c) and in the kernel's log; native extensions, and threads or forked children "
    "that share a connection, are suspects.",
)

CASES: Final[Mapping[str, Advice]] = MappingProxyType(
    {
        "In the middle of a COPY": COPY_ADVICE,
        "By a process that lives on": _CLOSED,
        "By a process that lives on and has the socket open": _SHUT_DOWN,
        "By something between the process and the server": _CUT,
        "By a process that has exited": _EXITED,
        "By a process that SIGKILL has ended": _KILLED,
        "By a process that another signal has ended": _ASKED_TO_END,
        "By a process that has crashed": _CRASHED,
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
