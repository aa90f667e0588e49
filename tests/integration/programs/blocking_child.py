"""A connection of pg8000, whose socket blocks, that its child goes on to use; says parent and child.

Every wait of theirs is interrupted by signals, a thousand a second, whose handler does nothing.
"""

from __future__ import annotations

import json
import os
import signal

import pg8000.native


def main() -> None:
    signal.signal(signal.SIGALRM, lambda *_: None)
    host, port = os.environ["PGHOST"], int(os.environ["PGPORT"])
    connection = pg8000.native.Connection(os.environ["PGUSER"], host=host, port=port)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    for _ in range(20):
        connection.run("SELECT pg_sleep(0.005)")
    child = os.fork()
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    if child == 0:
        for _ in range(20):
            connection.run("SELECT pg_sleep(0.005)")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(json.dumps({"parent": os.getpid(), "child": child, "status": status}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
