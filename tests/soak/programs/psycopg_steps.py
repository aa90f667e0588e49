"""psycopg 3, one connection, all that it can."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import psycopg
from psycopg import errors
from psycopg.pq import DiagnosticField
from psycopg.rows import TupleRow

from tests.soak.programs.playing import Step, channel_of, digest, play, values_of

Connection = psycopg.Connection[TupleRow]


class Player:
    def __init__(self) -> None:
        self._connection = connect()
        self._beside = connect()

    def do(self, step: Step) -> object:
        method = getattr(self, step["do"], self.rows)
        return method(step)

    def close(self) -> None:
        self._beside.close()
        self._connection.close()

    def execute(self, sql: str, values: list[str] | None = None, *, binary: bool = False) -> object:
        try:
            cursor = self._connection.execute(sql, values or None, binary=binary)
            return digest(cursor) if cursor.description else cursor.statusmessage
        except psycopg.Error as error:
            return error.sqlstate

    def rows(self, step: Step) -> object:
        return self.execute(step["sql"], values_of(step), binary=step["n"] % 3 == 0)

    def prepared(self, step: Step) -> object:
        return [self.execute(step["sql"], values) for values in step["lists"]]

    def transaction(self, step: Step) -> object:
        return [self.execute(sql) for sql in step["statements"]]

    def copy(self, step: Step) -> object:
        connection = self._connection
        connection.execute("DROP TABLE IF EXISTS copied; CREATE TEMP TABLE copied (n int, word text)")
        try:
            with connection.cursor() as cursor, cursor.copy("COPY copied FROM STDIN") as into:
                for row in step["rows"]:
                    into.write_row(row)
                if step["fails"]:
                    into.write_row(("no number", ""))
        except errors.InvalidTextRepresentation as error:
            return error.sqlstate
        out = [self._copied("COPY copied TO STDOUT"), self._copied("COPY copied TO STDOUT (FORMAT binary)")]
        connection.execute("CREATE TEMP TABLE again (LIKE copied)")
        with connection.cursor() as cursor, cursor.copy("COPY again FROM STDIN (FORMAT binary)") as into:
            into.set_types(["int4", "text"])
            for n, word in step["rows"]:
                into.write_row((int(n), word))
        return [*out, self.execute("SELECT * FROM again"), self.execute("DROP TABLE again")]

    def _copied(self, sql: str) -> object:
        hashed = hashlib.sha256()
        size = 0
        with self._connection.cursor() as cursor, cursor.copy(sql) as out:
            for block in out:
                hashed.update(block)
                size += len(block)
        return [size, hashed.hexdigest()]

    def cursor(self, step: Step) -> object:
        with self._connection.transaction(), self._connection.cursor("c") as cursor:
            cursor.itersize = step["size"]
            return digest(cursor.execute(step["sql"]))

    def pipeline(self, step: Step) -> object:
        got: list[object] = []
        try:
            with self._connection.pipeline():
                cursors = [self._connection.execute(one["sql"], one["values"]) for one in step["statements"]]
                if step["fails"]:
                    self._connection.execute("SELECT 1 / 0")
                got = [digest(cursor) for cursor in cursors]
        except psycopg.Error as error:
            got.append(error.sqlstate)
        return got

    def cancel(self, _: Step) -> object:
        connection = self._connection
        connection.pgconn.send_query(b"SELECT pg_sleep(60)")
        connection.pgconn.flush()
        asleep = "SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = $1"
        while self._beside.execute(asleep, [connection.info.backend_pid]).fetchone() != (True,):
            time.sleep(0.02)
        connection.cancel_safe()
        got = []
        while result := connection.pgconn.get_result():
            got.append((result.error_field(DiagnosticField.SQLSTATE) or b"").decode())
        return got

    def notify(self, step: Step) -> object:
        channel = channel_of(step)
        self._connection.execute(f"LISTEN {channel}")
        for payload in step["payloads"]:
            self._beside.execute("SELECT pg_notify($1, $2)", (channel, payload))
        got = [notice.payload for notice in self._connection.notifies(timeout=60, stop_after=len(step["payloads"]))]
        self._connection.execute(f"UNLISTEN {channel}")
        return got


def connect(**settings: Any) -> Connection:
    connection = psycopg.connect("", autocommit=True, prepare_threshold=3, cursor_factory=psycopg.RawCursor, **settings)
    connection.server_cursor_factory = psycopg.RawServerCursor
    return connection


if __name__ == "__main__":
    player = Player()
    play(player.do)
    player.close()
