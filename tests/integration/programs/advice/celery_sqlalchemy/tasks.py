"""A Celery application that gives itself something to do when it is ready."""

import os
import sys

from app import engine
from celery import Celery
from celery.signals import worker_ready
from sqlalchemy import text

app = Celery("tasks", broker="memory://", backend="disabled://")
app.conf.worker_prefetch_multiplier = 1

# here goes the advice


@app.task
def ask(number):
    with engine.connect() as connection:
        answer = connection.execute(text("SELECT :asked FROM pg_sleep(0.1)"), {"asked": number}).scalar_one()
    print(f"asked {number}: {answer} by {os.getpid()}", file=sys.__stderr__, flush=True)


@worker_ready.connect
def begin(**_):
    for number in range(10):
        ask.delay(number)
