"""What real drivers and a real server say to each other, recorded as files of the corpus."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import asyncpg
import pg8000.native
import psycopg
import psycopg2
import psycopg2.extensions
import psycopg2.extras

from tests.fuzz.script import Do, Step, encode
from tests.servers import Address, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_OPENER: Final = 1
_SECONDS: Final = 20.0
_TABLE: Final = "fuzz_things"


class Recorder:
    """Stands between clients and a server, and keeps what passes: a list of steps for each connection."""

    def __init__(self, server: Address) -> None:
        self._server = f"{server.host}/.s.PGSQL.{server.port}"
        self._directory = tempfile.TemporaryDirectory(prefix="pgguard-record-")
        self.address = Address(self._directory.name, server.port)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{self.address.host}/.s.PGSQL.{server.port}")
        self._listener.listen()
        self.connections: list[list[Step]] = []
        self._threads: list[threading.Thread] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Wait until everything has passed."""
        for thread in self._threads:
            thread.join(_SECONDS)
        self._listener.close()
        self._directory.cleanup()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._server)
                steps: list[Step] = []
                self.connections.append(steps)
                lock = threading.Lock()
                for source, target, do in ((client, server, Do.CLIENT), (server, client, Do.SERVER)):
                    thread = threading.Thread(target=self._pump, args=(source, target, do, steps, lock), daemon=True)
                    self._threads.append(thread)
                    thread.start()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, do: Do, steps: list[Step], lock: threading.Lock) -> None:
        data = b"x"
        while data:
            try:
                data = source.recv(32768)
            except OSError:
                data = b""
            with lock, contextlib.suppress(OSError):
                if data:
                    steps.append(Step(do, _OPENER if do is Do.CLIENT else 0, data))
                    target.sendall(data)
                else:
                    steps.append(Step(Do.CLIENT_ENDS if do is Do.CLIENT else Do.SERVER_ENDS))
                    target.shutdown(socket.SHUT_WR)


# What is recorded


@contextmanager
def _connected(address: Address) -> Iterator[psycopg.Connection]:
    with psycopg.connect(address.conninfo, autocommit=True) as connection:
        yield connection


def _simple(address: Address) -> None:
    with _connected(address) as connection:
        pgconn = connection.pgconn
        for text in (
            b"SELECT 1; SELECT 2",
            b"",
            b"SELECT 1/0",
            b"SELECT",
            b"BEGIN; SELECT 'x'",
            b"nonsense",
            b"ROLLBACK",
        ):
            pgconn.exec_(text)


def _prepared(address: Address) -> None:
    with _connected(address) as connection:
        for number in range(3):
            connection.execute("SELECT %s::int", [number], prepare=True)
        with contextlib.suppress(psycopg.Error):
            connection.execute("SELECT 1 / %s::int", [0], prepare=True)
        connection.execute("DEALLOCATE ALL")


def _pipeline(address: Address) -> None:
    with _connected(address) as connection, contextlib.suppress(psycopg.Error), connection.pipeline() as pipeline:
        for number in range(4):
            connection.execute("SELECT %s::int", [number])
        pipeline.sync()
        connection.execute("SELECT 1 / %s::int", [0])
        connection.execute("SELECT 1")


def _copies(address: Address) -> None:
    with _connected(address) as connection:
        with connection.cursor().copy(f"COPY {_TABLE} FROM STDIN") as copy:
            for number in range(3):
                copy.write_row((number, "thing"))
        with connection.cursor().copy(f"COPY {_TABLE} TO STDOUT") as copy:
            list(copy.rows())


def _failed_copies(address: Address) -> None:
    with _connected(address) as connection:
        with contextlib.suppress(psycopg.Error), connection.cursor().copy(f"COPY {_TABLE} FROM STDIN") as copy:
            copy.write("no number\tthing\n")
        with contextlib.suppress(ZeroDivisionError), connection.cursor().copy(f"COPY {_TABLE} FROM STDIN") as copy:
            copy.write("1\tthing\n")
            raise ZeroDivisionError
        connection.execute("SELECT 1")


def _extended_copies(address: Address) -> None:
    """Behind an Execute, and so behind a Sync too, as libpq has it."""
    with _connected(address) as connection:
        pgconn = connection.pgconn
        for data, error in ((b"1\tthing\n", None), (b"no number\tthing\n", None), (b"1\tthing\n", b"enough")):
            pgconn.exec_params(f"COPY {_TABLE} FROM STDIN".encode(), None)
            pgconn.put_copy_data(data)
            pgconn.put_copy_end(error)
            while pgconn.get_result() is not None:
                pass


def _transactions(address: Address) -> None:
    with psycopg.connect(address.conninfo) as connection:
        with contextlib.suppress(psycopg.Error), connection.transaction():
            connection.execute("SELECT nonsense")
        with connection.transaction(), connection.transaction():
            connection.execute(f"SELECT count(*) FROM {_TABLE}")


def _deferred(address: Address) -> None:
    """A Sync that fails."""
    with _connected(address) as connection:
        connection.execute("CREATE TEMP TABLE t (x int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
        with contextlib.suppress(psycopg.Error):
            connection.execute("INSERT INTO t VALUES (%s), (1)", [1])


def _notified(address: Address) -> None:
    with _connected(address) as connection:
        connection.execute("LISTEN things")
        connection.execute("NOTIFY things, 'news'")
        connection.execute("DO $$ BEGIN RAISE NOTICE 'hm'; END $$")
        connection.execute("SET application_name = 'another'")


def _cursor(address: Address) -> None:
    with psycopg.connect(address.conninfo) as connection, connection.cursor("c") as cursor:
        cursor.execute("SELECT generate_series(1, 5)")
        cursor.fetchmany(2)


def _terminated(address: Address) -> None:
    with contextlib.suppress(psycopg.Error), _connected(address) as connection:
        connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")


def _cancelled(address: Address) -> None:
    with _connected(address) as connection:
        threading.Timer(0.2, connection.cancel_safe).start()  # the other would keep the recorder waiting
        with contextlib.suppress(psycopg.Error):
            connection.execute("SELECT pg_sleep(2)")


def _refused(address: Address) -> None:
    with contextlib.suppress(psycopg.Error):
        psycopg.connect(address.conninfo, user="fuzz_nobody")
    with contextlib.suppress(psycopg.Error):
        psycopg.connect(address.conninfo, user="fuzz_limited")


def _large_object(address: Address) -> None:
    """FunctionCalls."""
    with closing(psycopg2.connect(address.conninfo)) as connection:
        thing = connection.lobject(0, "wb")
        thing.write(b"thing")  # type: ignore[no-untyped-call]
        thing.close()  # type: ignore[no-untyped-call]
        connection.rollback()


def _replication(address: Address) -> None:
    """CopyBoth, of which the client has enough after a while."""
    factory = psycopg2.extras.PhysicalReplicationConnection
    with (
        closing(psycopg2.connect(address.conninfo, connection_factory=factory)) as connection,
        connection.cursor() as c,
    ):
        c.execute("IDENTIFY_SYSTEM")
        [row] = c.fetchall()
        c.start_replication(start_lsn=row[2])
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and c.read_message() is None:
            c.send_feedback(reply=True)  # type: ignore[no-untyped-call]
            time.sleep(0.1)


def _asyncpg(address: Address) -> None:
    async def talk() -> None:
        connection = await asyncpg.connect(host=address.host, port=address.port, user="postgres", database="postgres")
        await connection.fetch("SELECT $1::int", 1)
        await connection.fetch("SELECT $1::int", 2)
        await connection.executemany(f"INSERT INTO {_TABLE} VALUES ($1, $2)", [(n, "thing") for n in range(3)])
        await connection.copy_records_to_table(_TABLE, records=[(1, "thing")])
        with contextlib.suppress(asyncpg.PostgresError):
            await connection.fetch("SELECT nonsense")
        async with connection.transaction():
            await connection.execute("SELECT 1")
        await connection.close()

    asyncio.run(talk())


def _pg8000(address: Address) -> None:
    connection = pg8000.native.Connection(
        "postgres", unix_sock=f"{address.host}/.s.PGSQL.{address.port}", database="postgres"
    )
    connection.run("SELECT :n", n=1)
    prepared = connection.prepare("SELECT :n")
    prepared.run(n=2)
    prepared.close()
    with contextlib.suppress(pg8000.exceptions.DatabaseError):
        connection.run("SELECT nonsense")
    connection.close()


def _run(server: Server, address: Address, program: str, *arguments: str, text: str = "") -> None:
    command: list[str | Path] = [server.bindir / program, *arguments]
    subprocess.run(command, env=address.environ(), input=text, text=True, capture_output=True, check=True)


def _psql(server: Server, address: Address) -> None:
    queries = "SELECT 1 \\; SELECT 2;\nSELECT 1 \\bind \\g\n"
    text = f"{queries}\\copy {_TABLE} FROM stdin\n1\tthing\n\\.\n\\copy {_TABLE} TO stdout\n"
    _run(server, address, "psql", "-X", text=text)


def _pgbench(server: Server, address: Address) -> None:
    with tempfile.TemporaryDirectory() as name:
        script = Path(name) / "script.sql"
        script.write_text("\\startpipeline\nSELECT 1;\nSELECT 2;\n\\endpipeline\nSELECT 3;\n")
        for mode in ("extended", "prepared"):
            _run(server, address, "pgbench", "-n", "-M", mode, "-t", "2", "-f", str(script))


def _in_a_process_of_its_own(talk: Callable[[Address], None]) -> Callable[[Address], None]:
    """One that waits in libpq, where it would keep the recorder waiting, too."""

    def call(address: Address) -> None:
        process = multiprocessing.get_context("spawn").Process(target=talk, args=(address,))
        process.start()
        process.join(_SECONDS)
        assert process.exitcode == 0

    return call


def _recordings(server: Server) -> dict[str, Callable[[Address], None]]:
    return {
        "psycopg-simple": _simple,
        "psycopg-prepared": _prepared,
        "psycopg-pipeline": _pipeline,
        "psycopg-copies": _copies,
        "psycopg-failed-copies": _failed_copies,
        "psycopg-extended-copies": _in_a_process_of_its_own(_extended_copies),
        "psycopg-transactions": _transactions,
        "psycopg-deferred-constraint": _deferred,
        "psycopg-notified": _notified,
        "psycopg-cursor": _cursor,
        "psycopg-terminated": _terminated,
        "psycopg-cancelled": _cancelled,
        "psycopg-refused": _refused,
        "psycopg2-large-object": _large_object,
        "psycopg2-replication": _replication,
        "asyncpg": _asyncpg,
        "pg8000": _pg8000,
        "psql": lambda address: _psql(server, address),
        "pgbench-pipeline": lambda address: _pgbench(server, address),
    }


def record(server: Server, directory: Path) -> Iterator[Path]:
    """Record everything there is, and yield the files that it is written to: ``recorded-NAME-NUMBER``."""
    with psycopg.connect(server.unix.conninfo, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE {_TABLE} (n int, what text)")
        connection.execute("CREATE ROLE fuzz_limited LOGIN CONNECTION LIMIT 0")
    for name, talk in _recordings(server).items():
        recorder = Recorder(server.unix)
        talk(recorder.address)
        recorder.close()
        for number, steps in enumerate(recorder.connections, 1):
            path = directory / f"recorded-{name}-{number}"
            path.write_bytes(encode(steps))
            yield path
