"""How to have a report say which code sent a request, where there is no stack: of all languages but Python.

Ruby's can be had, if ``pgguard run`` starts the program. Else a process says it itself, in a comment of its SQL that
:mod:`pgguard.attribution.declared` understands. What has a line for that in its configuration is listed here; elsewhere
the application writes the comment. A name of its own for each kind of process costs nothing, and tells at least that:
``application_name``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.attribution.runtime import Language, Library
from pgguard.faults.advice.rows import code
from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from pgguard.attribution.runtime import Runtime

TRACEABLE: Final = frozenset(
    {
        Kind.SHARED_BY_PROCESSES,
        Kind.SHARED_BY_THREADS,
        Kind.REQUEST_WHILE_BUSY,
        Kind.UNREAD_ANSWER,
        Kind.IDLE_IN_TRANSACTION,
    }
)
"""Kinds that are about a request, of which the code is to be found that sent it."""


class Tracing(NamedTuple):
    """How to have requests say where they come from."""

    text: str
    """A sentence or two."""
    code: str
    sources: tuple[str, ...]


class _Row(NamedTuple):
    language: Language
    library: Library | None
    """``None``: whatever it uses."""
    tracing: Tracing


_COMMENT: Final = "/*controller='users',action='show'*/"
_PGAPPNAME: Final = "https://www.postgresql.org/docs/current/libpq-envars.html"
_RUBY: Final = "pgguard run --ruby-stacks shows the lines of code of the Ruby programs that it starts."
_RAILS: Final = Tracing(
    f"{_RUBY} And Rails can say in a comment of each query which controller, action or job sent it, and from 7.2 on "
    "also the line of code, at a small cost for each query.",
    code(
        """
        # config/application.rb
        config.active_record.query_log_tags_enabled = true
        config.active_record.query_log_tags = [:application, :controller, :action, :job, :source_location]
        """
    ),
    ("https://api.rubyonrails.org/classes/ActiveRecord/QueryLogs.html",),
)


_BY_HAND: Final = (
    "End the SQL with a comment that says where it comes from, or at least give each kind of process a name of its own"
)


def _by_hand(language: str, name: str, example: str, *sources: str) -> Tracing:
    """What can be done where nothing writes such comments by itself."""
    return Tracing(f"pgguard can't read {language} stacks. {_BY_HAND}{name}.", code(example), sources)


_ROWS: Final = (
    _Row(Language.RUBY, Library.ACTIVE_RECORD, _RAILS),
    _Row(Language.RUBY, Library.RAILS, _RAILS),
    _Row(
        Language.RUBY,
        Library.SEQUEL,
        Tracing(
            f"{_RUBY} And Sequel can say in a comment of each query which model and which of its methods sent it.",
            code(
                """
                # before the models are loaded
                Sequel::Model.plugin :sql_comments
                """
            ),
            ("https://sequel.jeremyevans.net/rdoc-plugins/classes/Sequel/Plugins/SqlComments.html",),
        ),
    ),
    _Row(
        Language.RUBY,
        None,
        Tracing(
            f"{_RUBY} For others: {_BY_HAND[0].lower()}{_BY_HAND[1:]} (PGAPPNAME).",
            code(
                f"""
                connection.exec("SELECT … {_COMMENT}")
                """
            ),
            (_PGAPPNAME,),
        ),
    ),
    _Row(
        Language.PHP,
        None,
        _by_hand(
            "PHP's",
            " (PGAPPNAME, in PHP-FPM for each pool: env[PGAPPNAME] = shop)",
            f"""
            $pdo->query("SELECT … {_COMMENT}");
            """,
            _PGAPPNAME,
            "https://www.php.net/manual/en/install.fpm.configuration.php",
        ),
    ),
    _Row(
        Language.NODE,
        Library.POSTGRES_JS,
        _by_hand(
            "Node's",
            " (PGAPPNAME, or application_name)",
            f"""
            await sql`SELECT … {_COMMENT}`
            """,
            "https://github.com/porsager/postgres#connection-details",
        ),
    ),
    _Row(
        Language.NODE,
        None,
        _by_hand(
            "Node's",
            " (application_name)",
            f"""
            const pool = new pg.Pool({{ application_name: 'shop web' }})
            await pool.query(`SELECT … {_COMMENT}`)
            """,
            "https://node-postgres.com/apis/client",
        ),
    ),
    _Row(
        Language.JAVA,
        None,
        _by_hand(
            "Java's",
            " (ApplicationName)",
            f"""
            DriverManager.getConnection("jdbc:postgresql://127.0.0.1:6544/app?ApplicationName=shop-web")
            statement.executeQuery("SELECT … {_COMMENT}")
            """,
            "https://jdbc.postgresql.org/documentation/use/",
        ),
    ),
    _Row(
        Language.GO,
        None,
        _by_hand(
            "Go's",
            " (PGAPPNAME, or application_name)",
            f"""
            rows, err := db.QueryContext(ctx, "SELECT … {_COMMENT}")
            """,
            _PGAPPNAME,
        ),
    ),
    _Row(
        Language.PERL,
        None,
        _by_hand(
            "Perl's",
            " (PGAPPNAME)",
            f"""
            $dbh->selectall_arrayref("SELECT … {_COMMENT}");
            """,
            _PGAPPNAME,
        ),
    ),
    _Row(
        Language.DOTNET,
        None,
        _by_hand(
            ".NET's",
            " (Application Name)",
            f"""
            new NpgsqlCommand("SELECT … {_COMMENT}", connection)
            """,
            "https://www.npgsql.org/doc/connection-string-parameters.html",
        ),
    ),
)
"""The first that fits, of the language and a library that the process shows, or of none."""


def tracing_for(kind: Kind, runtime: Runtime) -> Tracing | None:
    """How to have a process say which code sends its requests; ``None`` if there is nothing to be said."""
    if kind not in TRACEABLE:
        return None
    rows = [row for row in _ROWS if row.language is runtime.language]
    return next((row.tracing for row in rows if row.library is None or row.library in runtime.libraries), None)
