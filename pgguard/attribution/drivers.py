"""What a client process speaks PostgreSQL's protocol with, told by the files that it has mapped.

It matters because a client that is allowed to pipeline looks like one that is confused: with libpq, overlapping
requests of one process are certainly wrong, with others they need not be.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import NamedTuple

from pgguard.attribution.evidence import Driver
from pgguard.attribution.images import Image, library, program, read_image


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
"""What tells which driver; the first sign that is there decides.

There is none for Go: its programs are told from others only by notes within the file, and they are judged like
unknown ones anyway.
"""


def driver_of(process: int | Image) -> Driver:
    """Tell what a process speaks to PostgreSQL with; ``UNKNOWN`` if it is gone or can't be looked at.

    Not to be remembered for long: a process may load libpq at any time.

    Args:
        process: A pid, or what :func:`~pgguard.attribution.images.read_image` read of it.
    """
    image = read_image(process) if isinstance(process, int) else process
    if image is None:
        return Driver.UNKNOWN
    paths = {_Place.MAPPED: image.mapped, _Place.PROGRAM: image.program}
    return next((sign.driver for sign in SIGNS if sign.path.search(paths[sign.place])), Driver.UNKNOWN)
