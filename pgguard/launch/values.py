"""All addresses of PostgreSQL in the value of a variable, in whichever of the notations that there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgguard.launch.json_text import json_connections
from pgguard.launch.strings import driver_string, libpq_string, places
from pgguard.launch.urls import urls

if TYPE_CHECKING:
    from pgguard.launch.connection import Connection


def connections(value: str, name: str = "", *, sure: bool = False) -> list[Connection]:
    """The addresses in a value, in order; none if it holds none, or none of PostgreSQL's.

    Args:
        value: The whole of it.
        name: What the variable is called.
        sure: It is known to be PostgreSQL's, where that isn't plain from the value.
    """
    found = json_connections(value, lambda text: _plain(text, name, sure=sure))
    return _plain(value, name, sure=sure) if found is None else found


def _plain(value: str, name: str, *, sure: bool) -> list[Connection]:
    if found := list(urls(value)):
        return found
    one = libpq_string(value, sure=sure) or driver_string(value, name=name, sure=sure)
    return list(places(value)) if one is None else [one]
