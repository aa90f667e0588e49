"""Several children work at what their parent hands them, each through the engine."""

import multiprocessing

from app import engine
from sqlalchemy import text


def task(numbers):
    def work():
        for number in numbers:
            with engine.connect() as connection:
                asked = connection.execute(text("SELECT :asked FROM pg_sleep(0.05)"), {"asked": number})
                assert asked.scalar_one() == number

    # here goes the advice, task.py, in the place of
    work()
    # up to here


processes = [multiprocessing.Process(target=task, args=(range(n, n + 10),)) for n in (10, 20)]
for process in processes:
    process.start()
for process in processes:
    process.join()
engine.dispose()
