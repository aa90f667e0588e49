"""Which language's runtime a process is, which kind of server runs in it, and which libraries it shows.

For advice that fits. Told by the files that it runs and has mapped, by its command line, and, as a library written in
its own language leaves no trace in any of these, by what stands in its working directory: what ``Gemfile.lock`` lists,
``manage.py``, and what ``node_modules`` holds. That is weaker evidence: what is listed need not be loaded, and what is
loaded need not be listed. So that Sequel or Django isn't named here says nothing. Of a program that Go built it is the
modules that it was linked from. The environment, where secrets are, is never read.

All of that is the process's own to choose, so that it can pass for another; and a guard that runs as root can read what
the process can't. So a file in the working directory is opened only if it is a regular one, which the process's own
user may read: a link leads no further than that user gets, and no pipe or device is touched.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import NamedTuple

from pgguard.attribution.images import Image, library, program, read_image
from pgguard.attribution.scout import Findings, look_into


class Language(StrEnum):
    """Whose runtime a process is."""

    DOTNET = ".NET"
    GO = "Go"
    JAVA = "Java"
    NODE = "Node.js"
    PERL = "Perl"
    PHP = "PHP"
    PYTHON = "Python"
    RUBY = "Ruby"


class Server(StrEnum):
    """What starts processes, or runs in them, and thereby decides what is forked when."""

    APACHE = "Apache httpd"
    CELERY = "Celery"
    GUNICORN = "gunicorn"
    MULTIPROCESSING = "multiprocessing"
    PASSENGER = "Passenger"
    PHP_FPM = "PHP-FPM"
    PUMA = "Puma"
    RESQUE = "Resque"
    RQ = "RQ"
    SIDEKIQ = "Sidekiq"
    UNICORN = "Unicorn"
    UWSGI = "uWSGI"


class Library(StrEnum):
    """What it may use to talk to PostgreSQL, or to wait for it, by the name that it goes by."""

    ACTIVE_RECORD = "Active Record"
    ASYNCPG = "asyncpg"
    DBD_PG = "DBD::Pg"
    DJANGO = "Django"
    GEVENT = "gevent"
    HANAMI = "Hanami"
    HANAMI_DB = "hanami-db"
    """Hanami's own database provider, which it has from 2.2 on wherever this gem is in the bundle."""
    LIB_PQ = "lib/pq"
    NODE_POSTGRES = "node-postgres"
    PDO_PGSQL = "pdo_pgsql"
    PG = "pg"
    PGSQL = "pgsql"
    PGX = "pgx"
    POSTGRES_JS = "postgres.js"
    PSYCOPG = "psycopg"
    PSYCOPG2 = "psycopg2"
    RAILS = "Rails"
    ROM = "ROM"
    SEQUEL = "Sequel"
    SEQUEL_PG = "sequel_pg"
    SQLALCHEMY = "SQLAlchemy"
    UVLOOP = "uvloop"


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a process shows of itself at one moment; ``None`` and absence mean that it shows no sign."""

    language: Language | None = None
    server: Server | None = None
    libraries: frozenset[Library] = frozenset()


class _Place(Enum):
    MAPPED = "the files in /proc/PID/maps, one a line"
    PROGRAM = "/proc/PID/exe"
    CMDLINE = "/proc/PID/cmdline, one blank between the arguments"
    GEMS = "Gemfile.lock in the working directory of a Ruby process: the lines of its gems"
    DIRECTORY = "those of _FILES that there are in the working directory of a process of their language, one a line"
    MODULES = "the modules that a Go program was linked from, one a line"


class _Sign(NamedTuple):
    place: _Place
    pattern: re.Pattern[str]
    """To be found there."""
    what: Language | Server | Library
    reason: str
    language: Language | None = None
    """Counts only for a process of this language: anybody can call a file ``puma``."""


def _extension(path: str) -> re.Pattern[str]:
    """Python's compiled modules: ``name.cpython-311-x86_64-linux-gnu.so``, ``name.abi3.so``."""
    return re.compile(rf"/{path}\.[\w.-]*so$", re.MULTILINE)


def _title(beginning: str) -> re.Pattern[str]:
    return re.compile(f"^(?:{beginning})")


def _script(name: str) -> re.Pattern[str]:
    """An interpreter's first argument that is no option: ``ruby /usr/bin/puma``, ``python -m celery``."""
    return re.compile(rf"^\S+ (?:-\S+ )*(?:\S*/)?{name}(?: |$)")


def _gem(name: str) -> re.Pattern[str]:
    """A gem among those that Bundler has resolved: ``    sequel (5.84.0)``."""
    return re.compile(rf"^ {{4}}{name} \(", re.MULTILINE)


def _package(name: str) -> re.Pattern[str]:
    """A package that npm has installed."""
    return re.compile(f"^node_modules/{name}/package.json$", re.MULTILINE)


def _module(path: str) -> re.Pattern[str]:
    """A module of Go's, in any of its major versions."""
    return re.compile(rf"^{path}(/v\d+)?$", re.MULTILINE)


SIGNS = (
    # What embeds a runtime comes before it, and a runtime before the libraries that others embed.
    _Sign(_Place.PROGRAM, program(r"python\d*(\.\d+)?[a-z]*"), Language.PYTHON, "CPython's program"),
    _Sign(_Place.PROGRAM, program(r"ruby[\d.]*"), Language.RUBY, "CRuby's program"),
    _Sign(_Place.PROGRAM, program(r"perl[\d.]*"), Language.PERL, "Perl's program"),
    _Sign(_Place.PROGRAM, program(r"php(-fpm|-cgi)?[\d.]*"), Language.PHP, "php8.2, php-fpm8.2: Debian's names too"),
    _Sign(_Place.PROGRAM, program("node|nodejs"), Language.NODE, "Node's program"),
    _Sign(_Place.MAPPED, library("libjvm"), Language.JAVA, "the Java virtual machine"),
    _Sign(_Place.MAPPED, library("libcoreclr"), Language.DOTNET, "the .NET runtime"),
    _Sign(_Place.MAPPED, library("libnode"), Language.NODE, "Node as a shared library, as Fedora builds it"),
    _Sign(_Place.MAPPED, library(r"libphp\d*(\.\d+)?"), Language.PHP, "mod_php within Apache httpd"),
    _Sign(_Place.MAPPED, library(r"mod_perl"), Language.PERL, "mod_perl within Apache httpd"),
    _Sign(_Place.MAPPED, library(r"libpython\d[\d.]*[a-z]*"), Language.PYTHON, "Python within uWSGI, mod_wsgi…"),
    _Sign(_Place.MAPPED, library(r"libruby(-[\d.]+)?"), Language.RUBY, "Ruby within Passenger, uWSGI…"),
    _Sign(_Place.PROGRAM, program(r"php-fpm[\d.]*"), Server.PHP_FPM, "FPM is a program of its own"),
    _Sign(_Place.PROGRAM, program("apache2|httpd"), Server.APACHE, "Debian's name, and everybody else's"),
    _Sign(_Place.PROGRAM, program(r"uwsgi(-core|_python\d*)?"), Server.UWSGI, "uwsgi, and Debian's uwsgi-core"),
    _Sign(_Place.CMDLINE, _title(r"puma[: ]"), Server.PUMA, "puma 6.4.2 (…), puma: cluster worker 0: …", Language.RUBY),
    _Sign(_Place.CMDLINE, _script("puma"), Server.PUMA, "before it sets its title", Language.RUBY),
    _Sign(_Place.CMDLINE, _title(r"\S*unicorn(_rails)? (master|worker)"), Server.UNICORN, "its $0", Language.RUBY),
    _Sign(_Place.CMDLINE, _script("unicorn(_rails)?"), Server.UNICORN, "before it sets its title", Language.RUBY),
    _Sign(_Place.CMDLINE, _title("Passenger "), Server.PASSENGER, "Passenger RubyApp: …", Language.RUBY),
    _Sign(_Place.CMDLINE, _title(r"sidekiq \d"), Server.SIDEKIQ, "sidekiq 7.2.1 app [0 of 5 busy]", Language.RUBY),
    _Sign(_Place.CMDLINE, _script("sidekiq"), Server.SIDEKIQ, "before it sets its title", Language.RUBY),
    _Sign(_Place.CMDLINE, _title(r"resque-\d"), Server.RESQUE, "resque-2.6.0: Forked 123 at …", Language.RUBY),
    _Sign(_Place.CMDLINE, _title("gunicorn: "), Server.GUNICORN, "its title, with setproctitle", Language.PYTHON),
    _Sign(_Place.CMDLINE, _script("gunicorn"), Server.GUNICORN, "its title without", Language.PYTHON),
    _Sign(_Place.CMDLINE, _title(r"\[celeryd: "), Server.CELERY, "its title, with setproctitle", Language.PYTHON),
    _Sign(_Place.CMDLINE, _script("celery"), Server.CELERY, "its title without", Language.PYTHON),
    _Sign(_Place.CMDLINE, _title("rq:worker:"), Server.RQ, "its title, with setproctitle", Language.PYTHON),
    _Sign(_Place.CMDLINE, _script(r"rq(\.cli)?"), Server.RQ, "its title without", Language.PYTHON),
    _Sign(
        _Place.CMDLINE,
        re.compile(r" --multiprocessing-fork( |$)|^\S+ (?:-\S+ )*-c from multiprocessing\.forkserver import main;"),
        Server.MULTIPROCESSING,
        "its children by spawn, and the fork server; by fork they look like their parent",
        Language.PYTHON,
    ),
    _Sign(_Place.MAPPED, library("pg_ext"), Library.PG, "the gem", Language.RUBY),
    _Sign(_Place.MAPPED, library("sequel_pg"), Library.SEQUEL_PG, "Sequel's optional accelerator", Language.RUBY),
    _Sign(_Place.MAPPED, library("sequel_pg"), Library.SEQUEL, "which nothing else loads", Language.RUBY),
    _Sign(_Place.CMDLINE, _script("rails"), Library.RAILS, "rails server, rails runner", Language.RUBY),
    _Sign(_Place.CMDLINE, _script("hanami"), Library.HANAMI, "hanami server", Language.RUBY),
    _Sign(_Place.GEMS, _gem("activerecord"), Library.ACTIVE_RECORD, "the gem", Language.RUBY),
    _Sign(_Place.GEMS, _gem("hanami"), Library.HANAMI, "the gem", Language.RUBY),
    _Sign(_Place.GEMS, _gem("hanami-db"), Library.HANAMI_DB, "the gem", Language.RUBY),
    _Sign(_Place.GEMS, _gem("rails"), Library.RAILS, "the gem", Language.RUBY),
    _Sign(_Place.GEMS, _gem("rom(-sql)?"), Library.ROM, "the gem, or its half for SQL", Language.RUBY),
    _Sign(_Place.GEMS, _gem("sequel"), Library.SEQUEL, "the gem", Language.RUBY),
    _Sign(_Place.MAPPED, _extension(r"psycopg_(c|binary)/_psycopg"), Library.PSYCOPG, "its C form", Language.PYTHON),
    _Sign(_Place.MAPPED, _extension("psycopg2/_psycopg"), Library.PSYCOPG2, "all of it", Language.PYTHON),
    _Sign(_Place.MAPPED, _extension("asyncpg/protocol/protocol"), Library.ASYNCPG, "its protocol", Language.PYTHON),
    _Sign(_Place.MAPPED, _extension(r"sqlalchemy/(\w+/)+\w+"), Library.SQLALCHEMY, "its C form", Language.PYTHON),
    _Sign(_Place.MAPPED, _extension(r"gevent/(\w+/)*\w+"), Library.GEVENT, "its hub", Language.PYTHON),
    _Sign(_Place.MAPPED, _extension("uvloop/loop"), Library.UVLOOP, "all of it", Language.PYTHON),
    _Sign(_Place.CMDLINE, _script("django-admin"), Library.DJANGO, "its own command", Language.PYTHON),
    _Sign(_Place.CMDLINE, _script(r"manage\.py"), Library.DJANGO, "what startproject makes", Language.PYTHON),
    _Sign(_Place.DIRECTORY, re.compile(r"^manage\.py$", re.MULTILINE), Library.DJANGO, "likewise", Language.PYTHON),
    _Sign(_Place.DIRECTORY, _package("pg"), Library.NODE_POSTGRES, "the package pg", Language.NODE),
    _Sign(_Place.DIRECTORY, _package("postgres"), Library.POSTGRES_JS, "the package postgres", Language.NODE),
    _Sign(_Place.MODULES, _module("github.com/lib/pq"), Library.LIB_PQ, "the module", Language.GO),
    _Sign(_Place.MODULES, _module("github.com/jackc/(pgx|pgconn)"), Library.PGX, "or its half", Language.GO),
    _Sign(_Place.MAPPED, library("pgsql"), Library.PGSQL, "the extension", Language.PHP),
    _Sign(_Place.MAPPED, library("pdo_pgsql"), Library.PDO_PGSQL, "the extension", Language.PHP),
    _Sign(_Place.MAPPED, library("auto/DBD/Pg/Pg"), Library.DBD_PG, "its XS half", Language.PERL),
)
"""What tells what. The first sign of a language decides on it, and so does the first one of a server."""

_GEMFILE_LOCK = "Gemfile.lock"
_FILES: Mapping[Language | None, tuple[str, ...]] = {
    Language.PYTHON: ("manage.py",),
    Language.NODE: ("node_modules/pg/package.json", "node_modules/postgres/package.json"),
}


def runtime_of(process: int | Image) -> Runtime:
    """Tell what a process is; a Runtime without anything if it is gone or can't be looked at.

    For worker threads: its working directory may be in a file system that takes its time, which is waited for half a
    second. Not to be remembered for long: a process may load a library, or execute another program, at any time.

    Args:
        process: A pid, or what :func:`~pgguard.attribution.images.read_image` read of it.
    """
    image = read_image(process) if isinstance(process, int) else process
    if image is None:
        return Runtime()
    places = _places(image)
    language = _language(places)
    files = _FILES.get(language, ())
    text = _GEMFILE_LOCK if language is Language.RUBY else None
    found = Findings()
    if language is None or files or text:
        with contextlib.suppress(OSError):  # looking hangs
            found = look_into(image.pid, modules=language is None, files=files, text=text)
    if found.modules is not None:
        language = Language.GO
        places[_Place.MODULES] = "\n".join(found.modules)
    places[_Place.GEMS] = found.text
    places[_Place.DIRECTORY] = "\n".join(found.files)
    seen = list(_seen(places, language))
    return Runtime(
        language,
        next((what for what in seen if isinstance(what, Server)), None),
        frozenset(what for what in seen if isinstance(what, Library)),
    )


def language_of(pid: int) -> Language | None:
    """Whose runtime a process shows: what :func:`runtime_of` says too, without a look at its files (so never Go)."""
    image = read_image(pid)
    return None if image is None else _language(_places(image))


def _places(image: Image) -> dict[_Place, str]:
    return {_Place.MAPPED: image.mapped, _Place.PROGRAM: image.program, _Place.CMDLINE: image.cmdline}


def _language(places: Mapping[_Place, str]) -> Language | None:
    return next((what for what in _seen(places) if isinstance(what, Language)), None)


def _seen(places: Mapping[_Place, str], language: Language | None = None) -> Iterator[Language | Server | Library]:
    for sign in SIGNS:
        if sign.language in {None, language} and sign.pattern.search(places.get(sign.place, "")):
            yield sign.what
