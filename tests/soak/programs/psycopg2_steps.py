"""psycopg2: the simple protocol alone."""

from __future__ import annotations

import io
import select
import threading
import time
from contextlib import closing

import psycopg2
import psycopg2.extensions

from tests.soak.programs.playing import Step, channel_of, copy_lines, digest, play, values_of, with_marks

Connection = psycopg2.extensions.connection


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

    def execute(self, sql: str, values: list[str] | None = None) -> object:
        with self._connection.cursor() as cursor:
            try:
                if values:
                    cursor.execute(with_marks(sql, "%s"), values)
                else:
                    cursor.execute(sql)
            except psycopg2.Error as error:
                return error.pgcode
            return digest(cursor) if cursor.description else cursor.statusmessage

    def rows(self, step: Step) -> object:
        return self.execute(step["sql"], values_of(step))

    def prepared(self, step: Step) -> object:
        return [self.execute(step["sql"], values) for values in step["lists"]]

    def transaction(self, step: Step) -> object:
        """Statement by statement, or all of them in one query."""
        if step["n"] % 2:
            return [self.execute("; ".join(step["statements"])), self.execute("ROLLBACK")]
        return [self.execute(sql) for sql in step["statements"]]

    def copy(self, step: Step) -> object:
        self.execute("DROP TABLE IF EXISTS copied; CREATE TEMP TABLE copied (n int, word text)")
        lines = copy_lines(step["rows"]) + ("no number\n" if step["fails"] else "")
        out = io.StringIO()
        with self._connection.cursor() as cursor:
            try:
                cursor.copy_expert("COPY copied FROM STDIN", io.StringIO(lines))
            except psycopg2.Error as error:
                return error.pgcode
            cursor.copy_expert("COPY copied TO STDOUT", out)
        return digest([line] for line in out.getvalue().splitlines())

    def cursor(self, step: Step) -> object:
        self._connection.autocommit = False
        with self._connection, self._connection.cursor("c") as cursor:
            cursor.itersize = step["size"]
            cursor.execute(step["sql"])
            got = digest(cursor)
        self._connection.autocommit = True
        return got

    def cancel(self, _: Step) -> object:
        """From another thread, which is what psycopg2's documentation suggests."""
        thread = threading.Thread(target=self._cancel_soon)
        thread.start()
        got = self.execute("SELECT pg_sleep(60)")
        thread.join()
        return got

    def _cancel_soon(self) -> None:
        asleep = f"SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = {self._connection.info.backend_pid}"
        with self._beside.cursor() as cursor:
            cursor.execute(asleep)
            while cursor.fetchone() != (True,):
                time.sleep(0.02)
                cursor.execute(asleep)
        self._connection.cancel()

    def notify(self, step: Step) -> object:
        channel = channel_of(step)
        self.execute(f"LISTEN {channel}")
        with self._beside.cursor() as cursor:
            for payload in step["payloads"]:
                cursor.execute("SELECT pg_notify(%s, %s)", (channel, payload))
        deadline = time.monotonic() + 60
        while len(self._connection.notifies) < len(step["payloads"]) and time.monotonic() < deadline:
            select.select([self._connection], [], [], 1)
            self._connection.poll()
        got = [notice.payload for notice in self._connection.notifies]
        self._connection.notifies.clear()
        self.execute(f"UNLISTEN {channel}")
        return got


def connect() -> Connection:
    connection = psycopg2.connect("")
    connection.autocommit = True
    return connection


if __name__ == "__main__":
    with closing(Player()) as player:
        play(player.do)
