"""A small driver that has a thread of its own read all answers, and the others wait for it; without libpq.

Two threads ask: in turn, holding a lock until the answer is there, or pipelined, so that requests overlap, as the
argument says. Says the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import struct
import sys
import threading
import time

ROUNDS = 3


class Connection:
    """Answers go to whoever has asked, in order."""

    def __init__(self) -> None:
        host, port = os.environ["PGHOST"], int(os.environ["PGPORT"])
        if host.startswith("/"):
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(f"{host}/.s.PGSQL.{port}")
        else:
            self._socket = socket.create_connection((host, port))
        self._lock = threading.Lock()
        ready: queue.Queue[None] = queue.Queue()
        self._waiting = [ready]
        threading.Thread(target=self._read, daemon=True).start()
        body = struct.pack("!I", 196608) + f"user\0{os.environ['PGUSER']}\0\0".encode()
        self._socket.sendall(struct.pack("!I", 4 + len(body)) + body)
        ready.get()

    def send(self, sql: str) -> queue.Queue[None]:
        answer: queue.Queue[None] = queue.Queue()
        body = sql.encode() + b"\0"
        with self._lock:
            self._waiting.append(answer)
            self._socket.sendall(b"Q" + struct.pack("!I", 4 + len(body)) + body)
        return answer

    def close(self) -> None:
        self._socket.sendall(b"X\0\0\0\4")
        self._socket.close()

    def _read(self) -> None:
        data = b""
        with contextlib.suppress(OSError):
            while block := self._socket.recv(65536):
                data += block
                while len(data) > 4 and len(data) > (length := struct.unpack_from("!I", data, 1)[0]):
                    if data[:1] == b"Z":
                        with self._lock:
                            self._waiting.pop(0).put(None)
                    data = data[1 + length :]


def main(pipelined: bool) -> None:
    connection = Connection()
    time.sleep(0.5)
    turn = contextlib.nullcontext() if pipelined else threading.Lock()

    def work() -> None:
        for _ in range(ROUNDS):
            with turn:
                connection.send("SELECT pg_sleep(0.3)").get()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    connection.close()
    print(json.dumps({"pid": os.getpid()}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1] == "pipelined")
