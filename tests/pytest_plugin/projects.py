"""What the projects of these tests are made of."""

from __future__ import annotations

MISDEEDS = r'''
"""What can be done wrong with a connection, each beside what is nearly the same and right."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg


def connect(**more):
    return psycopg.connect(os.environ["DATABASE_URL"], autocommit=True, **more)


def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(pid, 0)


def share(connection):
    """A child uses its parent's connection, and then the parent does."""
    in_child(lambda: connection.execute("select 'child'"))
    connection.execute("select 'parent'")


def share_with_child():
    with connect() as connection:
        share(connection)


def give_child_its_own():
    def work():
        with connect() as own:
            own.execute("select 'child'")

    with connect() as connection:
        in_child(work)
        connection.execute("select 'parent'")


def share_between_threads():
    """A thread sends its request while the answer to another's is outstanding."""
    with connect() as connection:
        for sql in ("select pg_sleep(0.5)", "select 2"):
            thread = threading.Thread(target=os.write, args=(connection.fileno(), query(sql)))
            thread.start()
            thread.join()
        read_answers(connection, 2)


def take_turns_in_threads():
    with connect() as connection, ThreadPoolExecutor(2) as pool:
        for n in range(4):
            pool.submit(connection.execute, f"select {n}").result()


def query(sql):
    return b"Q" + (len(sql) + 5).to_bytes(4, "big") + sql.encode() + b"\0"


def read_answers(connection, number):
    data = b""
    while data.count(b"Z\0\0\0\5I") < number:
        os.set_blocking(connection.fileno(), True)
        data += os.read(connection.fileno(), 65536)
    os.set_blocking(connection.fileno(), False)


def die_with_work_open():
    def work():
        connection = psycopg.connect(os.environ["DATABASE_URL"])
        connection.execute("create temporary table t ()")
        os._exit(0)

    in_child(work)
'''

RECORDER = '''
import json
import pathlib

import pytest

is_worker = False


def pytest_configure(config):
    global is_worker
    is_worker = hasattr(config, "workerinput")


def pytest_runtest_logreport(report):
    """Write down what is reported; pytest-xdist's workers report to another process."""
    if not is_worker:
        with pathlib.Path("reports.jsonl").open("a") as file:
            sections = [text for name, text in report.sections if "pgguard" in name]
            print(json.dumps([report.nodeid, report.when, report.outcome, str(report.longrepr), sections]), file=file)
'''
"""A conftest.py."""
