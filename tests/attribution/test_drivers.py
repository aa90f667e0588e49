from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from ctypes.util import find_library

import pytest

from pgguard.attribution.drivers import driver_of, tell_driver
from pgguard.attribution.evidence import Driver
from pgguard.attribution.runtime import Language, Library, Runtime
from tests.attribution.puppets import Puppet
from tests.servers import needs

Puppets = Callable[[], Puppet]


@pytest.mark.parametrize("module", ["asyncpg", "pg8000"])
def test_python_without_libpq_is_python(module: str, puppet: Puppets) -> None:
    child = puppet()
    child.do(f"import {module}")
    assert driver_of(child.pid) is Driver.PYTHON


@pytest.mark.parametrize("module", ["psycopg", "psycopg2"])
def test_libpq_is_seen_in_a_wheel_and_wins_over_everything_else(module: str, puppet: Puppets) -> None:
    child = puppet()
    child.do(f"import asyncpg, {module}")
    assert driver_of(child.pid) is Driver.LIBPQ


@needs("node", found=shutil.which("node"))
def test_node_is_node() -> None:
    program = "process.stdout.write('x'); process.stdin.resume()"
    assert _driver_when_running("node", "-e", program) is Driver.NODE


@needs("node", found=shutil.which("node"))
@needs("libpq", found=find_library("pq"))
def test_a_program_that_may_pipeline_is_not_sure_to_use_the_libpq_that_it_shows() -> None:
    """Some other library of its may have brought it along, and overlap would be called an error."""
    program = "process.stdout.write('x'); process.stdin.resume()"
    assert _driver_when_running("env", f"LD_PRELOAD={find_library('pq')}", "node", "-e", program) is Driver.NODE


@needs("cat", found=shutil.which("cat"))
def test_a_program_that_shows_no_sign_is_unknown() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"x")
        process.stdin.flush()
        process.stdout.read(1)
        assert driver_of(process.pid) is Driver.UNKNOWN


def test_a_process_that_is_gone_is_unknown(puppet: Puppets) -> None:
    child = puppet()
    child.end()
    assert driver_of(child.pid) is Driver.UNKNOWN


def _driver_when_running(*command: str) -> Driver:
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"x"
        return driver_of(process.pid)


GO = Runtime(Language.GO)
PGX = Runtime(Language.GO, None, frozenset({Library.PGX}))
BOTH = Runtime(Language.GO, None, frozenset({Library.PGX, Library.LIB_PQ}))
NODE = Runtime(Language.NODE)
PG = Runtime(Language.NODE, None, frozenset({Library.NODE_POSTGRES}))
USER = {"user": "u", "database": "d"}
UTF8 = {"client_encoding": "UTF8"}
FROM_LIB_PQ = {"datestyle": "ISO, MDY", **UTF8, **USER, "extra_float_digits": "2"}


@pytest.mark.parametrize(
    ("runs", "runtime", "settings", "driver"),
    [
        (Driver.LIBPQ, Runtime(), {}, Driver.LIBPQ),
        (Driver.LIBPQ, Runtime(), {"user": "u", "replication": "true", "options": "-c x=y"}, Driver.LIBPQ),
        (Driver.LIBPQ, Runtime(), USER | {"application_name": "x"} | UTF8 | {"timezone": "UTC"}, Driver.LIBPQ),
        (Driver.LIBPQ, Runtime(), USER | {"_pq_.anything": "on"}, Driver.LIBPQ),
        # Whoever relays what somebody else says.
        (Driver.LIBPQ, Runtime(), USER | UTF8 | {"application_name": "x"}, Driver.UNKNOWN),
        (Driver.LIBPQ, Runtime(), USER | {"statement_timeout": "5"} | UTF8, Driver.UNKNOWN),
        (Driver.PYTHON, Runtime(), USER | UTF8, Driver.UNKNOWN),
        (Driver.PYTHON, Runtime(), USER | {"application_name": "x", "replication": "database"}, Driver.PYTHON),
        (Driver.UNKNOWN, Runtime(), UTF8 | USER, Driver.TOKIO_POSTGRES),
        (Driver.LIBPQ, Runtime(), UTF8 | USER | {"application_name": "x"}, Driver.TOKIO_POSTGRES),
        (Driver.UNKNOWN, Runtime(), {"client_encoding": "'utf-8'"} | USER | {"jit": "off"}, Driver.ASYNCPG),
        (Driver.UNKNOWN, GO, USER, Driver.GO),
        (Driver.UNKNOWN, GO, FROM_LIB_PQ, Driver.LIB_PQ),
        (Driver.UNKNOWN, PGX, USER, Driver.PGX),
        (Driver.UNKNOWN, PGX, {"application_name": "x", **USER}, Driver.PGX),
        (Driver.UNKNOWN, BOTH, FROM_LIB_PQ, Driver.LIB_PQ),
        (Driver.UNKNOWN, BOTH, FROM_LIB_PQ | {"extra_float_digits": "0"}, Driver.GO),
        (Driver.NODE, NODE, USER | UTF8, Driver.NODE),
        (Driver.NODE, PG, USER | UTF8, Driver.NODE_POSTGRES),
        (Driver.NODE, NODE, USER | UTF8 | {"application_name": "x"}, Driver.POSTGRES_JS),
        (Driver.NODE, PG, USER, Driver.NODE),  # pg-native, which is libpq
        (Driver.JAVA, Runtime(Language.JAVA), USER | {"application_name": "vertx-pg-client"}, Driver.JAVA),
        (Driver.UNKNOWN, Runtime(), USER, Driver.UNKNOWN),
        (Driver.UNKNOWN, Runtime(), {}, Driver.UNKNOWN),
    ],
)
def test_what_a_client_says_tells_its_driver_or_that_it_is_none_that_is_known(
    runs: Driver, runtime: Runtime, settings: dict[str, str], driver: Driver
) -> None:
    assert tell_driver(runs, runtime, settings) is driver
