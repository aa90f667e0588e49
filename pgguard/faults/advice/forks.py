"""How to keep a fork from taking connections along: hooks of what forks, and calls to what owns the connections."""

from __future__ import annotations

from typing import Final

from pgguard.attribution.runtime import Language, Library, Server
from pgguard.faults.advice.rows import Call, Hook, Side, code
from pgguard.faults.advice.sources import (
    DBI,
    DJANGO_DATABASES,
    PHP_FORK,
    PSYCOPG2_USAGE,
    PSYCOPG_POOL,
    PYTHON_OS,
    RAILS_ADAPTERS,
    RAILS_POOL,
    RUBY_PROCESS,
    SEQUEL_FORK,
    SQLALCHEMY_FORK,
)

HOOKS: Final = (
    Hook(
        Language.RUBY,
        Server.PUMA,
        Side.PARENT,
        "Puma loads the application once and then forks its workers (cluster mode with preload_app!). In "
        "config/puma.rb, in before_fork, which runs in the parent (and in before_refork, if fork_worker is used)",
        code(
            """
            # config/puma.rb
            before_fork do
              {calls}
            end
            """
        ),
        ("https://github.com/puma/puma#cluster-mode-hooks",),
        code(
            """
            # config/puma.rb
            before_fork do
              {calls}
            end

            on_worker_boot do # before_worker_boot from Puma 7 on
              {anew}
            end
            """
        ),
    ),
    Hook(
        Language.RUBY,
        Server.UNICORN,
        Side.PARENT,
        "Unicorn loads the application once and then forks its workers (preload_app true). In config/unicorn.rb, in "
        "before_fork, which runs in the master",
        code(
            """
            # config/unicorn.rb
            before_fork do |_server, _worker|
              {calls}
            end
            """
        ),
        ("https://yhbt.net/unicorn/Unicorn/Configurator.html",),
        code(
            """
            # config/unicorn.rb
            before_fork do |_server, _worker|
              {calls}
            end

            after_fork do |_server, _worker|
              {anew}
            end
            """
        ),
    ),
    Hook(
        Language.RUBY,
        Server.PASSENGER,
        Side.PARENT,
        "Passenger's smart spawning loads the application once and then forks, and has no hook before the fork: its "
        "event starting_worker_process runs in the child, where closing would send Terminate on the parent's "
        "connection. At the end of config.ru, which the parent loads before it forks",
        code(
            """
            # config.ru, at its end
            {calls}
            """
        ),
        ("https://www.phusionpassenger.com/library/indepth/ruby/spawn_methods/", SEQUEL_FORK),
        code(
            """
            # config.ru, at its end
            {calls}
            if defined?(PhusionPassenger)
              PhusionPassenger.on_event(:starting_worker_process) do |_forked|
                {anew}
              end
            end
            """
        ),
    ),
    Hook(
        Language.RUBY,
        Server.SIDEKIQ,
        Side.PARENT,
        "Sidekiq itself doesn't fork, but Sidekiq Enterprise's sidekiqswarm does, and with SIDEKIQ_PRELOAD_APP it "
        "loads the application before it forks. Either unset that, or at the end of the file given with -r",
        code(
            """
            # config/boot_sidekiq.rb, the file given with -r, at its end
            {calls}
            """
        ),
        ("https://github.com/sidekiq/sidekiq/wiki/Ent-Multi-Process",),
    ),
    Hook(
        Language.RUBY,
        Server.RESQUE,
        Side.PARENT,
        "Resque forks a child for every job. In Resque.before_fork, which runs in the worker before each",
        code(
            """
            # config/initializers/resque.rb
            Resque.before_fork do |_job|
              {calls}
            end
            """
        ),
        ("https://github.com/resque/resque/blob/master/docs/HOOKS.md",),
        code(
            """
            # config/initializers/resque.rb
            Resque.before_fork do |_job|
              {calls}
            end

            Resque.after_fork do |_job|
              {anew}
            end
            """
        ),
    ),
    Hook(
        Language.RUBY,
        None,
        Side.PARENT,
        "A connection belongs to the process that opened it. In the parent, just before the fork",
        code(
            """
            # where the application forks: fork.rb
            {calls}
            pid = fork { work }
            """
        ),
        (RUBY_PROCESS,),
        code(
            """
            # where the application forks: fork.rb
            {calls}
            pid = fork do
              {anew}
              work
            end
            {anew}
            """
        ),
    ),
    Hook(
        Language.PYTHON,
        Server.GUNICORN,
        Side.CHILD,
        "Only with preload_app does gunicorn load the application before it forks its workers. Either leave that out, "
        "or in gunicorn.conf.py, in post_fork, which runs in each worker",
        code(
            """
            # gunicorn.conf.py
            def post_fork(server, worker):
                {calls}
            """
        ),
        ("https://docs.gunicorn.org/en/stable/settings.html#post-fork",),
    ),
    Hook(
        Language.PYTHON,
        Server.GUNICORN,
        Side.PARENT,
        "Only with preload_app does gunicorn load the application before it forks its workers. Either leave that out, "
        "or in gunicorn.conf.py, in pre_fork, which runs in the master",
        code(
            """
            # gunicorn.conf.py
            def pre_fork(server, worker):
                {calls}
            """
        ),
        ("https://docs.gunicorn.org/en/stable/settings.html#pre-fork",),
    ),
    Hook(
        Language.PYTHON,
        Server.UWSGI,
        Side.CHILD,
        "uWSGI loads the application once and then forks its workers. Set lazy-apps = true, so that each worker loads "
        "it for itself. Otherwise close open connections at the end of wsgi.py, which the master loads, and when a "
        "worker ends (uwsgi.atexit); and in a function decorated with uwsgidecorators.postfork, which runs in each "
        "worker",
        code(
            """
            # wsgi.py, at its end
            import uwsgi
            from uwsgidecorators import postfork


            @postfork
            def reconnect():
                {calls}


            def close():
                {closing}


            uwsgi.atexit = close
            close()
            """
        ),
        (
            "https://uwsgi-docs.readthedocs.io/en/latest/PythonDecorators.html",
            "https://uwsgi-docs.readthedocs.io/en/latest/articles/TheArtOfGracefulReloading.html",
        ),
    ),
    Hook(
        Language.PYTHON,
        Server.UWSGI,
        Side.PARENT,
        "uWSGI loads the application once and then forks its workers. Either set lazy-apps = true, so that each worker "
        "loads it for itself, or at the end of wsgi.py, which the master loads before it forks",
        code(
            """
            # wsgi.py, at its end
            import uwsgi


            def close():
                {closing}


            uwsgi.atexit = close
            {calls}
            """
        ),
        ("https://uwsgi-docs.readthedocs.io/en/latest/articles/TheArtOfGracefulReloading.html",),
    ),
    Hook(
        Language.PYTHON,
        Server.CELERY,
        Side.CHILD,
        "Celery's prefork pool forks after the worker has loaded the application. Its children exit with os._exit, so "
        "each has to close what it opens (worker_process_shutdown). In a handler of the signal worker_process_init, "
        "which runs in each child",
        code(
            """
            # beside the Celery application: tasks.py
            from celery.signals import worker_process_init, worker_process_shutdown


            @worker_process_init.connect
            def reconnect(**kwargs):
                {calls}


            @worker_process_shutdown.connect
            def close(**kwargs):
                {closing}
            """
        ),
        (
            "https://docs.celeryq.dev/en/stable/userguide/signals.html#worker-process-init",
            "https://docs.celeryq.dev/en/stable/userguide/signals.html#worker-process-shutdown",
        ),
    ),
    Hook(
        Language.PYTHON,
        Server.CELERY,
        Side.PARENT,
        "Celery's prefork pool forks after the worker has loaded the application. Its children exit with os._exit, so "
        "each has to close what it opens (worker_process_shutdown). In a function given to os.register_at_fork as "
        "before, which runs in the parent (so does the signal worker_before_create_process, but only with some "
        "brokers)",
        code(
            """
            # beside the Celery application: tasks.py
            import os

            from celery.signals import worker_process_shutdown


            def disconnect():
                {calls}


            os.register_at_fork(before=disconnect)


            @worker_process_shutdown.connect
            def close(**kwargs):
                {closing}
            """
        ),
        (
            f"{PYTHON_OS}#os.register_at_fork",
            "https://docs.celeryq.dev/en/stable/userguide/signals.html#worker-process-shutdown",
        ),
    ),
    Hook(
        Language.PYTHON,
        Server.RQ,
        Side.CHILD,
        "RQ's worker forks a child for each job. The child exits with os._exit, so it has to close what it opens. In "
        "perform_job of a worker class of your own (rq worker --worker-class worker.ForkingWorker), which runs in each "
        "child",
        code(
            """
            # where rq worker finds it: worker.py
            from rq import Worker


            class ForkingWorker(Worker):
                def perform_job(self, *args, **kwargs):
                    {calls}
                    try:
                        return super().perform_job(*args, **kwargs)
                    finally:
                        {closing}
            """
        ),
        ("https://python-rq.org/docs/workers/#custom-worker-classes",),
    ),
    Hook(
        Language.PYTHON,
        Server.RQ,
        Side.PARENT,
        "RQ's worker forks a child for each job. The child exits with os._exit, so it has to close what it opens. In "
        "fork_work_horse of a worker class of your own (rq worker --worker-class worker.ForkingWorker), which runs in "
        "the parent",
        code(
            """
            # where rq worker finds it: worker.py
            from rq import Worker


            class ForkingWorker(Worker):
                def fork_work_horse(self, *args, **kwargs):
                    {calls}
                    super().fork_work_horse(*args, **kwargs)

                def perform_job(self, *args, **kwargs):
                    try:
                        return super().perform_job(*args, **kwargs)
                    finally:
                        {closing}
            """
        ),
        ("https://python-rq.org/docs/workers/#custom-worker-classes",),
    ),
    Hook(
        Language.PYTHON,
        Server.MULTIPROCESSING,
        Side.CHILD,
        "Before Python 3.14, multiprocessing forks by default on Linux ('spawn' inherits nothing). Its children exit "
        "with os._exit, so they have to close what they open at the end of their work. In the pool's initializer, "
        "which runs in each child",
        code(
            """
            # where the pool is made: pool.py
            import multiprocessing


            def reconnect():
                {calls}


            processes = multiprocessing.Pool(initializer=reconnect)

            # in a child, around its work: task.py
            try:
                work()
            finally:
                {closing}
            """
        ),
        ("https://docs.python.org/3/library/multiprocessing.html#contexts-and-start-methods",),
    ),
    Hook(
        Language.PYTHON,
        Server.MULTIPROCESSING,
        Side.PARENT,
        "Before Python 3.14, multiprocessing forks by default on Linux ('spawn' inherits nothing). Its children exit "
        "with os._exit, so they have to close what they open at the end of their work. In the parent, just before "
        "the processes are started",
        code(
            """
            # where the pool is made: pool.py
            import multiprocessing

            {calls}
            processes = multiprocessing.Pool()

            # in a child, around its work: task.py
            try:
                work()
            finally:
                {closing}
            """
        ),
        ("https://docs.python.org/3/library/multiprocessing.html#contexts-and-start-methods",),
    ),
    Hook(
        Language.PYTHON,
        None,
        Side.CHILD,
        "A connection belongs to the process that opened it. A child that exits with os._exit, as multiprocessing's "
        "do, has to close what it opens at the end of its work. In a function given to "
        "os.register_at_fork as after_in_child, which os.fork and multiprocessing run in each child",
        code(
            """
            # beside the connections: db.py
            import os


            def reconnect():
                {calls}


            os.register_at_fork(after_in_child=reconnect)

            # in a child, around its work: task.py
            try:
                work()
            finally:
                {closing}
            """
        ),
        (f"{PYTHON_OS}#os.register_at_fork",),
    ),
    Hook(
        Language.PYTHON,
        None,
        Side.PARENT,
        "A connection belongs to the process that opened it. A child that exits with os._exit, as multiprocessing's "
        "do, has to close what it opens at the end of its work. In a function given to "
        "os.register_at_fork as before, which os.fork and multiprocessing run in the parent",
        code(
            """
            # where the application starts: main.py
            import os


            def disconnect():
                {calls}


            os.register_at_fork(before=disconnect)

            # in a child, around its work: task.py
            try:
                work()
            finally:
                {closing}
            """
        ),
        (f"{PYTHON_OS}#os.register_at_fork",),
    ),
    Hook(
        Language.PERL,
        Server.APACHE,
        Side.CHILD,
        "mod_perl's startup.pl runs in Apache's parent, so a handle that it opens is inherited by every child. In a "
        "PerlChildInitHandler, which runs in each child",
        code(
            """
            # startup.pl
            use Apache2::ServerUtil ();
            use Apache2::Const -compile => 'OK';
            use DBI;

            our ($dbh, $dsn, $user, $password);
            Apache2::ServerUtil->server->push_handlers(PerlChildInitHandler => sub {
                {calls}
                return Apache2::Const::OK;
            });
            """
        ),
        ("https://perl.apache.org/docs/2.0/user/handlers/server.html#C_PerlChildInitHandler_",),
    ),
    Hook(
        Language.PERL,
        None,
        Side.CHILD,
        "A connection belongs to the process that opened it. In the child, just after the fork",
        code(
            """
            # where the program forks: fork.pl
            use DBI;

            our ($dbh, $dsn, $user, $password);
            my $pid = fork() // die "fork: $!";
            if ($pid == 0) {
                {calls}
                work();
                exit 0;
            }
            """
        ),
        ("https://perldoc.perl.org/functions/fork",),
    ),
    Hook(
        Language.PHP,
        None,
        Side.PARENT,
        "PHP processes inherit connections only through pcntl_fork, and PHP closes them at the end of the child's "
        "script, which ends the parent's sessions. In the parent, just before pcntl_fork",
        code(
            """
            <?php // where the script forks: fork.php
            {calls}
            $pid = pcntl_fork();
            """
        ),
        (PHP_FORK,),
    ),
)
"""Where to do it, those of a server in the order of preference."""

_CLOSE_CONNECTION: Final = code(
    """
    import app

    app.connection.close()
    """
)

CALLS: Final = (
    Call(
        Language.RUBY,
        Library.HANAMI_DB,
        Side.PARENT,
        "call Hanami.shutdown, as in the config/puma.rb that hanami new writes: it stops the providers, and from "
        "Hanami 2.2 on the built-in database provider disconnects when it is stopped. The workers reconnect when they "
        "need to.",
        "Hanami.shutdown",
        (
            "https://github.com/hanami/hanami/blob/main/lib/hanami/providers/db.rb",
            "https://github.com/hanami/cli/blob/main/lib/hanami/cli/generators/gem/app/puma.erb",
        ),
        server=Server.PUMA,
    ),
    Call(
        Language.RUBY,
        Library.HANAMI,
        Side.PARENT,
        "call Hanami.shutdown, as in the config/puma.rb that hanami new writes: it stops the providers. But a provider "
        "for ROM that was written by hand, as all were before Hanami 2.2, disconnects only if it has a stop hook that "
        'calls target["persistence.rom"].disconnect. The workers reconnect when they need to.',
        "Hanami.shutdown",
        (
            "https://guides.hanamirb.org/v2.1/app/providers/",
            "https://github.com/hanami/cli/blob/main/lib/hanami/cli/generators/gem/app/puma.erb",
        ),
        elsewhere=(
            code(
                """
                # config/providers/persistence.rb, beside prepare and start
                stop do
                  target["persistence.rom"].disconnect
                end
                """
            )
        ),
        server=Server.PUMA,
    ),
    Call(
        Language.RUBY,
        Library.ROM,
        Side.PARENT,
        "disconnect ROM's gateways: rom-sql connects through Sequel, so Sequel::DATABASES.each(&:disconnect) reaches "
        "them all, and rom.disconnect those of one container. ROM reconnects when a child needs it to.",
        "Sequel::DATABASES.each(&:disconnect)",
        ("https://github.com/rom-rb/rom-sql/blob/main/lib/rom/sql/gateway.rb", SEQUEL_FORK),
        server=Server.PUMA,
    ),
    Call(
        Language.RUBY,
        Library.SEQUEL,
        Side.PARENT,
        "call Sequel::DATABASES.each(&:disconnect), or DB.disconnect if there is only one. Sequel reconnects when a "
        "child needs it to.",
        "Sequel::DATABASES.each(&:disconnect)",
        (SEQUEL_FORK,),
    ),
    Call(
        Language.RUBY,
        Library.ACTIVE_RECORD,
        Side.PARENT,
        "call ActiveRecord::Base.connection_pool.disconnect!, or with several databases and Rails 7.1 or later "
        "ActiveRecord::Base.connection_handler.clear_all_connections!(:all). Since 5.2 Active Record itself lets go of "
        "an inherited pool in the child, so also look for connections that are kept outside the pool: in a constant, "
        "in a thread, from a PG.connect of your own.",
        "ActiveRecord::Base.connection_pool.disconnect!",
        (RAILS_POOL, f"{RAILS_ADAPTERS}abstract/connection_handler.rb", f"{RAILS_ADAPTERS}pool_config.rb"),
    ),
    Call(
        Language.RUBY,
        Library.PG,
        Side.PARENT,
        "A PG::Connection of your own, here $connection, has to be opened again in each child; a ConnectionPool of the "
        "gem connection_pool opens new ones after POOL.reload(&:close).",
        "$connection.close if $connection && !$connection.finished?",
        (
            "https://deveiate.org/code/pg/PG/Connection.html#method-i-finish",
            "https://github.com/mperham/connection_pool",
        ),
        anew='$connection = PG.connect(ENV.fetch("DATABASE_URL")) if $connection',
        only=False,
    ),
    Call(
        Language.PYTHON,
        Library.SQLALCHEMY,
        Side.CHILD,
        "call engine.dispose(close=False) (SQLAlchemy 1.4.33 or later): it forgets the parent's connections without "
        "closing them, and reconnects when needed. Their sockets stay open in the child, unused, which pgguard "
        "reports as info; engine.dispose() in the parent before the fork leaves none open.",
        code(
            """
            from app import engine

            engine.dispose(close=False)
            """
        ),
        (SQLALCHEMY_FORK,),
        closing=code(
            """
            from app import engine

            engine.dispose()
            """
        ),
    ),
    Call(
        Language.PYTHON,
        Library.DJANGO,
        Side.PARENT,
        "call django.db.connections.close_all(), never in the child, where it would send Terminate on the parent's "
        "connection. Django reconnects with the next query.",
        code(
            """
            from django.db import connections

            connections.close_all()
            """
        ),
        ("https://github.com/django/django/blob/main/django/utils/connection.py", DJANGO_DATABASES),
        closing=code(
            """
            from django.db import connections

            connections.close_all()
            """
        ),
    ),
    Call(
        Language.PYTHON,
        Library.PSYCOPG,
        Side.CHILD,
        "reconnect, and use nothing that was connected before the fork. The old connection can simply be forgotten: "
        "psycopg does not close a connection that another process opened. Its socket stays open in the child, unused, "
        "which pgguard reports as info. Create a pool with ConnectionPool(conninfo, open=False), and open it there: "
        "app.pool.open().",
        code(
            """
            import app
            import psycopg

            app.connection = psycopg.connect(app.conninfo)
            """
        ),
        (PSYCOPG_POOL, "https://www.psycopg.org/psycopg3/docs/advanced/async.html"),
        closing=_CLOSE_CONNECTION,
    ),
    Call(
        Language.PYTHON,
        Library.PSYCOPG2,
        Side.CHILD,
        "reconnect, with psycopg2.connect or a new pool, and use nothing that was connected before the fork. The old "
        "connection can simply be forgotten: psycopg2 does not close a connection that another process opened. Its "
        "socket stays open in the child, unused, which pgguard reports as info.",
        code(
            """
            import app
            import psycopg2

            app.connection = psycopg2.connect(app.dsn)
            """
        ),
        (f"{PSYCOPG2_USAGE}#thread-and-process-safety",),
        closing=_CLOSE_CONNECTION,
    ),
    Call(
        Language.PERL,
        Library.DBD_PG,
        Side.CHILD,
        "connect with DBI again, for instance with $dbh->clone. Set InactiveDestroy on every inherited handle, or "
        "AutoInactiveDestroy => 1 from the beginning: otherwise the child's copy of the parent's handle ends the "
        "session when it is destroyed.",
        code(
            """
            $dbh->{InactiveDestroy} = 1;
            $dbh = DBI->connect($dsn, $user, $password, { AutoInactiveDestroy => 1, RaiseError => 1 });
            """
        ),
        (f"{DBI}#AutoInactiveDestroy",),
    ),
    Call(
        Language.PHP,
        Library.PDO_PGSQL,
        Side.PARENT,
        "Set every PDO object, and every statement made from it, to null, and reconnect in parent and child; don't use "
        "PDO::ATTR_PERSISTENT in a script that forks.",
        "$pdo = null;",
        ("https://www.php.net/manual/en/pdo.connections.php",),
        only=False,
    ),
    Call(
        Language.PHP,
        Library.PGSQL,
        Side.PARENT,
        "Call pg_close() on every connection of pg_connect, and reconnect in parent and child; don't use pg_pconnect "
        "in a script that forks.",
        "if (isset($connection)) { pg_close($connection); }",
        ("https://www.php.net/manual/en/function.pg-close.php",),
        only=False,
    ),
)
"""What to do there. Of several libraries that a process shows, the first one here counts: what is built upon others
before those, and, as it takes care of forks itself, Active Record after Sequel."""
