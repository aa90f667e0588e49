"""libpq leaves a Parse behind when its Bind can't be sent, and is asked a simple query then."""

from __future__ import annotations

import resource
from pathlib import Path

import psycopg

_LARGE = 64 << 20
"""Bytes of a parameter that there is no memory to send."""
_SPARE = 16 << 20


def main() -> None:
    with psycopg.connect("", autocommit=True) as connection:
        libpq = connection.pgconn
        parameter = bytes(_LARGE)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _SPARE, limit[1]))
        try:
            libpq.send_query_params(b"SELECT $1::bytea", [parameter], param_formats=[1])
        except psycopg.OperationalError as error:
            assert "memory" in str(error), error  # noqa: PT017
        else:
            raise AssertionError("there was memory enough")
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limit)
        for _ in range(2):
            result = libpq.exec_(b"SELECT 7")
            assert result.get_value(0, 0) == b"7", result.error_message


if __name__ == "__main__":
    main()
