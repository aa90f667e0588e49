"""The application's engine, which is connected as soon as this is imported."""

import os

from sqlalchemy import create_engine, text

engine = create_engine(os.environ["DATABASE_URL"].replace("postgresql:", "postgresql+psycopg2:"))
with engine.connect() as connection:
    connection.execute(text("SELECT 1"))
