"""A Celery application whose tasks ask the database; its broker is a directory."""

from __future__ import annotations

import os
from pathlib import Path

import psycopg
from celery import Celery

directory = Path(os.environ["TASKS"])
for name in ("messages", "control", "results"):
    (directory / name).mkdir(parents=True, exist_ok=True)
app = Celery("tasks", broker="filesystem://", backend=f"file://{directory / 'results'}")
app.conf.broker_transport_options = {
    "data_folder_in": str(directory / "messages"),
    "data_folder_out": str(directory / "messages"),
    "control_folder": str(directory / "control"),
}
app.conf.worker_hijack_root_logger = False


@app.task
def ask(number: int) -> int:
    with psycopg.connect(os.environ["DATABASE_URL"]) as connection:
        row = connection.execute("SELECT %s::int", [number]).fetchone()
    assert row is not None
    return int(row[0])
