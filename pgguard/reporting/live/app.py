"""What is answered to which request.

===========================  =======================================================================================
``/``                        the live page, and the files that it consists of
``/login``                   the form that takes the token, where one is needed
``/api/sessions``            the sessions that are open, some at a time
``/api/faults``              what has been recorded lately, in its order
``/api/causes``              the causes of that, the gravest first
``/api/figures``             what the guard has done so far, in numbers
``/api/events``              what is new, as server-sent events: ``fault``, ``figures``; ``gap`` where some are missing
``/api/schema.json``         what these answers look like: a JSON Schema
``/causes/N``                one cause as the report tells it, a part of the page
``/report.html``             the whole report
``/metrics``                 what the guard has done so far, for Prometheus
``/healthz``                 whether the relay goes round, and whether a client that comes now is let in; for one of
                             both ``/healthz/live`` and ``/healthz/ready``
===========================  =======================================================================================

Everything can be had by GET, and nothing changes anything. There is no script in the page itself, and no style: what a
browser takes is from here, and it asks nobody else (Content-Security-Policy).
"""

from __future__ import annotations

import time
from functools import cache
from importlib import resources
from importlib.metadata import version
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs

import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from pgguard.proxy.overview import Order, Wanted
from pgguard.reporting import page
from pgguard.reporting.live.access import COOKIE
from pgguard.reporting.live.api import (
    causes_record,
    faults_json,
    figures_record,
    servers_record,
    sessions_json,
    to_json,
)
from pgguard.reporting.live.asking import Asked, Guarded
from pgguard.reporting.live.events import Events
from pgguard.reporting.metrics import STATES, exposition
from pgguard.reporting.page import environment
from pgguard.reporting.page.explanations import GLOSSARY
from pgguard.reporting.record import session_record

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from starlette.requests import Request

    from pgguard.reporting.live.access import Access
    from pgguard.reporting.live.api import Watched
    from pgguard.reporting.live.feed import Feed

_DEFAULT: Final = 100
_SESSIONS: Final = 500
_FAULTS: Final = 1000
"""Sessions, and faults, that are told at once, at most."""
_FORM: Final = 8192
"""Bytes of the form with the token, at most."""
_PATIENCE: Final = 5.0
"""Seconds for its sender to send it."""
_ROUND: Final = 2.0
"""Seconds for the relay to come round."""
_STATES: Final = {state: activity for activity, state in STATES.items()}
_JSON: Final = "application/json"
_TYPES: Final = {
    "live.css": "text/css; charset=utf-8",
    "live.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "schema.json": "application/schema+json",
}


class Site:
    """Answers requests about one guard.

    Args:
        guard: What is known of it.
        feed: What is new.
        access: Who may see it.
        hosts: What requests may call this host.
        started_at: When the guard was started, in seconds since the epoch.
    """

    def __init__(self, guard: Watched, feed: Feed, access: Access, hosts: Sequence[str], *, started_at: float) -> None:
        self._guard = guard
        self._feed = feed
        self._access = access
        self._started_at = started_at
        self._drawing = trio.CapacityLimiter(1)
        """Threads that draw: they take turns with the relay in the interpreter."""
        routes = {
            "/": self._page,
            "/static/{name}": self._file,
            "/api/sessions": self._sessions,
            "/api/faults": self._faults,
            "/api/causes": self._causes,
            "/api/figures": self._figures,
            "/api/events": self._events,
            "/api/schema.json": self._schema,
            "/causes/{number:int}": self._cause,
            "/report.html": self._report,
            "/metrics": self._metrics,
            "/healthz": self._healthz,
            "/healthz/live": self._live,
            "/healthz/ready": self._ready,
        }
        self.app = Starlette(
            routes=[
                *(Route(path, endpoint, methods=["GET"]) for path, endpoint in routes.items()),
                Route("/login", self._login, methods=["GET", "POST"]),
            ],
            middleware=[
                Middleware(Guarded, access=access),
                Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
            ],
        )

    # The page

    async def _page(self, _: Request) -> Response:
        return Response(_document(), media_type="text/html")

    async def _file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name == "report.css":
            return Response(page.style_sheet(), media_type="text/css")
        if name not in _TYPES:
            raise HTTPException(404)
        return Response(_static(name), media_type=_TYPES[name])

    async def _login(self, request: Request) -> Response:
        if self._access.is_open:
            return RedirectResponse("/", 303)
        if request.method == "GET":
            return Response(_login_form(has_failed=False), media_type="text/html")
        token = parse_qs((await _form(request)).decode("ascii", "replace")).get("token", [""])[0]
        if not self._access.knows(token.strip()):
            return Response(_login_form(has_failed=True), 403, media_type="text/html")
        response = RedirectResponse("/", 303)
        response.set_cookie(COOKIE, self._access.cookie, httponly=True, samesite="strict", path="/")
        return response

    async def _cause(self, request: Request) -> Response:
        number = request.path_params["number"]
        cause = self._feed.gatherer.cause_of(number)
        if cause is None:
            raise HTTPException(404, "there is no such cause, or its record isn't kept any more")
        return Response(await self._draw(lambda: page.card_html(number, cause)), media_type="text/html")

    async def _report(self, _: Request) -> Response:
        recording = self._feed.gatherer.recording()
        html = await self._draw(lambda: page.html_report(recording, stylesheet="static/report.css"))
        return Response(html, media_type="text/html")

    async def _draw(self, draw: Callable[[], str]) -> str:
        return await trio.to_thread.run_sync(draw, limiter=self._drawing, abandon_on_cancel=True)

    # The API

    async def _sessions(self, request: Request) -> Response:
        asked = Asked(request, "limit", "order", "state", "cause", "search", "after")
        wanted = Wanted(
            limit=_or(asked.number("limit", most=_SESSIONS), _DEFAULT),
            order=asked.one_of("order", {order.value: order for order in Order}, Order.OLDEST),
            activity=asked.one_of("state", {**_STATES}, None),
            cause=asked.number("cause"),
            search=asked.text("search")[:200],
            behind=asked.number("after") or 0,
        )
        at = time.time()
        seen = await self._guard.overview(wanted)
        cause = None if wanted.cause is None else self._feed.cause(wanted.cause)
        ended = []
        if cause is not None:
            shown = {one.session.facts.id for one in seen.sessions}
            ended = [session_record(facts) for facts in cause.sessions.values() if facts.id not in shown]
        return Response(await sessions_json(seen, at, ended), media_type=_JSON)

    async def _faults(self, request: Request) -> Response:
        asked = Asked(request, "limit", "after", "cause", "newest")
        limit = _or(asked.number("limit", most=_FAULTS), _DEFAULT)
        newest = asked.one_of("newest", {"1": True, "0": False}, default=False)
        behind = self._feed.place_of(asked.text("after"))
        told, more = self._feed.records(behind=behind, limit=limit, cause=asked.number("cause"), newest=newest)
        return Response(faults_json(told, self._feed, more=more), media_type=_JSON)

    async def _causes(self, request: Request) -> Response:
        Asked(request)
        return Response(to_json(causes_record(self._guard.causes(), self._feed)), media_type=_JSON)

    async def _figures(self, request: Request) -> Response:
        Asked(request)
        return Response(await self.figures(), media_type=_JSON)

    async def figures(self) -> bytes:
        """What the guard has done so far, in one line of JSON."""
        guard = self._guard
        return to_json(figures_record(await guard.figures(), guard.counts(), guard.fronts, guard.lost_records))

    async def _events(self, request: Request) -> Response:
        asked = Asked(request, "after")
        if request.method == "HEAD":
            told = Response(media_type=Events.media_type)
            del told.headers["content-length"]  # there is no telling
            return told
        if self._feed.is_full:
            raise HTTPException(503, "too many follow already", {"retry-after": "10"})
        last = request.headers.get("last-event-id") or asked.text("after") or None
        return Events(self._feed, last, self._guard)

    async def _schema(self, _: Request) -> Response:
        return Response(_static("schema.json"), media_type=_TYPES["schema.json"])

    # For machines

    async def _metrics(self, request: Request) -> Response:
        media_type, body = exposition(
            request.headers.get("accept", ""),
            await self._guard.figures(),
            self._guard.counts(),
            started_at=self._started_at,
            lost_records=self._guard.lost_records,
            missing=[capability.name for capability in self._guard.missing],
        )
        return Response(body, headers={"content-type": media_type})

    async def _healthz(self, _: Request) -> Response:
        return await self._health(live=True, ready=True)

    async def _live(self, _: Request) -> Response:
        return await self._health(live=True, ready=False)

    async def _ready(self, _: Request) -> Response:
        return await self._health(live=False, ready=True)

    async def _health(self, *, live: bool, ready: bool) -> Response:
        """Whether all is well that is asked for."""
        is_live = False
        with trio.move_on_after(_ROUND):
            await self._guard.go_round()
            is_live = True
        why = self._guard.why_not_ready()
        told = {
            "live": is_live,
            "ready": why is None,
            "why_not_ready": why,
            "servers": servers_record(self._guard.fronts, self._guard.server_answers),
        }
        is_well = (is_live or not live) and (why is None or not ready)
        return Response(to_json(told), 200 if is_well else 503, media_type=_JSON)


def _or(number: int | None, default: int) -> int:
    return default if number is None else number


async def _form(request: Request) -> bytes:
    """The body of a request that is a form. Raises HTTPException: it is too long, or doesn't come."""
    body = b""
    with trio.move_on_after(_PATIENCE):
        has_more = True
        while has_more:
            message = await request.receive()
            body += message.get("body", b"")
            has_more = message.get("more_body", False)
            if len(body) > _FORM:
                raise HTTPException(413)
        return body
    raise HTTPException(408)


@cache
def _static(name: str) -> bytes:
    return (resources.files(__package__) / "static" / name).read_bytes()


@cache
def _document() -> str:
    return environment(__package__).get_template("live.html").render(version=version("pgguard"), glossary=GLOSSARY)


@cache
def _login_form(*, has_failed: bool) -> str:
    return environment(__package__).get_template("login.html").render(has_failed=has_failed)
