"""A WSGI application that answers each request with what the request asks for, which takes the database.

Its pool has a connection as soon as it is imported: before the workers are forked, under ``gunicorn --preload``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sqlalchemy import URL, create_engine, text

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse, WSGIEnvironment

engine = create_engine(
    URL.create(
        "postgresql+psycopg2",
        os.environ["PGUSER"],
        database=os.environ["PGDATABASE"],
        query={"host": os.environ["PGHOST"], "port": os.environ["PGPORT"]},
    )
)
with engine.connect() as connection:
    connection.execute(text("SELECT 1"))


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    with engine.connect() as connection:
        answer = connection.execute(text("SELECT :asked"), {"asked": int(environ["QUERY_STRING"])}).scalar_one()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(answer).encode()]
