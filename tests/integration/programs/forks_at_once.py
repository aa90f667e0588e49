"""A parent that connects and at once forks, as many times as it is told, on a busy machine with many processes.

Each child does what the second argument says, ``query`` or ``terminate``, and ends; the parent keeps all connections.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psycopg2

if TYPE_CHECKING:
    from collections.abc import Iterator

SLEEPERS = 300
DESCRIPTORS = 200
"""That each of them has open: it takes as long to look at them as at several times as many processes."""


@contextmanager
def crowd() -> Iterator[None]:
    """Sleeping processes that have all just started, and a busy one for each processor."""
    descriptors = [os.dup(0) for _ in range(DESCRIPTORS)]
    for descriptor in descriptors:
        os.set_inheritable(descriptor, True)
    commands = [["sleep", "60"]] * SLEEPERS + [["sh", "-c", "while :; do :; done"]] * (os.cpu_count() or 1)
    processes = [subprocess.Popen(command, close_fds=False) for command in commands]
    for descriptor in descriptors:
        os.close(descriptor)
    try:
        yield
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.wait()


def main(times: int, action: str) -> None:
    connections = []
    children = []
    with crowd():
        for _ in range(times):
            connection = psycopg2.connect("")
            connections.append(connection)
            child = os.fork()
            if child == 0:
                if action == "terminate":
                    connection.close()
                else:
                    connection.cursor().execute("SELECT 1")
                os._exit(0)
            children.append(child)
            os.waitpid(child, 0)
    print(json.dumps({"parent": os.getpid(), "children": children}), flush=True)
    sys.stdin.readline()
    os._exit(0)  # what is left of the connections is nobody's any more


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
