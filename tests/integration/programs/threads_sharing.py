"""Two threads that use one connection of psycopg's low-level interface, which has no lock.

Says its process and both threads' ids, as JSON, before it begins. Then anything may happen: answers are swapped, libpq
aborts, or a thread waits for ever for what the other has read; so it ends soon, whatever they do.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress

import psycopg
from psycopg import pq

ROUNDS = 2


def main() -> None:
    connection = pq.PGconn.connect(b"")
    announced = threading.Event()
    threads = [threading.Thread(target=ask, args=(connection, announced, delay), daemon=True) for delay in (0, 0.03)]
    for thread in threads:
        thread.start()
    first, second = (thread.native_id for thread in threads)
    print(json.dumps({"pid": os.getpid(), "first": first, "second": second}), flush=True)
    announced.set()
    time.sleep(0.4)
    os._exit(0)


def ask(connection: pq.abc.PGconn, announced: threading.Event, delay: float) -> None:
    announced.wait()
    time.sleep(delay)
    with suppress(psycopg.Error):
        for _ in range(ROUNDS):
            connection.exec_(b"SELECT pg_sleep(0.12)")


if __name__ == "__main__":
    main()
