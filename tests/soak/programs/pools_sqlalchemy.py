"""SQLAlchemy's pool, with the driver that the argument names."""

from __future__ import annotations

import sys
from typing import Any

import sqlalchemy

from tests.soak.programs.playing import Step, digest, with_marks
from tests.soak.programs.pooling import SIZE, in_threads, lists_of


def sqlalchemy_threads(driver: str) -> None:
    engine = sqlalchemy.create_engine(f"postgresql+{driver}://", pool_size=SIZE, max_overflow=2, pool_timeout=120)

    def do(step: Step) -> object:
        try:
            with engine.connect() as connection:
                got: list[Any] = []
                for values in lists_of(step):
                    result = connection.exec_driver_sql(with_marks(step["sql"], "%s"), tuple(values))
                    got.append(digest(result) if result.returns_rows else result.rowcount)
                connection.commit()
                return got
        except sqlalchemy.exc.DBAPIError as error:
            return getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)

    try:
        in_threads(do)
    finally:
        engine.dispose()


if __name__ == "__main__":
    sqlalchemy_threads(sys.argv[1])
