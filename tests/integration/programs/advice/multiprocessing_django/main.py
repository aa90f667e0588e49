"""Several children work at what their parent hands them, each through django.db, which is connected when they start."""

import multiprocessing

import site_settings  # noqa: F401 - configures Django
from django.db import connection


def ask(number):
    with connection.cursor() as cursor:
        cursor.execute("SELECT %s FROM pg_sleep(0.05)", [number])
        [answer] = cursor.fetchone()
    return answer


def task(numbers):
    def work():
        for number in numbers:
            assert ask(number) == number

    # here goes the advice, task.py, in the place of
    work()
    # up to here


# here goes the advice, main.py
ask(1)
processes = [multiprocessing.Process(target=task, args=(range(n, n + 10),)) for n in (10, 20)]
for process in processes:
    process.start()
for process in processes:
    process.join()
ask(1)
connection.close()
