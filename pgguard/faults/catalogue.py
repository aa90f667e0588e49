"""The kinds of fault: how grave each is, what it means, how it happens and what to change.

The severity rules stand here as tables, and what can be said whatever the software; :mod:`pgguard.faults.advice` has
what fits single frameworks, and ``pgguard explain`` prints both. Claims about other software name the documentation or
source that they were taken from.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.attribution.evidence import Driver
from pgguard.session.verdicts import Kind, Party

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
    """Nothing that the application has to change: what the guard can't see, or what is as it should be by now."""

    @property
    def rank(self) -> int:
        """Orders severities: the graver, the higher."""
        return _RANK[self]


_RANK: Final = {Severity.INFO: 0, Severity.WARNING: 1, Severity.ERROR: 2}


class Advice(NamedTuple):
    """What to change."""

    title: str
    """A heading: no full stop."""
    text: str
    """A few sentences in one line, complete without the code: it is also the hint of a PostgreSQL error."""
    code: str | None = None
    """A few lines to paste, the file that they belong to in a comment above them. What only the application knows is
    called by a plain name: ``engine``, ``pool``, ``work``."""
    sources: tuple[str, ...] = ()
    """Where it is documented: URLs."""


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
    """For whoever commits it; :func:`pgguard.faults.advice.advice_for` knows better where the software is known."""
    fixes: tuple[str, ...] = ()
    """What else can help, one sentence or two each."""
    can_drop: bool = False
    """Whether the message can be swallowed and the session live on."""
    can_reject: bool = True
    """Whether there is a client left that could be told, at a place in the stream where it would understand."""


class Overlap(NamedTuple):
    """Whether a driver sends a request before the answer to the last one, in ways that don't look like pipelining."""

    may: bool
    reason: str
    source: str
    """Where that is written: a driver's file and function, or its documentation."""
    threads_tell: bool = True
    """Two threads are two flows of control: nothing moves one of them from thread to thread."""


OVERLAP: Final[Mapping[Driver, Overlap]] = MappingProxyType(
    {
        Driver.LIBPQ: Overlap(
            may=False,
            reason="libpq refuses: PQsendQuery says 'another command is already in progress' until the last answer "
            "has been read, and in pipeline mode it sends the extended protocol alone",
            source="PostgreSQL's src/interfaces/libpq/fe-exec.c, PQsendQueryStart(), PQsendQueryInternal()",
        ),
        Driver.ASYNCPG: Overlap(
            may=False,
            reason="asyncpg raises 'another operation is in progress'",
            source="asyncpg/protocol/protocol.pyx, BaseProtocol._check_state()",
        ),
        Driver.PYTHON: Overlap(
            may=False,
            reason="pg8000 reads up to ReadyForQuery before execute() returns",
            source="pg8000's core.py, CoreConnection.handle_messages()",
        ),
        Driver.PGJDBC: Overlap(
            may=True,
            reason="with autocommit off, pgjdbc sends BEGIN as a simple Query and the statement right behind it, "
            "and reads both answers afterwards",
            source="pgjdbc's core/v3/QueryExecutorImpl.java, sendQueryPreamble()",
        ),
        Driver.JAVA: Overlap(
            may=True,
            reason="it may be any driver, and Vert.x's pipelines when it is told to",
            source="https://vertx.io/docs/vertx-pg-client/java/",
            threads_tell=False,
        ),
        Driver.POSTGRES_JS: Overlap(
            may=True,
            reason="postgres.js sends queries on a connection that is still answering others, simple Queries included",
            source="postgres.js's src/connection.js, execute(): max_pipeline",
        ),
        Driver.NODE_POSTGRES: Overlap(
            may=True,
            reason="node-postgres does so with pipeline: true, simple Queries included; otherwise it has a queue",
            source="pg's lib/client.js, _pulseQueryQueue(): pipeline",
        ),
        Driver.NODE: Overlap(
            may=True,
            reason="it may be postgres.js, or node-postgres with pipeline: true",
            source="postgres.js's src/connection.js; pg's lib/client.js",
        ),
        Driver.DOTNET: Overlap(
            may=True,
            reason="Npgsql with Multiplexing=true sends the commands of many threads over one connection",
            source="https://www.npgsql.org/doc/connection-string-parameters.html",
            threads_tell=False,
        ),
        Driver.LIB_PQ: Overlap(
            may=False,
            reason="lib/pq has no pipelining: a call reads its answer, or leaves it to rows.Next(). A second one "
            "meanwhile fails with 'unexpected Parse response', or newer versions refuse it: 'there is already a query "
            "being processed on this connection'",
            source="lib/pq's conn.go, conn.query(), conn.simpleQuery(), errQueryInProgress",
            threads_tell=False,
        ),
        Driver.PGX: Overlap(
            may=True,
            reason="pgx itself refuses ('conn busy') outside of its pipeline mode, but hands out its connection to "
            "programs that relay what others send",
            source="pgx's pgconn/pgconn.go, PgConn.lock(), StartPipeline(), Hijack()",
            threads_tell=False,
        ),
        Driver.GO: Overlap(
            may=True,
            reason="it may be any driver, and Go moves one flow of control between threads",
            source="https://go.dev/doc/faq#goroutines",
            threads_tell=False,
        ),
        Driver.TOKIO_POSTGRES: Overlap(
            may=True,
            reason="tokio-postgres sends the next request whenever two of its futures are polled at once",
            source="https://docs.rs/tokio-postgres/latest/tokio_postgres/#pipelining",
            threads_tell=False,
        ),
        Driver.UNKNOWN: Overlap(
            may=True,
            reason="nothing is known about the driver, and some, tokio-postgres for one, pipeline on their own",
            source="https://docs.rs/tokio-postgres/latest/tokio_postgres/#pipelining",
            threads_tell=False,
        ),
    }
)
"""May requests from *within one process* overlap? Between two processes they never may, whatever the driver."""


_PGBOUNCER: Final = "https://www.pgbouncer.org/"
_LIBPQ_FORK: Final = "https://www.postgresql.org/docs/current/libpq-connect.html"
_LIBPQ_THREADS: Final = "https://www.postgresql.org/docs/current/libpq-threading.html"
_SHUTDOWN: Final = "https://www.postgresql.org/docs/current/server-shutdown.html"
_ISREADY: Final = "https://www.postgresql.org/docs/current/app-pg-isready.html"
_SETTINGS: Final = "https://www.postgresql.org/docs/current/runtime-config-"


SERVERS_ADVICE: Final = Advice(
    "Look into the server's log at this time",
    "A stream that ends in the middle of a message means that a server process crashed or was killed (PostgreSQL's "
    "log: 'terminated by signal'; the kernel's: 'Out of memory'), that pg_terminate_backend was called while the "
    "client wasn't reading, that there was a failover, or that a proxy or network device gave up the connection. A "
    "malformed message comes from a proxy or pooler on the way: point --upstream straight at PostgreSQL. All that the "
    "application can do is to reconnect and repeat the transaction.",
    sources=(_SHUTDOWN,),
)
"""What to change about a protocol-violation of the server's."""

SETTLED_ADVICE: Final = Advice(
    "Nothing needs to change",
    "The processes that inherited the connection have opened their own and leave this one alone, as they should. Its "
    "socket stays open in them until they end, and keeps the session alive until then. To leave nothing to inherit, "
    "close the pool in the parent just before the fork. To silence this, set the kind to ignore.",
    sources=(_LIBPQ_FORK,),
)
"""What to change about an inherited connection whose heirs have others of their own."""

STRANGERS_ADVICE: Final = Advice(
    "Find out what connects to this port, and why",
    "pgguard closed the connection without an answer, as PostgreSQL would. A health check should connect and close, or "
    "run pg_isready; a load balancer must not send the PROXY protocol; and a client that requires TLS must be offered "
    "it (--tls-cert), or set to sslmode=disable or prefer.",
    sources=(_ISREADY,),
)
"""What to change about a protocol-violation before login that isn't PostgreSQL's protocol at all."""


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
        "guard and PostgreSQL gave this client another client's answer (a pooler or proxy that reuses a server "
        "connection before its last answer has been read), or the server is not PostgreSQL and has its own idea of "
        "the protocol.",
        Advice(
            "Look between the guard and PostgreSQL",
            "Point --upstream straight at PostgreSQL, without the pooler or proxy in between. If that makes the fault "
            "go away, the pooler or proxy hands out connections with answers left in them: upgrade it, and make it "
            "close a server connection whose client vanished or cancelled in the middle of a query.",
        ),
        (
            "Rows read since then may have been another client's: discard the connection, and don't retry on it.",
            (
                "While you look for the cause, you can set this kind to drop in the configuration file: the guard then "
                "drops the message, and the session goes on."
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
            "straight at PostgreSQL: if that makes the fault go away, the pooler or proxy in between mixes up answers.",
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
        "whichever process reads first gets the answer: one process gets another's rows, and the other waits for "
        "ever or prints 'arrived from server while idle'. Nobody notices until two of them are busy at the same time.",
        "A process opened the connection and then forked. The child inherits every open file descriptor, including "
        "the connection's socket, and a copy of the driver's state, so both believe that they own the connection. "
        "Preforking servers that preload the application (Puma, Unicorn, gunicorn, uWSGI, Celery, multiprocessing) "
        "do this whenever loading it runs a query.",
        Advice(
            "Close the pool before forking",
            "A connection belongs to the process that opened it; a fork copies the socket to the child. Disconnect "
            "in the parent just before the fork (before_fork in Puma and Unicorn), or connect in each worker "
            "after it (post_fork in gunicorn, worker_process_init in Celery), so that every process has a pool of "
            "its own. In the child, forget an inherited pool without closing it: SQLAlchemy's "
            "engine.dispose(close=False); a normal close would end the parent's session.",
            sources=(_LIBPQ_FORK,),
        ),
    ),
    Entry(
        Kind.SHARED_BY_THREADS,
        Severity.ERROR,
        "error",
        "two threads use one connection at once",
        "Two threads of one process had requests outstanding on the connection at the same time, and not by "
        "pipelining. Whichever of them reads first gets the answer: rows meant for one thread end up in the other, or "
        "the driver loses count and gives up the connection.",
        "One connection object is used by several threads without a lock: a global or a class attribute, a connection "
        "that is kept after its pool's block has ended, or an object with a connection inside that a threaded server "
        "(Puma, gthread, Sidekiq) or a thread pool shares.",
        Advice(
            "Give each thread a connection of its own",
            "Check a connection out of a thread-safe pool for as long as a thread needs it, and keep no reference to "
            "it afterwards; or keep one for each thread in a thread-local variable. A lock around a shared connection "
            "must be held until the answer has been read to its end, and around whole transactions.",
            sources=(_LIBPQ_THREADS,),
        ),
    ),
    Entry(
        Kind.REQUEST_WHILE_BUSY,
        Severity.ERROR,
        "error; warning where the client's driver may pipeline",
        "a request was sent before the last answer was complete",
        "The client sent another request while the server still owed it an answer, and as far as the guard can tell it "
        "wasn't pipelining. The client will take the answer to the first request for the answer to the second, and so "
        "on for the rest of the session.",
        "A timeout, cancellation or exception left an answer half read, and the application kept using the connection; "
        "or two threads, or two coroutines, use one connection without a lock.",
        Advice(
            "Close a connection whose query was interrupted, and give each thread its own",
            "After a client-side timeout (Ruby's Timeout.timeout, a cancelled coroutine, a signal handler that "
            "raises) the rest of the answer is still on its way: close the connection instead of returning it to "
            "the pool, or let the server time queries out with statement_timeout. Two threads must not use one "
            "connection at once: check one out of the pool for each.",
            sources=(f"{_SETTINGS}client.html#GUC-STATEMENT-TIMEOUT",),
        ),
        (
            "C: read with PQgetResult until it returns NULL before the connection is used again.",
            (
                "If this is only a warning and the driver pipelines by design, set this kind to ignore in the "
                "configuration."
            ),
        ),
    ),
    Entry(
        Kind.UNREAD_ANSWER,
        Severity.WARNING,
        "warning; error when the next request was sent on top of it",
        "an answer lies unread in the client's socket",
        "The server has answered in full, the session is idle, and the client hasn't read the answer from its socket. "
        "Whoever uses the connection next finds it there. Either the driver takes it for the answer to the next "
        "request, so that every later answer is off by one; or it gives up with an error of its own, such as 'another "
        "command is already in progress' (libpq) or 'unexpected Parse response' (lib/pq).",
        "A timeout, a cancellation or an exception abandoned the request after it was sent and before its answer was "
        "read; or the rows of one query are still being read while the next one is sent on the same connection; or "
        "two threads or tasks use one connection. An answer that is merely read late does no harm: then the warning "
        "only says how long it lay there. It becomes an error when the next request is sent on top of the answer.",
        Advice(
            "Close a connection whose query was abandoned, or read its answer to the end",
            "After a client-side timeout or an exception in the middle of a query, close the connection instead of "
            "returning it to the pool, or read until the driver says that the answer is complete. Better, let the "
            "server time queries out: with statement_timeout the answer is an error, which the driver reads as usual. "
            "Close rows and cursors before the next query on the same connection.",
            sources=(f"{_SETTINGS}client.html#GUC-STATEMENT-TIMEOUT",),
        ),
        (
            "C: read with PQgetResult until it returns NULL before the connection is used again.",
            "If clients read late on purpose, raise --unread-answer; 0 turns this warning off.",
        ),
    ),
    Entry(
        Kind.INHERITED_CONNECTION,
        Severity.WARNING,
        "warning; info if whoever inherited it has opened connections of its own and never used this one",
        "more than one process has the connection open",
        "More than one process has the connection's socket open. Nothing has gone wrong yet, but as soon as two of "
        "them use it, answers go astray. Even unused, the copy keeps the session alive after its owner has gone, and "
        "a child that cleans up at exit sends Terminate on its parent's connection. A child has a few seconds to open "
        "a connection of its own; if it does, this is only information.",
        "A process forked while it had a connection open. A child inherits every open file descriptor, and FD_CLOEXEC, "
        "which closes them on exec, does not help a child that only forks: see fork(2).",
        Advice(
            "Close the pool before forking",
            "Disconnect in the parent just before the fork, or connect in each child after it. A child that must "
            "not use the connection should forget it without closing it (SQLAlchemy: engine.dispose(close=False)). "
            "If only one child goes on to use the connection and the parent never touches it again, this is "
            "harmless: set this kind to ignore.",
            sources=(_LIBPQ_FORK,),
        ),
    ),
    Entry(
        Kind.FOREIGN_TERMINATE,
        Severity.ERROR,
        "error",
        "a process ended a connection that another process has open",
        "Terminate came from a process other than the one that opened the connection, and another process still has "
        "it open. The server ends the session, rolls back its transaction, and the owner finds out with its next "
        "query: 'server closed the connection unexpectedly', or 'SSL connection has been closed unexpectedly'.",
        "A forked child exited, and on its way out closed what it had inherited: a destructor, a finalizer or an exit "
        "handler sent Terminate. Perl's DBI handles do this unless AutoInactiveDestroy is set; Ruby does "
        "it in at_exit blocks and when it frees a PG::Connection; Python does it in atexit handlers or when the child "
        "disposes of a pool; and PHP closes every connection at the end of the script.",
        Advice(
            "Let the child leave without closing what isn't its own",
            "Disconnect in the parent just before the fork, so that there is nothing to close. Where that isn't "
            "possible, the child must forget the connection instead of closing it (Perl: AutoInactiveDestroy; "
            "SQLAlchemy: engine.dispose(close=False)), or exit without running exit handlers and destructors (Ruby: "
            "exit!, Python: os._exit, C: _exit).",
            sources=(_LIBPQ_FORK,),
        ),
        (
            (
                "While you look for the child, you can set this kind to drop in the configuration file: the guard then "
                "drops the Terminate, and the owner's session goes on. With TLS it can't, and nothing is dropped."
            ),
        ),
        can_drop=True,
    ),
    Entry(
        Kind.UNCLEAN_CLOSE,
        Severity.WARNING,
        "warning; error with work open: a Query, Execute, FunctionCall, COPY or transaction",
        "the client disconnected without Terminate",
        "The client's side of the connection ended without the Terminate message that a client sends when it is done. "
        "An open transaction is rolled back; a query that was running goes on until PostgreSQL notices, and nobody "
        "learns its outcome.",
        "The process was killed (SIGKILL, the kernel's out-of-memory killer, a supervisor's timeout), crashed, exited "
        "without closing its connections, or left through os._exit. Or it is still running, and its driver dropped the "
        "socket after a timeout or an error of its own, or something in between cut the connection. The report says "
        "which of these it was, if the kernel still knew: how a process ended can be seen only until its parent has "
        "collected its exit status.",
        Advice(
            "Find out how the process ended, and close connections on the way out",
            "If it was killed: look in the logs of its supervisor and of the kernel (dmesg: 'Out of memory: Killed "
            "process'), and at SIGTERM finish or cancel the running query, then disconnect. If it exited: close the "
            "pool first, on every path, and before os._exit. If it is still running: look for a timeout after which "
            "the driver drops the connection, or a proxy or firewall in between.",
        ),
        (
            (
                "Containers and supervisors: between SIGTERM and SIGKILL, give the process more time than its longest "
                "query takes."
            ),
            "PostgreSQL 14 and later: client_connection_check_interval ends queries whose client has gone.",
            "Forked children that exit with os._exit or exit! must not own connections.",
            (
                "Terminate in the middle of COPY FROM STDIN loses all its rows (the server's log: 'unexpected message "
                "type 0x58 during COPY from stdin'): end the COPY before the connection is closed, by leaving the "
                "block that psycopg's cursor.copy() opens, or with libpq's PQputCopyEnd."
            ),
        ),
        can_reject=False,
    ),
    Entry(
        Kind.IDLE_IN_TRANSACTION,
        Severity.WARNING,
        "warning",
        "a transaction sits idle",
        "A transaction block has been open for longer than its threshold without a request. It keeps its locks, so "
        "others wait for it, and keeps VACUUM from removing dead rows anywhere in the database.",
        "The application began a transaction and then did something else: called another service, waited for a user, "
        "or forgot to commit. Drivers that follow Python's DB-API begin a transaction with the first query, even a "
        "SELECT, and an exception on a path without a rollback leaves it open.",
        Advice(
            "Keep transactions short, and end them on every path",
            "Begin the transaction after the slow work, and commit before more slow work: blocks that commit or roll "
            "back at their end (with conn.transaction(), DB.transaction do) leave none open. Where only single "
            "statements are run, use autocommit. With idle_in_transaction_session_timeout the server ends sessions "
            "that do it anyway.",
            sources=(f"{_SETTINGS}client.html#GUC-IDLE-IN-TRANSACTION-SESSION-TIMEOUT",),
        ),
    ),
    Entry(
        Kind.LEAKED_CONNECTION,
        Severity.WARNING,
        "warning",
        "a connection was left open",
        "The process that opened the connection has ended, but the session goes on: another process has inherited the "
        "socket and keeps it open, and neither uses it nor waits on it. The session takes one of the server's slots, "
        "and keeps its locks if a transaction is open. A daemon that keeps using the connection of the process that "
        "started it isn't reported: that connection was handed over. Or, behind pgguard run: the connection was still "
        "open when the command had ended, and nobody has used it since.",
        "The process forked while it had the connection open, and the child (a daemon, a background job, a worker that "
        "was left behind) inherited the socket and never closed it. Or a process goes on that the command has started "
        "and not ended: a worker, or a server that a test needed.",
        Advice(
            "Close connections before forking, and before the process ends",
            "Disconnect in the parent just before the fork, so that no child keeps the socket open. Find the process "
            "that has it open by its pid. If it should have ended with its parent, end it. If it is a daemon, make it "
            "close what it inherited, or start it with exec, which closes libpq's sockets.",
            sources=(_LIBPQ_FORK,),
        ),
    ),
    Entry(
        Kind.CONNECTION_EXHAUSTION,
        Severity.ERROR,
        "error",
        "the server has no connection left",
        "The server refused a connection because it had no slot left for it: SQLSTATE 53300 (too_many_connections). "
        "The report says which limit was reached, if the server says so, and how many of the connections that count "
        "toward it each process has open through this guard.",
        "The application asks for more connections than max_connections allows (minus those that are reserved), or "
        "than the role or the database may have. Every process has a pool of its own, so what counts is pool size "
        "times workers times hosts, and twice that during a rolling restart. Or connections are kept that nobody "
        "needs: opened for each request and never closed, or idle in a transaction that nobody ends.",
        Advice(
            "Make all pools together fit into max_connections",
            "Multiply pool size by processes by hosts, allow for deployments and for psql, and size the pools so that "
            "the total stays below max_connections: a process needs as many connections as it has threads that run "
            "queries at once. If that is still too many, put a pooler in transaction mode (pgbouncer) in between. A "
            "process that has many more connections than its pool's size is leaking them.",
            sources=(f"{_SETTINGS}connection.html#GUC-MAX-CONNECTIONS",),
        ),
        (
            (
                "superuser_reserved_connections and, since PostgreSQL 16, reserved_connections keep a few slots for "
                "administrators: pg_stat_activity shows who is connected."
            ),
            (
                "A role and a database can have limits of their own (ALTER ROLE, ALTER DATABASE … CONNECTION LIMIT), "
                "and replication has max_wal_senders."
            ),
        ),
        # The server is refusing the client already, and with the SQLSTATE that drivers look at.
        can_reject=False,
    ),
    Entry(
        Kind.SESSION_STATE_LOST,
        Severity.WARNING,
        "warning",
        "the server does not know what this session has prepared",
        "The server's error contradicts what this session has done: a prepared statement exists that it never made "
        "(42P05), or one that it made and has not closed is gone (26000). Between the guard and PostgreSQL the "
        "server's session has been swapped for another one. Whatever else belongs to a session is lost with it: "
        "settings, temporary tables, advisory locks, LISTEN.",
        "A pooler in transaction mode (pgbouncer with pool_mode = transaction, and hosted ones like it) gives each "
        "transaction the next server session that is free, and the driver prepares statements by name: psycopg after "
        "the fifth execution, asyncpg and Rails from the first, pgjdbc from the fifth. Rarely, a trigger or a view "
        "calls a function that drops statements.",
        Advice(
            "Let the pooler keep track of prepared statements, or turn them off in the driver",
            "pgbouncer 1.21 and later tracks them if max_prepared_statements is above 0. Otherwise turn them off: "
            "psycopg prepare_threshold=None, asyncpg statement_cache_size=0, pgjdbc prepareThreshold=0, Rails "
            "prepared_statements: false, pgx default_query_exec_mode=exec, postgres.js prepare: false. Or use "
            "pool_mode = session where sessions matter.",
            "; pgbouncer.ini\nmax_prepared_statements = 200",
            (f"{_PGBOUNCER}config.html#max_prepared_statements", f"{_PGBOUNCER}features.html"),
        ),
        (
            "Behind such a pooler, settings, locks and LISTEN must not outlast a transaction.",
            (
                "Giving each client's statements names of their own (asyncpg: prepared_statement_name_func) avoids "
                "names that exist already, but not statements that are gone."
            ),
        ),
    ),
    Entry(
        Kind.PROTOCOL_VIOLATION,
        Severity.ERROR,
        "error; info before login, when what came isn't PostgreSQL's protocol at all",
        "a message that is malformed, torn, or out of place",
        "A message was malformed, torn, or not allowed at this point of the session. Whoever reads it can't tell "
        "where the next one begins.",
        "If the client sent it: two threads or processes wrote to the socket at once, and their messages ran into each "
        "other; or a driver or proxy is faulty; or something that doesn't speak PostgreSQL's protocol connected to the "
        "port. If the server sent it: the server, or something in front of it, crashed or gave up in the middle of an "
        "answer, and nobody on the client's side did anything wrong.",
        Advice(
            "Find out who else writes to this socket",
            "If more than one process has the socket open, fix that first: connect after forking. Within one "
            "process, make sure that no two threads use the connection at once. If neither is the case, suspect "
            "the driver or a proxy on the way, and try the latest version of it.",
        ),
        (
            f"If the server sent it: {SERVERS_ADVICE.text}",
            f"If it isn't PostgreSQL's protocol at all: {STRANGERS_ADVICE.text}",
        ),
    ),
    Entry(
        Kind.TLS_CORRUPTION,
        Severity.ERROR,
        "error",
        "two processes use one TLS session",
        "The client's TLS stream failed its integrity check. A TLS session numbers its records, and encrypts each with "
        "the next number. Two processes that have the same one use the same numbers, so the second one's record can't "
        "be decrypted, and the session is over for both: one finds 'decryption failed or bad record mac' in its log, "
        "'bad record mac' or, before TLS 1.3, 'cipher operation failed'; the other one 'SSL SYSCALL error: EOF "
        "detected', 'unexpected eof while reading' or 'SSL connection has been closed unexpectedly'.",
        "A process opened the connection and then forked. The child inherits the connection's socket, and a copy of "
        "the TLS library's state: keys and counters. Preforking servers that preload the application (Puma, Unicorn, "
        "gunicorn, uWSGI, Celery, multiprocessing) do this whenever loading it runs a query. Without TLS the same is "
        "shared-by-processes, which nobody notices for longer.",
        Advice(
            "Close the pool before forking",
            "A connection belongs to the process that opened it; a fork copies its socket and its TLS session to the "
            "child. Disconnect in the parent just before the fork (before_fork in Puma and Unicorn), or connect in "
            "each worker after it (post_fork in gunicorn, worker_process_init in Celery), so that every process has a "
            "pool of its own. In the child, forget an inherited pool without closing it: SQLAlchemy's "
            "engine.dispose(close=False); a normal close would end the parent's session. To turn TLS off only hides "
            "it.",
            sources=(_LIBPQ_FORK,),
        ),
        # TLS has failed: nothing that the client is told can be read by it.
        can_reject=False,
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
            "If the session is encrypted, set sslmode=disable and gssencmode=disable in the client, and connect to "
            "the guard over loopback or a Unix socket. Anything else is a bug in pgguard: please report it with the "
            "reason given here.",
        ),
        can_reject=False,
    ),
)


def kind_hint(name: str) -> str:
    """What to say to who has named a kind that there isn't: the nearest one, otherwise where they are listed.

    Whoever leaves a name's end or beginning away means it rather than one that is spelled much alike.
    """
    name = name.lower().replace("_", "-").strip("-")
    kinds = [kind.value for kind in Kind]
    begun = [kind for kind in kinds if name and (kind.startswith(name) or f"-{name}" in kind)]
    nearest = begun or difflib.get_close_matches(name, kinds, n=1, cutoff=0.5)
    return f"did you mean {' or '.join(nearest)}?" if nearest else "pgguard explain lists them"


def severity_of(verdict: Verdict, driver: Driver) -> Severity:
    """How grave this very fault is, given the driver of the process whose request is being judged."""
    if verdict.kind is Kind.UNCLEAN_CLOSE and (verdict.open_request or verdict.open_transaction):
        return Severity.ERROR
    if verdict.by is Party.STRANGER:
        return Severity.INFO
    if verdict.kind is Kind.INHERITED_CONNECTION and verdict.settled:
        return Severity.INFO
    if verdict.kind is Kind.UNREAD_ANSWER and verdict.message is not None:
        return Severity.ERROR
    if verdict.kind is Kind.REQUEST_WHILE_BUSY and OVERLAP[driver].may:
        return Severity.WARNING
    return CATALOGUE[verdict.kind].severity
