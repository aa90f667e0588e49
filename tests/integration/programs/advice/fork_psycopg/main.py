"""A child that works with what is connected."""

import os

import app


def work():
    for number in range(10):
        asked = app.connection.execute("SELECT %s FROM pg_sleep(0.05)", [number])
        assert asked.fetchone() == (number,)


if os.fork() == 0:
    try:
        # here goes the advice, task.py, in the place of
        work()
        # up to here
    finally:
        os._exit(0)
os.wait()
work()
app.connection.close()
