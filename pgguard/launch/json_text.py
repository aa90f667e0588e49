"""Addresses of PostgreSQL in JSON, as platforms hand them to their applications: in strings, and as host and port."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pgguard.launch.connection import Connection, edited
from pgguard.launch.pairs import led_pair, pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pgguard.launch.connection import Edit
    from pgguard.launch.pairs import Pair
    from pgguard.proxy.addresses import Address

_TOKEN: Final = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+', re.DOTALL)

Span = tuple[int, int]


def json_connections(text: str, read: Callable[[str], list[Connection]]) -> list[Connection] | None:
    """The addresses in a text that is a JSON object or array; ``None`` if it isn't.

    Args:
        text: All of it.
        read: Finds addresses in a string.
    """
    if text.lstrip()[:1] not in {"{", "["}:
        return None
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return None
    return list(_walk(text, read))


def _walk(text: str, read: Callable[[str], list[Connection]]) -> Iterator[Connection]:
    objects: list[dict[str, Span] | None] = []
    """Those that are open, each with its members that are no objects; ``None`` for an array."""
    name: str | None = None
    before = ""
    for token in _TOKEN.finditer(text):
        mark = token.group()
        if mark in {"{", "["}:
            objects.append({} if mark == "{" else None)
            name = None
        elif mark in {"}", "]"}:
            members = objects.pop()
            if members:
                yield from _pairs(text, members)
        elif mark in {",", ":"}:
            name = name if mark == ":" else None
        elif objects and objects[-1] is not None and name is None and before != ":":
            name = str(json.loads(mark))
        else:
            if objects and (members := objects[-1]) is not None and name is not None:
                members[name] = token.span()
                name = None
            if mark.startswith('"'):
                yield from _in_string(text, token.span(), read)
        before = mark


def _in_string(text: str, span: Span, read: Callable[[str], list[Connection]]) -> Iterator[Connection]:
    start, end = span
    raw = text[start:end]
    plain = str(json.loads(raw))

    def outside(edits: list[Edit]) -> list[Edit]:
        if "\\" not in raw:
            return [(start + 1 + a, start + 1 + b, json.dumps(said)[1:-1]) for a, b, said in edits]
        return [(start, end, _encoded(edited(plain, edits), raw))] if edits else []

    for found in read(plain):

        def lead(to: Address, also: Mapping[str, str], found: Connection = found) -> list[Edit]:
            return outside(found.lead(to, also))

        def pin(addresses: Sequence[Address], found: Connection = found) -> list[Edit]:
            return outside(found.pin(addresses))

        yield replace(found, lead=lead, pin=pin)
        if "\\" in raw:
            return  # what is written anew as a whole can be so once


def _encoded(value: str, before: str) -> str:
    """A string as JSON, with slashes escaped if they were."""
    written = json.dumps(value, ensure_ascii=before.isascii())
    return written.replace("/", "\\/") if "\\/" in before else written


def _pairs(text: str, members: dict[str, Span]) -> Iterator[Connection]:
    """Hosts and ports that are members of one object."""
    raw = {name: text[start:end] for name, (start, end) in members.items()}
    values = {name: str(json.loads(one)) if one.startswith('"') else one for name, one in raw.items()}
    for pair in pairs(values):

        def lead(to: Address, _: Mapping[str, str], pair: Pair = pair) -> list[Edit]:
            return [
                (*members[name], _encoded(value, raw[name]) if raw[name].startswith('"') else value)
                for name, value in led_pair(values, pair, to).items()
            ]

        said = {"host": values[pair.host].strip("[]"), "port": values[pair.port]}
        yield Connection(said, lead, "object", own_defaults=True)
