"""Its pool has a connection as soon as it is imported, before the workers are forked."""

import os

from sqlalchemy import create_engine, text

engine = create_engine(os.environ["DATABASE_URL"].replace("postgresql:", "postgresql+psycopg2:"))
with engine.connect() as connection:
    connection.execute(text("SELECT 1"))


def application(environ, start_response):
    with engine.connect() as connection:
        answer = connection.execute(text("SELECT :asked"), {"asked": int(environ["QUERY_STRING"])}).scalar_one()
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(answer).encode()]
