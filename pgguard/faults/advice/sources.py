"""Where more than one row takes what it says from."""

from __future__ import annotations

from typing import Final

SEQUEL_FORK: Final = "https://sequel.jeremyevans.net/rdoc/files/doc/fork_safety_rdoc.html"
SEQUEL_THREADS: Final = "https://sequel.jeremyevans.net/rdoc/files/doc/thread_safety_rdoc.html"
SEQUEL_OPTIONS: Final = "https://sequel.jeremyevans.net/rdoc/files/doc/opening_databases_rdoc.html"
SEQUEL_TRANSACTIONS: Final = "https://sequel.jeremyevans.net/rdoc/files/doc/transactions_rdoc.html"
RAILS_CONFIGURING: Final = "https://guides.rubyonrails.org/configuring.html#configuring-a-database"
RAILS_POOL: Final = "https://api.rubyonrails.org/classes/ActiveRecord/ConnectionAdapters/ConnectionPool.html"
RAILS_ADAPTERS: Final = "https://github.com/rails/rails/blob/main/activerecord/lib/active_record/connection_adapters/"
RUBY_PROCESS: Final = "https://docs.ruby-lang.org/en/master/Process.html"
PYTHON_OS: Final = "https://docs.python.org/3/library/os.html"
SQLALCHEMY_FORK: Final = (
    "https://docs.sqlalchemy.org/en/20/core/pooling.html#using-connection-pools-with-multiprocessing-or-os-fork"
)
SQLALCHEMY_POOL: Final = "https://docs.sqlalchemy.org/en/20/core/pooling.html#connection-pool-configuration"
DJANGO_DATABASES: Final = "https://docs.djangoproject.com/en/stable/ref/databases/"
DJANGO_TRANSACTIONS: Final = "https://docs.djangoproject.com/en/stable/topics/db/transactions/"
PSYCOPG_POOL: Final = "https://www.psycopg.org/psycopg3/docs/advanced/pool.html"
PSYCOPG_TRANSACTIONS: Final = "https://www.psycopg.org/psycopg3/docs/basic/transactions.html"
PSYCOPG2_USAGE: Final = "https://www.psycopg.org/docs/usage.html"
PSYCOPG2_POOL: Final = "https://www.psycopg.org/docs/pool.html"
ASYNCPG_API: Final = "https://magicstack.github.io/asyncpg/current/api/index.html"
DBI: Final = "https://metacpan.org/pod/DBI"
PHP_FORK: Final = "https://www.php.net/manual/en/function.pcntl-fork.php"
PHP_PERSISTENT: Final = "https://www.php.net/manual/en/features.persistent-connections.php"
STATEMENT_TIMEOUT: Final = "https://www.postgresql.org/docs/current/runtime-config-client.html#GUC-STATEMENT-TIMEOUT"
ASYNCPG_FAQ: Final = "https://magicstack.github.io/asyncpg/current/faq.html"
DJANGO_POOLERS: Final = f"{DJANGO_DATABASES}#transaction-pooling-and-server-side-cursors"
PGBOUNCER_PREPARED: Final = "https://www.pgbouncer.org/config.html#max_prepared_statements"
PGJDBC_PREPARE: Final = "https://jdbc.postgresql.org/documentation/server-prepare/"
PGX_MODES: Final = "https://pkg.go.dev/github.com/jackc/pgx/v5#QueryExecMode"
POSTGRES_JS_PREPARE: Final = "https://github.com/porsager/postgres#prepared-statements"
PSYCOPG_PREPARE: Final = "https://www.psycopg.org/psycopg3/docs/advanced/prepare.html"
