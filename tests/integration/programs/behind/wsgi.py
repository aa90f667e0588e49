"""A WSGI application that asks the database for what each request asks for, and where it is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import psycopg

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse, WSGIEnvironment


def application(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    with psycopg.connect(os.environ["DATABASE_URL"]) as connection:
        answer = connection.execute("SELECT %s", [environ["QUERY_STRING"]]).fetchone()
    start_response("200 OK", [("Content-Type", "text/plain")])
    assert answer is not None
    return [str(answer[0]).encode()]
