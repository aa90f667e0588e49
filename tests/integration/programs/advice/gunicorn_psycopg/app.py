"""Connects as soon as it is imported, before the workers are forked."""

import os

import psycopg

conninfo = os.environ["DATABASE_URL"]
connection = psycopg.connect(conninfo)
connection.autocommit = True


def application(environ, start_response):
    connection.autocommit = True
    [answer] = connection.execute("SELECT %s", [int(environ["QUERY_STRING"])]).fetchone()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(answer).encode()]
