"""Ask a guard whether it is there: an SSLRequest, which it answers with one byte, without bothering the server.

It says goodbye, so that it isn't taken for a client that leaves because there is no TLS.

Exits with 0 when the guard at ``PGGUARD_LISTEN`` answers, and with 1 and a line that says why when it doesn't.
The protocol is in PostgreSQL's documentation, chapter "Message Flow", section "SSL Session Encryption".
"""

from __future__ import annotations

import os
import socket
import struct
import sys

SSL_REQUEST = struct.pack("!II", 8, 80877103)
TERMINATE = b"X\0\0\0\4"
SECONDS = 2.0


def main() -> str | None:
    """Return what is wrong, or None."""
    host, _, port = os.environ["PGGUARD_LISTEN"].rpartition(":")
    address = ("127.0.0.1" if host == "0.0.0.0" else host.strip("[]"), int(port))  # noqa: S104 - where to ask, nothing is bound
    try:
        with socket.create_connection(address, SECONDS) as connection:
            connection.sendall(SSL_REQUEST)
            answer = connection.recv(1)
            connection.sendall(TERMINATE)
    except OSError as error:
        return f"{address}: {error}"
    return None if answer in {b"N", b"S"} else f"{address}: answered {answer!r} to SSLRequest"


if __name__ == "__main__":
    sys.exit(main())
