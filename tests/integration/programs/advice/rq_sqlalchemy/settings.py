"""For rq worker -c settings: many an application sets up its logging and the like here, and is imported for it."""

import os

import app  # noqa: F401 - is connected by this

REDIS_URL = os.environ["REDIS_URL"]
QUEUES = ["default"]
