"""Tests that ask the database: run by pytest, in two workers."""

from __future__ import annotations

import os

import psycopg
import pytest


@pytest.mark.parametrize("number", range(4))
def test_an_answer(number: int) -> None:
    with psycopg.connect(os.environ["DATABASE_URL"]) as connection:
        assert connection.execute("SELECT %s::int", [number]).fetchone() == (number,)
