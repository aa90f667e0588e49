"""Advice as a whole, on what isn't cured by a hook around a fork and a call in it."""

from __future__ import annotations

from typing import Final

from pgguard.attribution.runtime import Language, Library
from pgguard.faults.advice.rows import TAKEN_ALONG, Answer, code
from pgguard.faults.advice.sources import (
    ASYNCPG_API,
    ASYNCPG_FAQ,
    DBI,
    DJANGO_DATABASES,
    DJANGO_POOLERS,
    DJANGO_TRANSACTIONS,
    PGBOUNCER_PREPARED,
    PGJDBC_PREPARE,
    PGX_MODES,
    PHP_PERSISTENT,
    POSTGRES_JS_PREPARE,
    PSYCOPG2_POOL,
    PSYCOPG2_USAGE,
    PSYCOPG_POOL,
    PSYCOPG_PREPARE,
    PSYCOPG_TRANSACTIONS,
    RAILS_CONFIGURING,
    RAILS_POOL,
    SEQUEL_OPTIONS,
    SEQUEL_THREADS,
    SEQUEL_TRANSACTIONS,
    SQLALCHEMY_POOL,
    STATEMENT_TIMEOUT,
)
from pgguard.faults.catalogue import Advice
from pgguard.session.verdicts import Kind

_THREADS: Final = frozenset({Kind.SHARED_BY_THREADS})
_BUSY: Final = frozenset({Kind.REQUEST_WHILE_BUSY})
_UNREAD: Final = frozenset({Kind.UNREAD_ANSWER})
_ABANDONED: Final = _BUSY | _UNREAD
_IDLE: Final = frozenset({Kind.IDLE_IN_TRANSACTION})
_EXHAUSTED: Final = frozenset({Kind.CONNECTION_EXHAUSTION})
_SWAPPED: Final = frozenset({Kind.SESSION_STATE_LOST})
_TRACK: Final = (
    "Or let the pooler keep track of prepared statements: pgbouncer 1.21 and later does so if max_prepared_statements "
    "is above 0."
)

ANSWERS: Final = (
    Answer(
        TAKEN_ALONG,
        Language.PYTHON,
        Library.ASYNCPG,
        Advice(
            "Create the pool in each worker, in its event loop",
            "An asyncpg pool belongs to one process and one event loop. Create it when the worker starts (in the "
            "lifespan or start-up hook of the framework, which runs after the fork), never while modules are imported.",
            code(
                """
                # where the application starts: main.py
                from contextlib import asynccontextmanager

                import asyncpg


                @asynccontextmanager
                async def lifespan(app):
                    async with asyncpg.create_pool(dsn) as app.state.pool:
                        yield
                """
            ),
            (f"{ASYNCPG_API}#connection-pools",),
        ),
    ),
    Answer(
        _THREADS,
        Language.RUBY,
        Library.SEQUEL,
        Advice(
            "Let Sequel's pool choose the connection",
            "Sequel gives each thread a connection for as long as it needs one. A connection taken out with "
            "DB.synchronize must not be used after the block, nor by a thread that the block starts.",
            code(
                """
                # db.rb
                DB.synchronize do |connection|
                  connection.exec("SELECT 1")
                end
                """
            ),
            (SEQUEL_THREADS,),
        ),
    ),
    Answer(
        _THREADS,
        Language.RUBY,
        Library.ACTIVE_RECORD,
        Advice(
            "Use Active Record's connection only within with_connection",
            "Active Record leases a connection to a thread. Don't hand the object to another thread or keep it in a "
            "constant; a thread of your own wraps its work in ActiveRecord::Base.connection_pool.with_connection, "
            "which gives the connection back at its end.",
            code(
                """
                # where a thread is started: worker.rb
                Thread.new do
                  ActiveRecord::Base.connection_pool.with_connection do |connection|
                    connection.select_value("SELECT 1")
                  end
                end
                """
            ),
            (RAILS_POOL,),
        ),
    ),
    Answer(
        _THREADS,
        Language.RUBY,
        None,
        Advice(
            "Check a PG::Connection out of a pool for each thread",
            "Two threads must not use one PG::Connection at once. The gem connection_pool gives each thread one of its "
            "own for the length of a with block.",
            code(
                """
                # db.rb
                require "connection_pool"
                require "pg"

                DB = ConnectionPool.new(size: 5) { PG.connect(ENV.fetch("DATABASE_URL")) }
                DB.with { |connection| connection.exec("SELECT 1") }
                """
            ),
            ("https://github.com/mperham/connection_pool",),
        ),
    ),
    Answer(
        _THREADS,
        Language.PYTHON,
        Library.SQLALCHEMY,
        Advice(
            "One Session, and one Connection, for each thread",
            "Several threads can use one engine at once, but not one Session or Connection. Open a Session where "
            "the thread's work begins, or use scoped_session, which keeps one for each thread: call Session.remove() "
            "at the end of the work.",
            code(
                """
                # db.py
                from sqlalchemy.orm import scoped_session, sessionmaker

                Session = scoped_session(sessionmaker(bind=engine))
                """
            ),
            ("https://docs.sqlalchemy.org/en/20/orm/contextual.html",),
        ),
    ),
    Answer(
        _THREADS,
        Language.PYTHON,
        Library.DJANGO,
        Advice(
            "Don't hand Django's connection to another thread",
            "django.db.connection is a different object in every thread. Don't keep the connection or a cursor of it "
            "where other threads can reach it, and don't call inc_thread_sharing(). A thread of your own should close "
            "its connection when it is done.",
            code(
                """
                # where a thread does its work: work.py
                from django.db import connection


                def run():
                    try:
                        work()
                    finally:
                        connection.close()
                """
            ),
            (DJANGO_DATABASES,),
        ),
    ),
    Answer(
        _THREADS,
        Language.PYTHON,
        Library.ASYNCPG,
        Advice(
            "One asyncpg connection for each task, one pool for each event loop",
            "An asyncpg connection belongs to one event loop and does one thing at a time. Acquire one from the pool "
            "for each task. A thread with an event loop of its own needs a pool of its own.",
            code(
                """
                # where a task does its work: work.py
                async def run(pool):
                    async with pool.acquire() as connection:
                        return await connection.fetchval("SELECT 1")
                """
            ),
            (f"{ASYNCPG_API}#connection-pools",),
        ),
    ),
    Answer(
        _THREADS,
        Language.PYTHON,
        Library.PSYCOPG2,
        Advice(
            "Check a connection out of a pool for each thread",
            "Threads that share a psycopg2 connection share its transaction too. Use "
            "psycopg2.pool.ThreadedConnectionPool, and put each connection back when the thread is done with it.",
            code(
                """
                # db.py
                from psycopg2.pool import ThreadedConnectionPool

                pool = ThreadedConnectionPool(1, 10, dsn)
                connection = pool.getconn()
                try:
                    with connection, connection.cursor() as cursor:
                        cursor.execute("SELECT 1")
                finally:
                    pool.putconn(connection)
                """
            ),
            (PSYCOPG2_POOL, f"{PSYCOPG2_USAGE}#thread-and-process-safety"),
        ),
    ),
    Answer(
        _THREADS,
        Language.PYTHON,
        None,
        Advice(
            "Check a connection out of a pool for each thread",
            "Use a thread-safe pool, for instance psycopg_pool.ConnectionPool, and use each of its connections only "
            "within its with block.",
            code(
                """
                # db.py
                from psycopg_pool import ConnectionPool

                pool = ConnectionPool(conninfo, open=True)
                with pool.connection() as connection:
                    connection.execute("SELECT 1")
                """
            ),
            (PSYCOPG_POOL,),
        ),
    ),
    Answer(
        _THREADS,
        Language.PERL,
        None,
        Advice(
            "Connect in each thread",
            "DBI handles can't be shared between Perl's threads: connect in each one.",
            code(
                """
                # where a thread is started: worker.pl
                use threads;
                use DBI;

                our ($dsn, $user, $password);
                threads->create(sub {
                    my $dbh = DBI->connect($dsn, $user, $password, { RaiseError => 1 });
                    $dbh->do("SELECT 1");
                })->join;
                """
            ),
            (f"{DBI}#Threads-and-Thread-Safety",),
        ),
    ),
    Answer(
        _THREADS,
        Language.JAVA,
        None,
        Advice(
            "Borrow a connection from a DataSource for each thread",
            "Several threads must not use one pgjdbc Connection. Borrow one from a pool (HikariCP) and close it, in a "
            "try-with-resources statement, in the same method.",
            None,
            ("https://jdbc.postgresql.org/documentation/thread/",),
        ),
    ),
    Answer(
        _THREADS,
        Language.GO,
        None,
        Advice(
            "Use a pool between goroutines",
            "A pgx.Conn is not safe for concurrent use. Share a pgxpool.Pool, or a sql.DB, between goroutines instead.",
            None,
            ("https://pkg.go.dev/github.com/jackc/pgx/v5",),
        ),
    ),
    Answer(
        _ABANDONED,
        Language.RUBY,
        Library.SEQUEL,
        Advice(
            "Let the server time queries out, not Timeout.timeout",
            "Timeout.timeout raises in the middle of reading an answer, and the connection goes back to the pool with "
            "the rest of it unread. Set statement_timeout on Sequel's connections instead, and don't use a connection "
            "of DB.synchronize outside its block.",
            code(
                """
                # db.rb
                DB = Sequel.connect(ENV.fetch("DATABASE_URL"), connect_sqls: ["SET statement_timeout = '5s'"])
                """
            ),
            (SEQUEL_OPTIONS, "https://docs.ruby-lang.org/en/master/Timeout.html", STATEMENT_TIMEOUT),
        ),
    ),
    Answer(
        _ABANDONED,
        Language.RUBY,
        Library.ACTIVE_RECORD,
        Advice(
            "Let the server time queries out, not Timeout.timeout",
            "Timeout.timeout (and Rack::Timeout) raises in the middle of reading an answer, and the connection goes "
            "back to the pool with the rest of it unread. Set statement_timeout, in milliseconds, under variables in "
            "config/database.yml instead.",
            code(
                """
                # config/database.yml
                production:
                  variables:
                    statement_timeout: 5000
                """
            ),
            (RAILS_CONFIGURING, "https://docs.ruby-lang.org/en/master/Timeout.html", STATEMENT_TIMEOUT),
        ),
    ),
    Answer(
        _ABANDONED,
        Language.RUBY,
        None,
        Advice(
            "Let the server time queries out, not Timeout.timeout",
            "Timeout.timeout raises in the middle of reading an answer, and the rest of it is taken for the answer to "
            "the next query. Set statement_timeout instead, and close a connection on which a query was interrupted.",
            code(
                """
                # db.rb
                require "pg"

                connection = PG.connect(ENV.fetch("DATABASE_URL"), options: "-c statement_timeout=5s")
                """
            ),
            ("https://docs.ruby-lang.org/en/master/Timeout.html", STATEMENT_TIMEOUT),
        ),
    ),
    Answer(
        _ABANDONED,
        Language.PYTHON,
        Library.SQLALCHEMY,
        Advice(
            "Let the server time queries out, and invalidate interrupted connections",
            "An exception raised from outside (a signal handler, gevent.Timeout) leaves the rest of the answer unread. "
            "Set statement_timeout through connect_args instead, and after an interruption call "
            "connection.invalidate() before the connection goes back to the pool.",
            code(
                """
                # db.py
                from sqlalchemy import create_engine

                engine = create_engine(url, connect_args={"options": "-c statement_timeout=5s"})
                """
            ),
            ("https://docs.sqlalchemy.org/en/20/core/pooling.html#more-on-invalidation", STATEMENT_TIMEOUT),
        ),
    ),
    Answer(
        _ABANDONED,
        Language.PYTHON,
        Library.DJANGO,
        Advice(
            "Let the server time queries out, and close interrupted connections",
            "An exception raised from outside (a signal handler, Celery's soft time limit, gevent.Timeout) leaves the "
            "rest of the answer unread. Set statement_timeout in the OPTIONS of DATABASES instead, and after an "
            "interruption call connection.close().",
            code(
                """
                # settings.py, below DATABASES
                DATABASES["default"].setdefault("OPTIONS", {})["options"] = "-c statement_timeout=5s"
                """
            ),
            (DJANGO_DATABASES, STATEMENT_TIMEOUT),
        ),
    ),
    Answer(
        _ABANDONED,
        Language.PYTHON,
        Library.ASYNCPG,
        Advice(
            "One connection for each task, and asyncpg's own timeout",
            "An asyncpg connection does one thing at a time. Acquire one from the pool for each task instead of "
            "sharing it, and set command_timeout, which cancels on the server.",
            code(
                """
                # where the application starts: main.py
                import asyncpg


                async def connect():
                    return await asyncpg.create_pool(dsn, command_timeout=5)
                """
            ),
            (f"{ASYNCPG_API}#connection-pools",),
        ),
    ),
    Answer(
        _ABANDONED,
        Language.PYTHON,
        None,
        Advice(
            "Let the server time queries out, and close interrupted connections",
            "An exception raised from outside (a signal handler, gevent.Timeout, a cancelled task) leaves the rest of "
            "the answer unread: close that connection instead of putting it back into the pool. Let the server time "
            "queries out with statement_timeout, and give each thread and task a connection of its own.",
            code(
                """
                # db.py
                import psycopg

                connection = psycopg.connect(conninfo, options="-c statement_timeout=5s")
                """
            ),
            (STATEMENT_TIMEOUT,),
        ),
    ),
    Answer(
        _ABANDONED,
        Language.PERL,
        None,
        Advice(
            "Let the server time queries out, not alarm",
            "Calling die in a SIGALRM handler leaves the rest of the answer unread. Set statement_timeout instead, or "
            "disconnect after the alarm.",
            code(
                """
                # where the program connects: db.pl
                use DBI;

                our ($dsn, $user, $password);
                my $dbh = DBI->connect($dsn, $user, $password, { RaiseError => 1 });
                $dbh->do("SET statement_timeout = '5s'");
                """
            ),
            (f"{DBI}#Signal-Handling-and-Canceling-Operations", STATEMENT_TIMEOUT),
        ),
    ),
    Answer(
        _ABANDONED,
        Language.PHP,
        None,
        Advice(
            "Read every answer to its end",
            "After pg_send_query, call pg_get_result until it returns false before you use the connection again. When "
            "a script with a persistent connection is aborted, its answer may stay unread: don't use persistent "
            "connections for queries that may be interrupted.",
            code(
                """
                <?php // db.php
                pg_send_query($connection, 'SELECT 1');
                while ($result = pg_get_result($connection)) {
                    work($result);
                }
                """
            ),
            ("https://www.php.net/manual/en/function.pg-get-result.php", PHP_PERSISTENT),
        ),
    ),
    Answer(
        _BUSY,
        Language.NODE,
        None,
        Advice(
            "Check whether this is intended pipelining",
            "postgres.js, and node-postgres with pipeline: true, send queries on a connection that is still answering "
            "others. If that is intended, set this kind to ignore. Otherwise check a client out of the pool for each "
            "flow of control, and release it when its last query has been answered.",
            None,
            ("https://node-postgres.com/apis/pool",),
        ),
    ),
    Answer(
        _ABANDONED,
        Language.GO,
        Library.LIB_PQ,
        Advice(
            "Read the rows to the end, or close them, before the next query on the same connection",
            "Within a transaction, or on a sql.Conn, all queries go over one connection: with lib/pq the rows of one "
            "must be read to the end or closed before the next. Use a transaction in one goroutine only. To time "
            "queries out, use the context that you pass to them: lib/pq then cancels them and closes the connection.",
            code(
                """
                // within the transaction: orders.go
                rows, err := tx.QueryContext(ctx, "SELECT id FROM orders")
                if err != nil {
                    return err
                }
                var ids []int64
                for rows.Next() {
                    var id int64
                    if err := rows.Scan(&id); err != nil {
                        rows.Close()
                        return err
                    }
                    ids = append(ids, id)
                }
                if err := rows.Close(); err != nil {
                    return err
                }
                // from here on other queries
                """
            ),
            ("https://pkg.go.dev/database/sql#Rows.Close", "https://pkg.go.dev/github.com/lib/pq"),
        ),
    ),
    Answer(
        _IDLE,
        Language.RUBY,
        Library.SEQUEL,
        Advice(
            "Keep slow work out of DB.transaction",
            "Call other services before the transaction, or in DB.after_commit, which runs when it is over.",
            code(
                """
                # within the transaction: orders.rb
                DB.transaction do
                  save
                  DB.after_commit { notify }
                end
                """
            ),
            (SEQUEL_TRANSACTIONS,),
        ),
    ),
    Answer(
        _IDLE,
        Language.RUBY,
        Library.ACTIVE_RECORD,
        Advice(
            "Keep slow work out of transactions",
            "Callbacks such as after_save run within the transaction: call other services and enqueue jobs in "
            "after_commit, which runs when it is over.",
            code(
                """
                # app/models/order.rb
                class Order < ApplicationRecord
                  after_commit :notify
                end
                """
            ),
            ("https://guides.rubyonrails.org/active_record_callbacks.html#transaction-callbacks",),
        ),
    ),
    Answer(
        _IDLE,
        Language.PYTHON,
        Library.SQLALCHEMY,
        Advice(
            "End each Session with a block",
            "A Session begins a transaction with its first query, even a SELECT, and keeps it until commit, "
            "rollback or close. Open it in a with block around the queries alone, and do slow work after it.",
            code(
                """
                # where the work is done: work.py
                from sqlalchemy.orm import Session

                with Session(engine) as session, session.begin():
                    work(session)
                """
            ),
            ("https://docs.sqlalchemy.org/en/20/orm/session_basics.html",),
        ),
    ),
    Answer(
        _IDLE,
        Language.PYTHON,
        Library.DJANGO,
        Advice(
            "Keep slow work out of atomic blocks",
            "Call other services before transaction.atomic, or give them to transaction.on_commit. With "
            "ATOMIC_REQUESTS the whole view is one transaction: exempt slow ones with transaction.non_atomic_requests.",
            code(
                """
                # where the work is done: work.py
                from django.db import transaction

                with transaction.atomic():
                    save()
                    transaction.on_commit(notify)
                """
            ),
            (DJANGO_TRANSACTIONS,),
        ),
    ),
    Answer(
        _IDLE,
        Language.PYTHON,
        Library.PSYCOPG,
        Advice(
            "Use autocommit, and transaction blocks",
            "psycopg begins a transaction with the first query, even a SELECT, and keeps it until commit or "
            "rollback. Connect with autocommit=True, and use conn.transaction() around what belongs together.",
            code(
                """
                # db.py
                import psycopg

                connection = psycopg.connect(conninfo, autocommit=True)
                with connection.transaction():
                    work(connection)
                """
            ),
            (PSYCOPG_TRANSACTIONS,),
        ),
    ),
    Answer(
        _IDLE,
        Language.PYTHON,
        Library.PSYCOPG2,
        Advice(
            "Use autocommit, or with blocks",
            "psycopg2 begins a transaction with the first query, even a SELECT, and keeps it until commit or "
            "rollback. Set autocommit where single statements are run; elsewhere a with block of the connection "
            "commits or rolls back at its end.",
            code(
                """
                # db.py
                import psycopg2

                connection = psycopg2.connect(dsn)
                connection.autocommit = True
                """
            ),
            (f"{PSYCOPG2_USAGE}#transactions-control",),
        ),
    ),
    Answer(
        _IDLE,
        Language.PERL,
        None,
        Advice(
            "Keep AutoCommit on, and begin transactions explicitly",
            "With AutoCommit off, DBD::Pg begins a transaction with the first query, even a SELECT, and keeps it "
            "until commit or rollback. Leave it on, and use begin_work around what belongs together.",
            code(
                """
                # where the program connects: db.pl
                use DBI;

                our ($dsn, $user, $password);
                my $dbh = DBI->connect($dsn, $user, $password, { AutoCommit => 1, RaiseError => 1 });
                """
            ),
            (f"{DBI}#AutoCommit",),
        ),
    ),
    Answer(
        _EXHAUSTED,
        Language.RUBY,
        Library.SEQUEL,
        Advice(
            "Size Sequel's pool to match the threads of a process",
            "Each process has a pool of up to max_connections connections (4 by default). One for each thread of a "
            "worker is enough. Multiplied by workers and hosts, they must fit into the server's limit.",
            code(
                """
                # db.rb
                DB = Sequel.connect(ENV.fetch("DATABASE_URL"), max_connections: 5)
                """
            ),
            (SEQUEL_OPTIONS,),
        ),
    ),
    Answer(
        _EXHAUSTED,
        Language.RUBY,
        Library.ACTIVE_RECORD,
        Advice(
            "Size Active Record's pool to match the threads of a process",
            "Each process has a pool for each database. One connection for each thread of a worker is enough. "
            "Multiplied by workers and hosts, they must fit into the server's limit.",
            code(
                """
                # config/database.yml
                production:
                  pool: <%= ENV.fetch("RAILS_MAX_THREADS", 5) %>
                """
            ),
            (RAILS_CONFIGURING,),
        ),
    ),
    Answer(
        _EXHAUSTED,
        Language.PYTHON,
        Library.SQLALCHEMY,
        Advice(
            "Size the engine's pool to match the threads of a process, and make one engine",
            "Each engine of each process keeps up to pool_size (5 by default) and opens up to max_overflow (10) more. "
            "Make one engine when the process starts, not one for each request.",
            code(
                """
                # db.py
                from sqlalchemy import create_engine

                engine = create_engine(url, pool_size=5, max_overflow=0)
                """
            ),
            (SQLALCHEMY_POOL,),
        ),
    ),
    Answer(
        _EXHAUSTED,
        Language.PYTHON,
        Library.DJANGO,
        Advice(
            "Don't keep connections for threads that come and go",
            "Django has one connection for each thread and database. If CONN_MAX_AGE isn't 0, a server that starts "
            "many threads keeps as many connections: set it to 0, and from Django 5.1 on use its pool (pool in "
            "OPTIONS, with psycopg 3) if connecting takes too long. Threads of your own should close their connection "
            "at the end.",
            code(
                """
                # settings.py, below DATABASES
                DATABASES["default"]["CONN_MAX_AGE"] = 0
                """
            ),
            (DJANGO_DATABASES,),
        ),
    ),
    Answer(
        _EXHAUSTED,
        Language.PYTHON,
        Library.ASYNCPG,
        Advice(
            "Size the pool, and make one for each process",
            "Each pool opens min_size connections at once and max_size at most (both are 10 by default). Make one when "
            "the process starts, not one for each request.",
            code(
                """
                # where the application starts: main.py
                import asyncpg


                async def connect():
                    return await asyncpg.create_pool(dsn, min_size=1, max_size=5)
                """
            ),
            (f"{ASYNCPG_API}#connection-pools",),
        ),
    ),
    Answer(
        _EXHAUSTED,
        Language.PYTHON,
        Library.PSYCOPG,
        Advice(
            "Size the pool, and make one for each process",
            "Each pool of each process keeps min_size connections (4 by default) and opens max_size at most. Where "
            "connections are made without a pool, close them: a with block of the connection does.",
            code(
                """
                # db.py
                from psycopg_pool import ConnectionPool

                pool = ConnectionPool(conninfo, min_size=1, max_size=5, open=True)
                """
            ),
            (PSYCOPG_POOL,),
        ),
    ),
    Answer(
        _EXHAUSTED,
        Language.PHP,
        None,
        Advice(
            "Count the workers, and avoid persistent connections",
            "With PDO::ATTR_PERSISTENT or pg_pconnect every worker of PHP-FPM or Apache keeps a connection for each "
            "user and database, used or not: as many as pm.max_children or MaxRequestWorkers. Avoid them, or lower "
            "these settings, and put a pooler in between if connecting takes too long.",
            None,
            (PHP_PERSISTENT,),
        ),
    ),
    Answer(
        _SWAPPED,
        Language.PYTHON,
        Library.ASYNCPG,
        Advice(
            "Turn off asyncpg's cache of prepared statements",
            "Behind a pooler in transaction mode a statement that asyncpg has prepared is gone with the next "
            "transaction. Without its cache of statements it prepares none by name. " + _TRACK,
            code(
                """
                # where the pool is created: main.py
                pool = await asyncpg.create_pool(dsn, statement_cache_size=0)
                """
            ),
            (ASYNCPG_FAQ, PGBOUNCER_PREPARED),
        ),
    ),
    Answer(
        _SWAPPED,
        Language.PYTHON,
        Library.DJANGO,
        Advice(
            "Turn off prepared statements in Django",
            "Behind a pooler in transaction mode a prepared statement is gone with the next transaction, and so is a "
            "server-side cursor. Turn both off. " + _TRACK,
            code(
                """
                # settings.py
                DATABASES["default"].setdefault("OPTIONS", {})["prepare_threshold"] = None
                DATABASES["default"]["DISABLE_SERVER_SIDE_CURSORS"] = True
                """
            ),
            (DJANGO_POOLERS, PSYCOPG_PREPARE, PGBOUNCER_PREPARED),
        ),
    ),
    Answer(
        _SWAPPED,
        Language.PYTHON,
        Library.PSYCOPG,
        Advice(
            "Turn off psycopg's prepared statements",
            "Behind a pooler in transaction mode a prepared statement is gone with the next transaction, and psycopg "
            "prepares what is executed more than five times. " + _TRACK,
            code(
                """
                # where the connection is made: db.py
                # A pool: ConnectionPool(conninfo, kwargs={"prepare_threshold": None})
                connection = psycopg.connect(conninfo, prepare_threshold=None)
                """
            ),
            (PSYCOPG_PREPARE, PGBOUNCER_PREPARED),
        ),
    ),
    Answer(
        _SWAPPED,
        Language.RUBY,
        Library.ACTIVE_RECORD,
        Advice(
            "Turn off Active Record's prepared statements",
            "Behind a pooler in transaction mode a prepared statement is gone with the next transaction, "
            "and Active Record prepares every query that has parameters. " + _TRACK,
            code(
                """
                # config/database.yml
                production:
                  prepared_statements: false
                """
            ),
            (RAILS_CONFIGURING, PGBOUNCER_PREPARED),
        ),
    ),
    Answer(
        _SWAPPED,
        Language.JAVA,
        None,
        Advice(
            "Turn off pgjdbc's named prepared statements",
            "Behind a pooler in transaction mode a prepared statement is gone with the next transaction, "
            "and pgjdbc makes one with a name when a PreparedStatement is executed for the fifth time. It makes none "
            "with prepareThreshold=0 in the URL (jdbc:postgresql://host/database?prepareThreshold=0). " + _TRACK,
            None,
            (PGJDBC_PREPARE, PGBOUNCER_PREPARED),
        ),
    ),
    Answer(
        _SWAPPED,
        Language.GO,
        Library.PGX,
        Advice(
            "Turn off pgx's named prepared statements",
            "Behind a pooler in transaction mode a prepared statement is gone with the next transaction, "
            "and pgx prepares what it executes and keeps it. " + _TRACK,
            code(
                """
                // where the pool is configured: main.go
                config.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec
                """
            ),
            (PGX_MODES, PGBOUNCER_PREPARED),
        ),
    ),
    Answer(
        _SWAPPED,
        Language.NODE,
        Library.POSTGRES_JS,
        Advice(
            "Turn off postgres.js's prepared statements",
            "Behind a pooler in transaction mode a prepared statement is gone with the next transaction, "
            "and postgres.js prepares every query. Create its client with postgres(url, { prepare: false }). " + _TRACK,
            None,
            (POSTGRES_JS_PREPARE, PGBOUNCER_PREPARED),
        ),
    ),
)
"""Everything that isn't a hook and a call. Of several libraries that a process shows, the first one here counts."""
