r"""What a client says of itself: its ``application_name``, and comments that a library adds to its SQL.

Two forms of comments are understood, at the very beginning or the very end of a statement:

- sqlcommenter's, ``/*controller='users',pid='4867'*/``: keys and values are URL-encoded, values are quoted, and a quote
  within one is written ``\'``. Specified at https://google.github.io/sqlcommenter/spec/; Rails' QueryLogs write it when
  ``query_log_tags_format`` is ``:sqlcommenter``.
- the older one of Marginalia and QueryLogs, ``/*application:App,controller:users,action:show*/``: nothing is quoted;
  Sequel's plugin sql_comments writes the same as a comment to the end of the line,
  ``-- model:User,method_type:class,method:[]``.

Other comments (``/* fetch users */``), hints (``/*+ SeqScan(a) */``) and SQL that was commented out say nothing. SQL
is not parsed here, so a comment is believed only where nothing but a comment can be: one that touches the statement's
beginning or end is no part of a literal. Whatever is found here is merely claimed, and evidence of the weakest kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import unquote

_REACH = 4096
"""Bytes from either end of a statement that are looked at; comments are a few hundred long."""

_LINE = re.compile(rb" -- ([^'\"$\r\n]*)\n?\Z")
"""A comment to the end of a statement. With none of these signs in it, it isn't within a literal, which would have to
end behind it."""

_COMMENTS = 4
"""Comments in a row, at either end, that are looked at: Rails' own annotations come before its tags."""

_PAIRS = 64
"""Pairs of one comment that are kept."""

_BLANK = b" \t\n\r\f\v"
"""What PostgreSQL skips between tokens: ``space`` in ``src/backend/parser/scan.l``."""

_QUOTED = re.compile(rb"([\w.%~-]{1,128})='((?:[^'\\]|\\.)*)'(?:,|\Z)", re.ASCII | re.DOTALL)
_UNQUOTED = re.compile(rb"([A-Za-z_]\w{0,63}):([^\s,][^,]*)(?:,|\Z)", re.ASCII)
_ESCAPED = re.compile(rb"\\(.)", re.DOTALL)

SQLCOMMENTER_KEYS = frozenset(
    {"action", "application", "controller", "db_driver", "framework", "route", "traceparent", "tracestate"}
)
"""The keys that sqlcommenter's specification and its libraries define."""

SEQUEL_KEYS = frozenset({"association", "method", "method_type", "model"})
"""The keys of Sequel's plugin sql_comments: ``lib/sequel/plugins/sql_comments.rb``."""

RAILS_KEYS = frozenset(
    {
        "action",
        "application",
        "controller",
        "controller_with_namespace",
        "database",
        "db_host",
        "hostname",
        "job",
        "line",
        "namespaced_controller",
        "pid",
        "request_id",
        "socket",
        "source_location",
    }
)
"""The keys that Marginalia (``lib/marginalia/comment.rb``) and QueryLogs (``active_record/query_logs.rb`` and the
railties) define. Without quotes ``/*note:slow*/`` looks like theirs, so one of these has to be there."""


def declared(application_name: str | None, statements: Iterable[bytes]) -> Mapping[str, str]:
    """Gather what a client has said of itself on one connection. Does no I/O and raises nothing.

    Args:
        application_name: the setting of that name, if it is known.
        statements: SQL texts in the order of their sending, each complete: where one was cut off is not its end.

    Returns:
        The pairs of the latest statement that declares something, decoded, in its order; and ``application_name``,
        which a comment can't change. Values are what the client makes them, control characters included, and up to
        some kilobytes long. Empty if it says nothing.
    """
    latest: dict[str, str] = {}
    for statement in statements:
        latest = _comments_pairs(statement) or latest
    if application_name:
        latest["application_name"] = application_name
    return latest


def _comments_pairs(statement: bytes) -> dict[str, str]:
    """Return what a statement's comments declare; the one nearest to the end wins."""
    pairs: dict[str, str] = {}
    # Nearly all statements have no comment at either end, and this must cost them nothing.
    for comment in _leading_comments(statement):
        pairs |= _parse(comment)
    for comment in reversed(list(_trailing_comments(statement))):
        pairs |= _parse(comment)
    line = _LINE.search(statement[-_REACH:].rstrip(b"\0"))
    return pairs if line is None else pairs | _parse(line[1])


def _leading_comments(statement: bytes) -> Iterator[bytes]:
    """Yield the contents of the comments that it begins with."""
    text = statement[:_REACH]
    for _ in range(_COMMENTS):
        text = text.lstrip(_BLANK)
        end = text.find(b"*/", 2)
        # A comment within the comment would end first: PostgreSQL nests them.
        if not text.startswith(b"/*") or end < 0 or b"/*" in text[2:end]:
            return
        yield text[2:end]
        text = text[end + 2 :]


def _trailing_comments(statement: bytes) -> Iterator[bytes]:
    """Yield the contents of the comments that it ends with, the last one first."""
    text = statement[-_REACH:].rstrip(_BLANK + b";\0")
    for _ in range(_COMMENTS):
        start = text.rfind(b"/*", 0, -2)
        if not text.endswith(b"*/") or start < 0 or b"*/" in text[start + 2 : -2]:
            return
        before = text[:start]
        # Within a comment to the end of the line it is none, though what looks like one may be within a literal.
        if b"--" in before[before.rfind(b"\n") + 1 :]:
            return
        yield text[start + 2 : -2]
        text = before.rstrip(_BLANK + b";")


def _parse(comment: bytes) -> dict[str, str]:
    """Decode a comment that consists of pairs from its first byte to its last; empty for any other."""
    quoted = _split(_QUOTED, comment)
    if quoted is not None:
        return {_decode(key): _decode(_ESCAPED.sub(rb"\1", value)) for key, value in quoted}
    unquoted = _split(_UNQUOTED, comment)
    if unquoted is not None:
        pairs = {key.decode(): value.decode(errors="replace") for key, value in unquoted}
        if not (RAILS_KEYS | SEQUEL_KEYS).isdisjoint(pairs):
            return pairs
    return {}


def _split(pair: re.Pattern[bytes], comment: bytes) -> list[tuple[bytes, bytes]] | None:
    """Split a comment into its pairs; ``None`` if there is anything else in it, or too much."""
    pairs: list[tuple[bytes, bytes]] = []
    position = 0
    while position < len(comment):
        found = pair.match(comment, position)
        if found is None or len(pairs) == _PAIRS:
            return None
        pairs.append((found[1], found[2]))
        position = found.end()
    # A comma leads to another pair.
    return pairs if pairs and not comment.endswith(b",") else None


def _decode(text: bytes) -> str:
    return unquote(text.decode(errors="replace"), errors="replace")
