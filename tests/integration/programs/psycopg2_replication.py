"""Logical replication with psycopg2: a COPY in both directions, with feedback, left from the client's side."""

from __future__ import annotations

import select
import time
from contextlib import closing

import psycopg2
import psycopg2.extras

SLOT = "pgguard_psycopg2"
ROWS = 20


def main() -> None:
    with closing(psycopg2.connect("")) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("CREATE TABLE replicated (n int PRIMARY KEY)")
            cursor.execute("CREATE PUBLICATION replicated FOR TABLE replicated")
            try:
                with closing(
                    psycopg2.connect("", connection_factory=psycopg2.extras.LogicalReplicationConnection)
                ) as stream:
                    replicate(stream, cursor)
            finally:
                drop_slot(cursor)
                cursor.execute("DROP PUBLICATION replicated")
                cursor.execute("DROP TABLE replicated")


def replicate(stream: psycopg2.extras.LogicalReplicationConnection, writer: psycopg2.extensions.cursor) -> None:
    reader = stream.cursor()
    reader.create_replication_slot(SLOT, output_plugin="pgoutput")
    reader.start_replication(
        slot_name=SLOT, options={"proto_version": "1", "publication_names": "replicated"}, decode=False
    )
    writer.execute("INSERT INTO replicated SELECT generate_series(1, %s)", (ROWS,))
    kinds: list[str] = []
    until = time.monotonic() + 20
    # The first byte of a message of pgoutput says what it is: Insert, Commit, …
    while "C" not in kinds and time.monotonic() < until:
        message = reader.read_message()
        if message is None:
            select.select([reader], [], [], 0.2)
            continue
        kinds.append(message.payload[:1].decode())
        reader.send_feedback(flush_lsn=message.data_start)  # type: ignore[no-untyped-call]  # stubs
    print("replicated", kinds.count("I"), "rows in", kinds.count("C"), "transaction")


def drop_slot(cursor: psycopg2.extensions.cursor) -> None:
    """Drop the slot, once the server has noticed that nobody reads it any more."""
    until = time.monotonic() + 20
    while True:
        try:
            cursor.execute("SELECT pg_drop_replication_slot(%s)", (SLOT,))
        except psycopg2.errors.ObjectInUse:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return


if __name__ == "__main__":
    main()
