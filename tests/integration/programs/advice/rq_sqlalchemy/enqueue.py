"""Gives the worker something to do."""

import os

from redis import Redis
from rq import Queue

queue = Queue(connection=Redis.from_url(os.environ["REDIS_URL"]))
for number in range(4):
    queue.enqueue("app.ask", number)
