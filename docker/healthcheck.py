"""Ask a guard whether it is there: an SSLRequest, which it answers with one byte, without bothering the server.

It is asked wherever it listens: at ``PGGUARD_LISTEN``, or at what its configuration file says, of all databases, or at
its default. It says goodbye, so that it isn't taken for a client that leaves because there is no TLS.

Exits with 0 when the guard answers everywhere, and with 1 and a line that says why when it doesn't.
The protocol is in PostgreSQL's documentation, chapter "Message Flow", section "SSL Session Encryption".
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import tomllib
from pathlib import Path

SSL_REQUEST = struct.pack("!II", 8, 80877103)
TERMINATE = b"X\0\0\0\4"
SECONDS = 2.0
DEFAULT = "127.0.0.1:6544"
ANY = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - where to ask, nothing is bound


def listeners() -> list[str]:
    """Where it listens, as it is told."""
    given = os.environ.get("PGGUARD_LISTEN", "").split()
    if given:
        return given
    config = tomllib.loads(Path(os.environ["PGGUARD_CONFIG"]).read_text())
    said = [table.get("listen", DEFAULT) for table in config.get("databases") or [config]]
    return [address for one in said for address in ([one] if isinstance(one, str) else one)]


def connect(listener: str) -> socket.socket:
    """Connect to it. Raises OSError."""
    first, _, port = listener.rpartition(":")
    if not listener.startswith("unix:"):
        return socket.create_connection((ANY.get(first, first).strip("[]"), int(port)), SECONDS)
    directory, port = (first.removeprefix("unix:"), port) if first != "unix" else (port, "5432")
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(SECONDS)
    try:
        connection.connect(f"{directory}/.s.PGSQL.{port}")
    except BaseException:
        connection.close()
        raise
    return connection


def main() -> str | None:
    """Return what is wrong, or None."""
    for listener in listeners():
        try:
            with connect(listener) as connection:
                connection.sendall(SSL_REQUEST)
                answer = connection.recv(1)
                connection.sendall(TERMINATE)
        except OSError as error:
            return f"{listener}: {error}"
        if answer not in {b"N", b"S"}:
            return f"{listener}: answered {answer!r} to SSLRequest"
    return None


if __name__ == "__main__":
    sys.exit(main())
