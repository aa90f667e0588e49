"""Connects as soon as it is imported."""

import os

import psycopg

conninfo = os.environ["DATABASE_URL"]
connection = psycopg.connect(conninfo, autocommit=True)

# here goes the advice, db.py
