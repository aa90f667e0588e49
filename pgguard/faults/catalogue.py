"""The kinds of fault: how grave each is, what it means, how it comes about and what to change.

This is what ``pgguard explain`` prints, where a record takes its advice from, and where the severity rules stand as
tables. Claims about other software name the documentation or source that they were taken from.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.attribution.evidence import Driver
from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pgguard.session.verdicts import Verdict


class Severity(StrEnum):
    """How grave a fault is."""

    ERROR = "error"
    """The application misuses its connection: wrong answers, lost work or broken sessions follow."""
    WARNING = "warning"
    """It is about to, or may only look as if it did."""
    INFO = "info"
    """Something about the guard's own view, not about the application."""

    @property
    def rank(self) -> int:
        """Orders severities: the graver, the higher."""
        return _RANK[self]


_RANK: Final = {Severity.INFO: 0, Severity.WARNING: 1, Severity.ERROR: 2}


class Advice(NamedTuple):
    """What to change, in a heading and a few sentences."""

    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Entry:
    """Everything to be said about a kind of fault, whoever commits it."""

    kind: Kind
    severity: Severity
    """Unless :func:`severity_of` finds a reason for another."""
    severity_rule: str
    """The rule in words."""
    title: str
    meaning: str
    cause: str
    advice: Advice
    """The short form, which every record carries."""
    fixes: tuple[str, ...]
    """The advice spelled out for the software that people commonly meet it with, one sentence or two each."""
    can_drop: bool = False
    """Whether the message can be swallowed and the session live on."""
    can_reject: bool = True
    """Whether there is a client left that could be told, at a place in the stream where it would understand."""


class Overlap(NamedTuple):
    """Whether a driver sends a request before the answer to the last one, in ways that don't look like pipelining."""

    may: bool
    reason: str


OVERLAP: Final[Mapping[Driver, Overlap]] = MappingProxyType(
    {
        Driver.LIBPQ: Overlap(
            may=False,
            reason="libpq refuses: PQsendQuery says 'another command is already in progress' until the last answer "
            "has been read, and in pipeline mode it sends the extended protocol alone (fe-exec.c, "
            "PQsendQueryStart)",
        ),
        Driver.PYTHON: Overlap(
            may=False,
            reason="asyncpg raises 'another operation is in progress', and pg8000 reads up to ReadyForQuery before "
            "execute() returns",
        ),
        Driver.JAVA: Overlap(
            may=True,
            reason="with autocommit off, pgjdbc sends BEGIN as a simple Query and the statement right behind it, "
            "and reads both answers afterwards (QueryExecutorImpl.sendQueryPreamble)",
        ),
        Driver.NODE: Overlap(
            may=True,
            reason="postgres.js sends queries on a connection that is still answering others (max_pipeline), and "
            "so does node-postgres with pipeline: true, simple Queries included",
        ),
        Driver.DOTNET: Overlap(
            may=True,
            reason="Npgsql with Multiplexing=true sends the commands of many threads over one connection",
        ),
        Driver.GO: Overlap(
            may=True,
            reason="pgx has batches and a pipeline mode, and Go moves one flow of control between threads",
        ),
        Driver.UNKNOWN: Overlap(
            may=True,
            reason="nothing is known about the driver, and some, tokio-postgres for one, pipeline on their own",
        ),
    }
)
"""May requests from *within one process* overlap? Between two processes they never may, whatever the driver."""


_FORK_FIXES: Final = (
    (
        "Puma, Unicorn: in before_fork, close what the application opened while it was preloaded; workers connect "
        "anew on their first query."
    ),
    (
        "Active Record: 5.2 and later let go of an inherited pool in the child by themselves; a connection taken "
        "out of it earlier (a constant, a thread, a bare PG.connect) is not covered."
    ),
    "Sequel: Sequel::DATABASES.each(&:disconnect) in before_fork, in the parent.",
    (
        "SQLAlchemy: engine.dispose(close=False) in the child (gunicorn's post_fork, Celery's worker_process_init, "
        "a multiprocessing initializer): it forgets the parent's connections without closing them."
    ),
    (
        "Django: django.db.connections.close_all() in the parent before the fork. In the child it would send "
        "Terminate on the parent's connection."
    ),
    "psycopg: create the pool with ConnectionPool(..., open=False) and call pool.open() in each worker.",
    (
        "gunicorn without preload_app, uWSGI with lazy-apps: each worker loads the application after the fork "
        "and connects for itself."
    ),
    (
        "multiprocessing, os.fork, pcntl_fork: connect in the child, and hand it no connection; the 'spawn' start "
        "method inherits nothing."
    ),
    "Perl DBI: set AutoInactiveDestroy, so that a child's handles don't close the parent's connection.",
)


def _table(*entries: Entry) -> Mapping[Kind, Entry]:
    return MappingProxyType({entry.kind: entry for entry in entries})


CATALOGUE: Final[Mapping[Kind, Entry]] = _table(
    Entry(
        Kind.MESSAGE_WHILE_IDLE,
        Severity.ERROR,
        "error",
        "the server sent an answer that nobody had asked for",
        "No request was outstanding, and a message arrived that only ever answers one. PostgreSQL sends nothing "
        "unasked except NoticeResponse, ParameterStatus, NotificationResponse and the ErrorResponse with which it "
        "ends a session. The client will take the message for the beginning of its next answer.",
        "Not a fork: a connection shared by processes looks orderly from the server's side. Something between the "
        "guard and PostgreSQL gave this client an answer of another's (a pooler or proxy that reuses a server "
        "connection before its last answer has been read), or the server is not PostgreSQL and has its own idea of "
        "the protocol.",
        Advice(
            "Look between the guard and PostgreSQL",
            "Point --upstream straight at PostgreSQL, without the pooler or proxy in between. If the fault is "
            "gone, that one hands out connections with answers left in them: upgrade it, and make it close a "
            "server connection whose client vanished or cancelled in the middle of a query.",
        ),
        (
            "Rows read since then may have been another client's: discard the connection, don't retry on it.",
            (
                "While you look for the cause, the configuration can say drop for this kind: the guard then "
                "swallows the message and the session goes on."
            ),
        ),
        can_drop=True,
    ),
    Entry(
        Kind.UNEXPECTED_RESPONSE,
        Severity.ERROR,
        "error",
        "the server's answer does not fit the request",
        "The protocol fixes which messages can answer a request, and this one can't answer the one outstanding. "
        "From here on the client's answers are off by one: it may be shown another query's rows.",
        "A pooler or proxy between the guard and PostgreSQL mixed up two clients' answers, or gave out a "
        "connection with an answer left in it; or the server is not PostgreSQL and departs from its protocol.",
        Advice(
            "Discard this connection, then look between the guard and PostgreSQL",
            "Nothing read on this connection since the last complete answer can be trusted. Point --upstream "
            "straight at PostgreSQL: if the fault is gone, the pooler or proxy in between mixes up answers.",
        ),
        (
            (
                "pgbouncer and others in transaction mode: check that no client relies on session state across "
                "transactions, and that every server connection is reset or closed after an abandoned query."
            ),
        ),
    ),
    Entry(
        Kind.SHARED_BY_PROCESSES,
        Severity.ERROR,
        "error",
        "two processes use one connection",
        "Requests of more than one process went over a single connection. The server answers in order, but "
        "whichever process reads first gets the answer: one process is handed another's rows, the other waits for "
        "ever or prints 'arrived from server while idle'. It goes unnoticed until two of them are busy at the same "
        "time.",
        "A process opened the connection and then forked. The child inherits every open file descriptor, the "
        "socket of the connection among them, and a copy of the driver's state, so both believe that they own it. "
        "Preforking servers that preload the application (Puma, Unicorn, gunicorn, uWSGI, Celery, multiprocessing) "
        "do this whenever loading it runs a query.",
        Advice(
            "Close the pool before forking",
            "A connection belongs to the process that opened it; a fork copies the socket to the child. Disconnect "
            "in the parent just before the fork (before_fork in Puma and Unicorn), or connect in each worker "
            "after it (post_fork in gunicorn, worker_process_init in Celery), so that every process has a pool of "
            "its own. In the child, forget an inherited pool without closing it: SQLAlchemy's "
            "engine.dispose(close=False); a normal close would end the parent's session.",
        ),
        _FORK_FIXES,
    ),
    Entry(
        Kind.REQUEST_WHILE_BUSY,
        Severity.ERROR,
        "error; warning where the client's driver may pipeline",
        "a request was sent before the last answer was complete",
        "The client asked again while the server still owed it an answer, and not by pipelining as far as the guard "
        "can tell. The answer to the first request will be taken for the answer to the second, and so on for the "
        "rest of the session.",
        "A timeout, cancellation or exception abandoned an answer half read, and the connection went on being "
        "used; or two threads, or two coroutines, use one connection without a lock.",
        Advice(
            "Close a connection whose query was interrupted, and give each thread its own",
            "After a client-side timeout (Ruby's Timeout.timeout, a cancelled coroutine, a signal handler that "
            "raises) the rest of the answer is still on its way: close the connection instead of returning it to "
            "the pool, or let the server do the timing with statement_timeout. A connection is not to be used by "
            "two threads at once: check one out of the pool for each.",
        ),
        (
            "Ruby: replace Timeout.timeout around queries by SET statement_timeout, or by the driver's own timeout.",
            (
                "Python: don't share a psycopg2 or pg8000 connection between threads that don't take turns; with "
                "asyncio, one connection for each task, from a pool."
            ),
            "C: read with PQgetResult until it returns NULL before the connection is used again.",
            (
                "If this is only a warning and the driver pipelines by design, say ignore for this kind in the "
                "configuration."
            ),
        ),
    ),
    Entry(
        Kind.INHERITED_CONNECTION,
        Severity.WARNING,
        "warning",
        "a fork took the connection along",
        "More than one process has the connection's socket open. Nothing has gone wrong yet; as soon as two of "
        "them use it, answers go astray. And even unused, the copy keeps the session alive after its owner has "
        "gone, and a child that tidies up at exit sends Terminate on its parent's connection.",
        "A process that had a connection open forked. Every open file descriptor is inherited, and closing it on "
        "exec (FD_CLOEXEC) does not help a child that only forks. fork(2).",
        Advice(
            "Close the pool before forking",
            "Disconnect in the parent just before the fork, or connect in each child after it. A child that must "
            "not use the connection should forget it without closing it (SQLAlchemy: engine.dispose(close=False)). "
            "Where one child alone goes on with the connection and the parent never touches it again, this is "
            "harmless: say ignore for this kind.",
        ),
        _FORK_FIXES,
    ),
    Entry(
        Kind.UNCLEAN_CLOSE,
        Severity.WARNING,
        "warning; error with a request or a transaction open",
        "the client went away without saying goodbye",
        "The connection ended without Terminate. An open transaction is rolled back; a query that was running goes "
        "on until PostgreSQL notices, and nobody learns its outcome.",
        "The process was killed (SIGKILL, the kernel's out-of-memory killer, a supervisor's timeout), crashed, or "
        "left through os._exit; or the driver dropped the socket after an error of its own.",
        Advice(
            "Find out why the process ended, and close connections on the way out",
            "Look for the process in the logs of its supervisor and of the kernel (dmesg: 'Out of memory: Killed "
            "process'). Where it ends on purpose, close the pool first: at SIGTERM finish or cancel the running "
            "query, then disconnect.",
        ),
        (
            (
                "Containers and supervisors: give the process longer between SIGTERM and SIGKILL than its longest "
                "query takes."
            ),
            "PostgreSQL 14 and later: client_connection_check_interval ends queries whose client has gone.",
            "Forked children that leave through os._exit or exit!: they must not own connections.",
        ),
        can_reject=False,
    ),
    Entry(
        Kind.PROTOCOL_VIOLATION,
        Severity.ERROR,
        "error",
        "a message that PostgreSQL's protocol does not allow",
        "A message was malformed, torn, or not allowed at this point of the session. Whoever reads it can't tell "
        "where the next one begins.",
        "Two threads or processes wrote to the socket at once, and their messages ran into each other; or a driver "
        "or proxy is faulty; or something that doesn't speak PostgreSQL's protocol connected to the port.",
        Advice(
            "Find out who else writes to this socket",
            "If more than one process has the socket open, fix that first: connect after forking. Within one "
            "process, make sure that no two threads use the connection at once. If neither is the case, suspect "
            "the driver or a proxy on the way, and try the latest version of it.",
        ),
        (
            (
                "A health check or port scanner that connects and sends something else: have it send a proper "
                "startup packet, as pg_isready does."
            ),
        ),
    ),
    Entry(
        Kind.UNTRACKED,
        Severity.INFO,
        "info",
        "the guard does not follow this session",
        "The guard forwards the session's bytes and no longer looks at them. Faults in it go unseen.",
        "The session is encrypted between client and server in a way that the guard can't read, or it did "
        "something that the guard does not understand.",
        Advice(
            "Let the guard read the session",
            "Encryption: give the guard a certificate (--tls-cert, --tls-key) so that TLS ends there, and set "
            "gssencmode=disable in the client; over loopback, sslmode=disable will do. Anything else is a "
            "shortcoming of pgguard: please report it with the reason given here.",
        ),
        (),
        can_reject=False,
    ),
)


def severity_of(verdict: Verdict, driver: Driver) -> Severity:
    """How grave this very fault is, given the driver of the process whose request is being judged."""
    if verdict.kind is Kind.UNCLEAN_CLOSE and (verdict.open_request or verdict.open_transaction):
        return Severity.ERROR
    if verdict.kind is Kind.REQUEST_WHILE_BUSY and OVERLAP[driver].may:
        return Severity.WARNING
    return CATALOGUE[verdict.kind].severity
