"""A live page in the test's own process, in front of a guard whose client and server are in the test's hands."""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any

import h11
import jsonschema
import trio

from pgguard.proxy.addresses import TcpAddress
from pgguard.reporting.live.server import Admin
from pgguard.reporting.sinks import Fanout
from pgguard.running import Course, RunningGuard
from tests.proxy.conftest import House, running
from tests.proxy.fake_backend import FakeBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

SECONDS = 20.0
SCHEMA: dict[str, Any] = json.loads(
    (resources.files("pgguard.reporting.live") / "static" / "schema.json").read_text(encoding="utf-8")
)


def closed(schema: Any) -> Any:
    """A schema that allows no key that it doesn't tell of."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if "properties" in made:
        made["additionalProperties"] = False
    return made


def check(value: object, name: str) -> Any:
    """Fail unless a value is what the schema says of one by this name, and nothing more; returns it."""
    schema = {**closed(SCHEMA), "$ref": f"#/$defs/{name}"}
    jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker()).validate(value)
    return value


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self, name: str | None = None) -> Any:
        value = json.loads(self.body)
        return value if name is None else check(value, name)


class Stream:
    """A stream of events that is being read."""

    def __init__(self, stream: trio.SocketStream, connection: h11.Connection) -> None:
        self._stream = stream
        self._connection = connection
        self._rest = ""
        self.status = 0

    async def read(self) -> h11.Event:
        while (event := self._connection.next_event()) is h11.NEED_DATA:
            self._connection.receive_data(await self._stream.receive_some(65536))
        assert isinstance(event, h11.Event)
        return event

    async def next(self) -> dict[str, str] | None:
        """The next event: its fields; ``None`` at the end."""
        with trio.fail_after(SECONDS):
            while "\n\n" not in self._rest:
                event = await self.read()
                if isinstance(event, h11.Data):
                    self._rest += bytes(event.data).decode()
                elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
                    return None
        block, _, self._rest = self._rest.partition("\n\n")
        return dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))

    async def to_the_end(self) -> None:
        while await self.next() is not None:
            pass

    async def named(self, name: str) -> tuple[Any, dict[str, str]]:
        """The data of the next event of this name, and all its fields."""
        while True:
            event = await self.next()
            assert event is not None, f"no {name} has come"
            if event.get("event") == name:
                return json.loads(event["data"]), event


@dataclass
class LiveSite:
    house: House
    admin: Admin
    guard: RunningGuard
    port: int
    headers: dict[str, str] = field(default_factory=dict)

    async def ask(
        self, path: str, *, method: str = "GET", body: bytes = b"", host: str | None = None, **headers: str
    ) -> Answer:
        stream = await self._begin(path, method, body, host, headers)
        with trio.fail_after(SECONDS):
            response = await stream.read()
            assert isinstance(response, h11.Response)
            told = b""
            while isinstance(event := await stream.read(), h11.Data):
                told += bytes(event.data)
        await stream._stream.aclose()
        sent = {name.decode(): value.decode() for name, value in response.headers}
        return Answer(response.status_code, sent, told)

    async def _begin(self, path: str, method: str, body: bytes, host: str | None, headers: Mapping[str, str]) -> Stream:
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        connection = h11.Connection(h11.CLIENT)
        sent = {"host": host or f"127.0.0.1:{self.port}", "connection": "close"} | self.headers
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        if body:
            sent["content-length"] = str(len(body))
        request = h11.Request(method=method, target=path, headers=list(sent.items()))
        data = connection.send(request)
        assert data is not None
        await stream.send_all(data + (connection.send(h11.Data(body)) or b"" if body else b""))
        connection.send(h11.EndOfMessage())
        return Stream(stream, connection)

    @asynccontextmanager
    async def follow(self, query: str = "", **headers: str) -> AsyncIterator[Stream]:
        stream = await self._begin(f"/api/events{query}", "GET", b"", None, headers)
        with trio.fail_after(SECONDS):
            response = await stream.read()
        assert isinstance(response, h11.Response)
        stream.status = response.status_code
        try:
            yield stream
        finally:
            await stream._stream.aclose()


@asynccontextmanager
async def live_site(token_file: Path | None = None, *, backend: FakeBackend | None = None) -> AsyncIterator[LiveSite]:
    """Run a guard and its live page; leaving the context cancels both."""
    admin = Admin(TcpAddress("127.0.0.1", 0), token_file)
    await admin.listen()
    sinks = Fanout([admin.feed], complain=print)
    try:
        async with running(backend, sinks=sinks) as house, trio.open_nursery() as nursery:
            guard = RunningGuard(
                house.guard,
                house.docket,
                sinks,
                Course(nursery, trio.Event(), trio.Event()),
                addresses=[],
                missing=[],
                warnings=[],
            )
            nursery.start_soon(admin.serve, guard)
            yield LiveSite(house, admin, guard, admin.addresses[0].port)
            nursery.cancel_scope.cancel()
    finally:
        admin.close()
