"""COPY of so many megabytes out and in, and one row of 64: hashed as they go by, and kept nowhere."""

from __future__ import annotations

import hashlib
import sys

from tests.soak.programs.psycopg_steps import connect

_ROW = 48_000
_VALUE = 64 << 20


def main(seed: int, megabytes: int) -> None:
    rows = megabytes * 1_000_000 // _ROW
    with connect() as connection:
        connection.execute("CREATE TEMP TABLE discarded (n int, sum text)")
        connection.execute(
            "CREATE FUNCTION pg_temp.discard() RETURNS trigger LANGUAGE plpgsql AS"
            " $$BEGIN INSERT INTO discarded VALUES (NEW.n, md5(NEW.word)); RETURN NULL; END$$"
        )
        connection.execute("CREATE TEMP TABLE large (n int, word text)")
        connection.execute(
            "CREATE TRIGGER discard BEFORE INSERT ON large FOR EACH ROW EXECUTE FUNCTION pg_temp.discard()"
        )
        hashed = hashlib.sha256()
        size = 0
        words = f"SELECT n, repeat(md5((n + {seed})::text), {_ROW // 32}) FROM generate_series(1, {rows}) AS n"
        with connection.cursor() as cursor, cursor.copy(f"COPY ({words}) TO STDOUT") as out:
            for block in out:
                hashed.update(block)
                size += len(block)
        print("out", rows, size, hashed.hexdigest(), flush=True)
        with connection.cursor() as cursor, cursor.copy("COPY large FROM STDIN") as into:
            for n in range(rows):
                into.write(f"{n}\t{hashlib.md5(str(n + seed).encode()).hexdigest() * (_ROW // 32)}\n".encode())
        print(
            "in", connection.execute("SELECT count(*), md5(string_agg(sum, '' ORDER BY n)) FROM discarded").fetchone()
        )
        row = connection.execute("SELECT repeat($1, $2)", ("x", _VALUE), binary=True).fetchone()
        print("row", row is not None and hashlib.sha256(row[0].encode()).hexdigest())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
