"""pg8000, the protocol in Python, with a socket that blocks."""

from __future__ import annotations

import io
from contextlib import closing

import pg8000.native

from tests.integration.programs.pg8000_session import connection_arguments
from tests.soak.programs.playing import Step, copy_lines, digest, play, values_of, with_marks


class Player:
    def __init__(self) -> None:
        self._connection = pg8000.native.Connection(**connection_arguments())

    def do(self, step: Step) -> object:
        method = getattr(self, step["do"], self.rows)
        return method(step)

    def close(self) -> None:
        self._connection.close()

    def execute(self, sql: str, values: list[str] | None = None) -> object:
        named = {f"v{n}": value for n, value in enumerate(values or ())}
        for name in named:
            sql = with_marks(sql, "$1").replace("$1", f":{name}", 1) if named else sql
        try:
            return digest(self._connection.run(sql, **named) or [])
        except pg8000.native.DatabaseError as error:
            return error.args[0]["C"]
        except pg8000.native.InterfaceError as error:  # it knows itself that a transaction has failed
            return str(error)

    def rows(self, step: Step) -> object:
        return self.execute(step["sql"], values_of(step))

    def prepared(self, step: Step) -> object:
        statement = self._connection.prepare(step["sql"].replace("$1", ":a").replace("$2", ":b"))
        got = [digest(statement.run(a=first, b=second)) for first, second in step["lists"]]
        statement.close()
        return got

    def transaction(self, step: Step) -> object:
        return [self.execute(sql) for sql in step["statements"]]

    def copy(self, step: Step) -> object:
        self.execute("DROP TABLE IF EXISTS copied")
        self.execute("CREATE TEMP TABLE copied (n int, word text)")
        self._connection.run("COPY copied FROM STDIN", stream=io.StringIO(copy_lines(step["rows"])))
        out = io.BytesIO()
        self._connection.run("COPY copied TO STDOUT", stream=out)
        return digest([line] for line in out.getvalue().splitlines())


if __name__ == "__main__":
    with closing(Player()) as player:
        play(player.do)
