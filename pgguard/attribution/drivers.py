"""What a client speaks PostgreSQL's protocol with, told by what it runs and by what it says as it connects.

It matters because a client that is allowed to pipeline looks like one that is confused: with libpq, overlapping
requests of one process are certainly wrong, with others they need not be.

*What it runs* (:data:`SIGNS`) tells libpq, and otherwise the language. *What it says* is the settings that it asks for
as it connects: which, in which order and with which values is a habit of each driver (:data:`HABITS`). Some habits are
one driver's alone, so that they tell it wherever it runs, on another host for one. Others tell which of a language's
drivers it is. And where what is said can't be libpq's though libpq is loaded, something else speaks on the connection:
a relay that passes on what its own client says, or one more driver in the same process. Then nothing is known, and
doubt acquits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from pgguard.attribution.evidence import Driver
from pgguard.attribution.images import Image, library, program, read_image
from pgguard.attribution.runtime import Language, Library, Runtime


class _Place(Enum):
    MAPPED = "the files in /proc/PID/maps"
    PROGRAM = "/proc/PID/exe"


class _Sign(NamedTuple):
    place: _Place
    path: re.Pattern[str]
    """To be found in one of the paths."""
    driver: Driver
    reason: str


SIGNS = (
    # A process can show several signs. Drivers that may pipeline come first, libpq or not, so that doubt acquits.
    _Sign(
        _Place.MAPPED,
        re.compile(r"/(psqlpy|connectorx)/[^/\n]+\.so$", re.MULTILINE),
        Driver.UNKNOWN,
        "Python packages around rust-postgres, which pipelines",
    ),
    _Sign(_Place.PROGRAM, program("node|nodejs"), Driver.NODE, "node's program, which holds all of node"),
    _Sign(_Place.MAPPED, library("libnode"), Driver.NODE, "node as a shared library, as Fedora builds it"),
    _Sign(_Place.MAPPED, library("libcoreclr"), Driver.DOTNET, "the .NET runtime"),
    _Sign(_Place.MAPPED, library("libjvm"), Driver.JAVA, "the Java virtual machine"),
    _Sign(
        _Place.MAPPED,
        library(r"libpq(-[\w-]+)?"),
        Driver.LIBPQ,
        "libpq itself, or the copy that a wheel or gem brings along: libpq-e8a033dd.so.5.16, libpq-ruby-pg.so.1",
    ),
    _Sign(
        _Place.PROGRAM,
        program(
            "psql|pgbench|pg_dump|pg_dumpall|pg_restore|pg_basebackup|pg_receivewal|pg_recvlogical|pg_isready|pg_amcheck"
            "|pg_rewind|createdb|createuser|dropdb|dropuser|clusterdb|reindexdb|vacuumdb|vacuumlo|oid2name"
        ),
        Driver.LIBPQ,
        "PostgreSQL's own client programs use libpq, even where it is linked statically and so can't be seen",
    ),
    _Sign(_Place.PROGRAM, program(r"python\d*(\.\d+)?[a-z]*"), Driver.PYTHON, "CPython's program"),
    _Sign(_Place.MAPPED, library(r"libpython\d[\d.]*[a-z]*"), Driver.PYTHON, "Python within uWSGI, mod_wsgi…"),
)
"""What a process runs tells which driver; the first sign that is there decides.

There is none for Go: its programs are told by notes within the file, as :mod:`pgguard.attribution.runtime` reads them.
"""


class _Habit(NamedTuple):
    driver: Driver
    names: re.Pattern[str]
    """What the names of the settings match, one blank in front of each, all of them in their order."""
    source: str
    values: Mapping[str, str] = {}
    """Settings that have to be there with these values."""
    within: Driver | None = None
    """What the process has to run; ``None``: the habit is this driver's alone."""
    library: Library | None = None
    """What it has to show as well, where the habit alone is not enough."""


HABITS = (
    # Those that are one driver's alone come first.
    _Habit(
        Driver.ASYNCPG,
        re.compile(" client_encoding user database( .*)?"),
        "asyncpg/protocol/coreproto.pyx, _connect(): the encoding first, and in quotes",
        {"client_encoding": "'utf-8'"},
    ),
    _Habit(
        Driver.TOKIO_POSTGRES,
        re.compile(" client_encoding user( database)?( options)?( application_name)?( replication)?"),
        "tokio-postgres/src/connect_raw.rs, startup(): the encoding first",
        {"client_encoding": "UTF8"},
    ),
    _Habit(
        Driver.LIB_PQ,
        re.compile(".*"),
        "lib/pq's connector.go, NewConnector(): three settings, in the order of a map, which is none",
        {"client_encoding": "UTF8", "datestyle": "ISO, MDY", "extra_float_digits": "2"},
    ),
    _Habit(
        Driver.PGJDBC,
        re.compile(" user database client_encoding DateStyle( .*)?"),
        "pgjdbc's ConnectionFactoryImpl.getParametersForStartup()",
        {"client_encoding": "UTF8", "DateStyle": "ISO"},
    ),
    _Habit(
        Driver.POSTGRES_JS,
        re.compile(" user database client_encoding( .*)? application_name( .*)?"),
        "postgres.js's src/connection.js, StartupMessage(), and src/index.js, parseOptions()",
        {"client_encoding": "UTF8", "application_name": "postgres.js"},
    ),
    _Habit(
        Driver.POSTGRES_JS,
        re.compile(" user database client_encoding( .+)"),
        "the same, when the application gives itself another name",
        {"client_encoding": "UTF8"},
        Driver.NODE,
    ),
    _Habit(
        Driver.NODE_POSTGRES,
        re.compile(" user( database)?( .+)? client_encoding"),
        "pg's lib/client.js, getStartupConf(), and pg-protocol's serializer.ts, startup(): the encoding last",
        {"client_encoding": "UTF8"},
        Driver.NODE,
        Library.NODE_POSTGRES,
    ),
    _Habit(
        Driver.PGX,
        re.compile("(?!.* extra_float_digits).*"),
        "pgx's pgconn/pgconn.go, connect(): nothing but what it is told",
        within=Driver.GO,
        library=Library.PGX,
    ),
    _Habit(
        Driver.LIBPQ,
        re.compile(
            "( user)?( database)?( replication)?( options)?( application_name)?( client_encoding)?"
            "( datestyle)?( timezone)?( geqo)?"
        ),
        "libpq's fe-protocol3.c, build_startup_packet(), and fe-connect.c, EnvironmentOptions",
        within=Driver.LIBPQ,
    ),
    _Habit(
        Driver.PYTHON,
        re.compile("( user)?( database)?( application_name)?( replication)?"),
        "pg8000's core.py, CoreConnection.__init__()",
        within=Driver.PYTHON,
    ),
)
"""What a client says as it connects tells which driver; the first habit that fits decides."""

_EXTENSION = "_pq_."
"""What the names of protocol extensions begin with, which any driver may come to ask for: "StartupMessage" in
PostgreSQL's documentation of its messages."""

_NEEDS_HABIT = frozenset({Driver.LIBPQ, Driver.PYTHON})
"""Drivers that aren't believed in where what is said isn't what they say."""


def driver_of(process: int | Image) -> Driver:
    """Tell what a process speaks to PostgreSQL with, by what it runs; ``UNKNOWN`` if it is gone or can't be looked at.

    Not to be remembered for long: a process may load libpq at any time.

    Args:
        process: A pid, or what :func:`~pgguard.attribution.images.read_image` read of it.
    """
    image = read_image(process) if isinstance(process, int) else process
    if image is None:
        return Driver.UNKNOWN
    paths = {_Place.MAPPED: image.mapped, _Place.PROGRAM: image.program}
    return next((sign.driver for sign in SIGNS if sign.path.search(paths[sign.place])), Driver.UNKNOWN)


def tell_driver(runs: Driver, runtime: Runtime, settings: Mapping[str, str]) -> Driver:
    """Tell what speaks on a connection. Does no I/O.

    Args:
        runs: What :func:`driver_of` says of the process that opened it; ``UNKNOWN`` if nobody knows that one.
        runtime: What that process runs.
        settings: What the client asked for as it connected, by name, in its order; empty if that isn't known.
    """
    if runs is Driver.UNKNOWN and runtime.language is Language.GO:
        runs = Driver.GO
    names = "".join(f" {name}" for name in settings if not name.startswith(_EXTENSION))
    for habit in HABITS:
        if (
            habit.within in {None, runs}
            and (habit.library is None or habit.library in runtime.libraries)
            and habit.names.fullmatch(names)
            and habit.values.items() <= settings.items()
        ):
            return habit.driver
    return Driver.UNKNOWN if runs in _NEEDS_HABIT else runs
