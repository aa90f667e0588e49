"""Connects as soon as it is imported, before the workers are forked."""

import os

import psycopg2

dsn = os.environ["DATABASE_URL"]
connection = psycopg2.connect(dsn)
connection.autocommit = True


def application(environ, start_response):
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("SELECT %s", [int(environ["QUERY_STRING"])])
        [answer] = cursor.fetchone()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(answer).encode()]
