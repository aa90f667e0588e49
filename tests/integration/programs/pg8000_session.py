"""A session of pg8000, which speaks the protocol in Python alone."""

from __future__ import annotations

import io
import os
from contextlib import closing

import pg8000.dbapi
import pg8000.native


def connection_arguments() -> dict[str, object]:
    """The connection parameters in the environment, which pg8000 does not read by itself."""
    host, port = os.environ["PGHOST"], int(os.environ["PGPORT"])
    where: dict[str, object]
    where = {"unix_sock": f"{host}/.s.PGSQL.{port}"} if host.startswith("/") else {"host": host, "port": port}
    return where | {"user": os.environ["PGUSER"], "database": os.environ["PGDATABASE"]}


def native() -> None:
    with closing(pg8000.native.Connection(**connection_arguments())) as connection:
        print("rows", connection.run("SELECT n, n::text FROM generate_series(1, :last) AS n", last=3))
        statement = connection.prepare("SELECT CAST(:n AS int) * 2")
        print("prepared", [statement.run(n=n) for n in range(3)])
        statement.close()
        connection.run("CREATE TEMP TABLE words (n int, word text)")
        connection.run("COPY words FROM STDIN", stream=io.StringIO("".join(f"{n}\tword\n" for n in range(5000))))
        out = io.BytesIO()
        connection.run("COPY words TO STDOUT", stream=out)
        print("copied", len(out.getvalue()))
        connection.run("LISTEN news")
        connection.run("NOTIFY news, 'extra'")
        connection.run("SELECT 1")
        print("notified", [payload for _, _, payload in connection.notifications])


def dbapi() -> None:
    with closing(pg8000.dbapi.connect(**connection_arguments())) as connection, closing(connection.cursor()) as cursor:
        try:
            cursor.execute("SELECT 1 / %s", (0,))
        except pg8000.dbapi.DatabaseError as error:
            print("failed", error.args[0]["C"])
        connection.rollback()
        cursor.executemany("SELECT %s", [(n,) for n in range(50)])
        print("last", cursor.fetchall())
        cursor.execute("SELECT length(%s)", ("x" * 3_000_000,))
        print("large", cursor.fetchone())
        # It sends what is longer than its buffer before it has read the answer in front of it.
        for size in (9_000, 100_000, 1_000_000) * 3:
            cursor.execute("SELECT md5(%s)", ("x" * size,))
            print("md5", cursor.fetchone())
        connection.commit()


if __name__ == "__main__":
    native()
    dbapi()
