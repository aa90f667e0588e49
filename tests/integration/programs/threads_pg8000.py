"""Two threads that use one connection of pg8000, which says that they may not share connections, without a lock.

One sends its query while the other waits for its answer, after a time that is long enough for the guard to have seen it
wait. They may even get each its own, if they read in that order. Says the process and both threads, in that order.
"""

from __future__ import annotations

import json
import os
import threading
import time

import pg8000.native


def main() -> None:
    host, port = os.environ["PGHOST"], int(os.environ["PGPORT"])
    where = {"unix_sock": f"{host}/.s.PGSQL.{port}"} if host.startswith("/") else {"host": host, "port": port}
    connection = pg8000.native.Connection(os.environ["PGUSER"], **where)
    threads = [threading.Thread(target=ask, args=(connection, delay), daemon=True) for delay in (0, 1)]
    for thread in threads:
        thread.start()
    first, second = (thread.native_id for thread in threads)
    print(json.dumps({"pid": os.getpid(), "first": first, "second": second}), flush=True)
    time.sleep(2.5)
    os._exit(0)


def ask(connection: pg8000.native.Connection, delay: float) -> None:
    time.sleep(delay)
    connection.run("SELECT pg_sleep(1.5)")


if __name__ == "__main__":
    main()
