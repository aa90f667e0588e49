"""What is new, as server-sent events ("Server-sent events" in the HTML standard)."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

import trio
from starlette.responses import Response, StreamingResponse

from pgguard.reporting.live.api import to_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Receive, Scope, Send

    from pgguard.reporting.live.api import Watched
    from pgguard.reporting.live.feed import Feed, Follower

_PING: Final = 15.0
"""Seconds after which a follower is sent something, though nothing is new: whatever stands in between may close what is
silent."""


@cache
def _version() -> str:
    return version("pgguard")


class Events(Response):
    """What is new, until the client goes, or is dropped.

    Args:
        feed: Where it is from.
        last: What the client got last; ``None`` for nothing.
        guard: Of which it is.
    """

    media_type = "text/event-stream"

    def __init__(self, feed: Feed, last: str | None, guard: Watched) -> None:
        super().__init__()
        self._feed = feed
        self._last = last
        hello = {
            "run": feed.run,
            "version": _version(),
            "servers": [
                {
                    "name": front.name,
                    "address": str(front.upstream),
                    "listening": [str(address) for address in front.addresses],
                }
                for front in guard.fronts
            ],
            "missing": [capability.name for capability in guard.missing],
        }
        self._hello = _spelled("hello", to_json(hello))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        with self._feed.followed(self._last) as follower:
            told = _Told(self._feed, follower, self._hello)
            await StreamingResponse(told, media_type=self.media_type)(scope, receive, send)


class _Told:
    """What a follower is told, as it is sent."""

    def __init__(self, feed: Feed, follower: Follower, first: bytes) -> None:
        self._feed = feed
        self._follower = follower
        self._first: bytes | None = first

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        with trio.move_on_after(_PING):
            event = await anext(self._follower)
            return _spelled(event.name, event.data, None if event.place is None else self._feed.identifier(event.place))
        return b": nothing new\n\n"


def _spelled(name: str, data: bytes, identifier: str | None = None) -> bytes:
    """One event, of which the data is one line."""
    head = f"event: {name}\n" if identifier is None else f"id: {identifier}\nevent: {name}\n"
    return b"%bdata: %b\n\n" % (head.encode(), data)
