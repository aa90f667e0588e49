"""Settings for gunicorn: a worker forgets the connections that it has inherited, and leaves them to the master."""

from __future__ import annotations


def post_fork(_arbiter: object, _worker: object) -> None:
    # Not before the master has loaded the application, from the directory that gunicorn has changed to.
    from gunicorn_app import engine  # type: ignore[import-not-found]  # noqa: PLC0415

    engine.dispose(close=False)
