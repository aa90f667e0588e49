"""A command behind ``pgguard run`` needs no TLS, whatever its variables demanded: the guard has it in its place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tests.tls.servers import PASSWORD

if TYPE_CHECKING:
    from tests.tls.servers import Papers, TlsServer

_SECONDS: Final = 60.0
PROGRAM: Final = """
import os, psycopg
with psycopg.connect(os.environ["DATABASE_URL"]) as connection:
    ask = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    print(bool(connection.pgconn.ssl_in_use), *connection.execute(ask).fetchone())
"""


def test_what_the_command_demanded_the_guard_demands(tls_server: TlsServer, papers: Papers, tmp_path: Path) -> None:
    """But for what only a client could: to bind the channel."""
    demands = f"sslmode=verify-full&sslrootcert={papers.ca}&channel_binding=require"
    url = f"postgresql://scram:{PASSWORD.replace(' ', '%20')}@localhost:{tls_server.tcp.port}/postgres?{demands}"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    for given, said in ((url, "False True\n"), (url.replace(str(papers.ca), str(papers.stranger.cert)), "")):
        done = subprocess.run(
            [sys.executable, "-m", "pgguard", "run", "--", sys.executable, "-c", PROGRAM],
            cwd=tmp_path,
            env=environ | {"DATABASE_URL": given, "PYTHONPATH": str(Path(__file__).parents[2])},
            check=False,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        assert done.stdout == said, done.stderr
        assert ("is not trusted" in done.stderr) is not bool(said), done.stderr
