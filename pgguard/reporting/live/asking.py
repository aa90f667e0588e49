"""What is asked for, and by whom: requests are looked at here before they are answered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from pgguard.reporting.live.access import Access

T = TypeVar("T")

_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_FOR_EVERYBODY: Final = ("/healthz", "/login", "/static/")
"""What needs no token, and what stands below these: nothing is told there of anybody."""
_SAFE: Final = frozenset({"GET", "HEAD"})
_DIGITS: Final = 15


class Guarded:
    """Answers nobody who may not see it, and says to browsers what they may do with an answer."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # before it is accepted: that is 403
        if scope["type"] != "http":
            return

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        refusal = self._refusal(Request(scope))
        await (self._app if refusal is None else refusal)(scope, receive, send_on)

    def _refusal(self, request: Request) -> Response | None:
        """What is said to who may not see what it asks for; ``None`` if it may."""
        site, mode = request.headers.get("sec-fetch-site"), request.headers.get("sec-fetch-mode")
        if site in ("cross-site", "same-site") and mode != "navigate":
            return PlainTextResponse("asked for by another site's page", 403)
        if request.method not in _SAFE and request.headers.get("origin") not in (None, _origin(request)):
            return PlainTextResponse("sent by another site's page", 403)
        path: str = request.scope["path"]  # as it is routed by: an address would be made of the Host header, too
        if path.startswith(_FOR_EVERYBODY) or self._access.admits(
            request.headers.get("authorization"), request.cookies
        ):
            return None
        if path == "/":
            return RedirectResponse("/login", 303)
        return PlainTextResponse(
            "the token is needed: Authorization: Bearer TOKEN", 401, {"www-authenticate": 'Bearer realm="pgguard"'}
        )


def _origin(request: Request) -> str:
    return f"{request.url.scheme}://{request.headers.get('host')}"


class Asked:
    """What stands in a request's query: an :class:`HTTPException` says what is wrong with it.

    Args:
        request: The request.
        names: What may stand there.
    """

    def __init__(self, request: Request, *names: str) -> None:
        self._query: Mapping[str, str] = request.query_params
        for name in self._query:
            if name not in names:
                known = f"there are {', '.join(names)}" if names else "there are none here"
                raise HTTPException(400, f"there is no such parameter: {known}")

    def text(self, name: str) -> str:
        """A text; an empty one if it isn't there."""
        return self._query.get(name, "")

    def number(self, name: str, *, most: int | None = None) -> int | None:
        """A number from 0 on; ``None`` if it isn't there."""
        text = self._query.get(name)
        if text is None:
            return None
        is_number = text.isascii() and text.isdigit() and len(text) <= _DIGITS
        if not is_number or (most is not None and int(text) > most):
            raise HTTPException(400, f"{name} should be a number from 0" + ("" if most is None else f" to {most}"))
        return int(text)

    def one_of(self, name: str, choices: Mapping[str, T], default: T) -> T:
        """What a name stands for."""
        text = self._query.get(name)
        if text is None:
            return default
        if text not in choices:
            raise HTTPException(400, f"{name} should be one of {', '.join(choices)}")
        return choices[text]
