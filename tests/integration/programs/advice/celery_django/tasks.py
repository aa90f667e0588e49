"""A Celery application that gives itself something to do when it is ready, through django.db."""

import os
import sys

import site_settings  # noqa: F401
from celery import Celery
from celery.signals import worker_ready
from django.db import connection

app = Celery("tasks", broker="memory://", backend="disabled://")
app.conf.worker_prefetch_multiplier = 1

# here goes the advice


def query(number):
    with connection.cursor() as cursor:
        cursor.execute("SELECT %s FROM pg_sleep(0.1)", [number])
        [answer] = cursor.fetchone()
    return answer


query(1)


@app.task
def ask(number):
    print(f"asked {number}: {query(number)} by {os.getpid()}", file=sys.__stderr__, flush=True)


@worker_ready.connect
def begin(**_):
    for number in range(10):
        ask.delay(number)
