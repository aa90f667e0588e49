"""The live page's server: what it answers, to whom, and what nobody can make it do."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import h11
import jsonschema
import pytest
import trio
from hypercorn.protocol import ProtocolWrapper

from pgguard.faults.fault import Spread
from pgguard.proxy.addresses import TcpAddress
from pgguard.proxy.errors import ConfigurationError
from pgguard.reporting.jsonl import encode
from pgguard.reporting.live import feed, server
from pgguard.reporting.live.access import Access, access_to, read_token
from pgguard.reporting.live.feed import Feed
from pgguard.reporting.live.server import Admin
from pgguard.session.verdicts import Kind
from tests.faults.samples import fault, verdict
from tests.proxy.conftest import until
from tests.proxy.fake_backend import FakeBackend, part
from tests.proxy.messages import query
from tests.reporting.live_site import SCHEMA, LiveSite, check, live_site
from tests.reporting.test_hostile_text import HOSTILE, hostile_faults
from tests.reporting.test_sequence import FORKED

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from hypercorn.events import Event

    from pgguard.faults.fault import Fault
    from pgguard.proxy.guard import Guard

TOKEN = "correct-horse-battery-staple"
SHARED = fault(story=FORKED, cause=1, run="a", id=1)


@pytest.fixture
async def backend() -> AsyncIterator[FakeBackend]:
    backend = FakeBackend()
    await backend.listen()
    yield backend
    await backend.close_all()


@pytest.fixture
async def site(backend: FakeBackend) -> AsyncIterator[LiveSite]:
    async with live_site(backend=backend) as site:
        yield site


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    return tmp_path / "token"


def of_causes(count: int, *, repeats: int = 0) -> Iterator[Fault]:
    """Faults of so many causes, and repeats of the first."""
    for n in range(1, count + 1):
        yield replace(SHARED, id=n, cause=n)
    for n in range(count + 1, count + repeats + 1):
        spread = Spread(n, 2, 3, SHARED.at)
        yield replace(SHARED, id=n, repeat_of=1, spread=spread, session=replace(SHARED.session, id=n))


class TestAnswers:
    def test_the_schema_is_one(self) -> None:
        jsonschema.Draft202012Validator.check_schema(SCHEMA)

    def test_every_record_is_what_the_schema_says(self) -> None:
        for one in (*of_causes(2, repeats=2), *(fault(verdict(kind)) for kind in Kind), *hostile_faults("\0<b>\udc80")):
            check(json.loads(encode(one)), "fault")

    async def test_sessions_say_who_they_are_and_what_they_do(self, site: LiveSite) -> None:
        client, backend = await site.house.session()
        other, _ = await site.house.session(unix=True)
        await client.send(query("select 'secret' from accounts"))
        await backend.expect(query("select 'secret' from accounts"))
        told = (await site.ask("/api/sessions")).json("sessions_response")
        assert (told["total"], told["matching"], told["open"]["busy"], told["open"]["idle"]) == (2, 2, 1, 1)
        first, second = told["sessions"]
        assert [one["session"]["id"] for one in (first, second)] == [1, 2]
        assert (first["state"], first["requests"]) == ("busy", 1)
        assert first["last_request"]["sql"] == "select $1 from accounts"
        assert first["last_request"]["state"] == "waiting"
        assert second["last_request"] is None
        assert second["session"]["transport"] == "unix"
        for asked, found in (
            ("state=busy", [1]),
            ("state=idle-in-transaction", []),
            ("order=newest", [2, 1]),
            ("order=waiting&limit=1", [1]),
            ("order=active", [1, 2]),
            ("after=1", [2]),
            ("search=127.0.0.1", [1]),
            ("search=nothing", []),
            ("cause=7", []),
        ):
            told = (await site.ask(f"/api/sessions?{asked}")).json("sessions_response")
            assert [one["session"]["id"] for one in told["sessions"]] == found, asked
        await part(client, backend)
        await other.close()

    async def test_a_cause_leads_to_its_sessions_also_to_those_that_are_over(self, site: LiveSite) -> None:
        for one in of_causes(2, repeats=3):
            site.admin.feed.record(one)
        told = (await site.ask("/api/sessions?cause=1")).json("sessions_response")
        assert [one["id"] for one in told["ended"]] == [3, 4, 5]
        assert (await site.ask("/api/sessions?cause=3")).json()["ended"] == []

    async def test_faults_come_in_their_order_some_at_a_time(self, site: LiveSite) -> None:
        nothing = (await site.ask("/api/faults")).json("faults_response")
        assert (nothing["faults"], nothing["more"], nothing["gone"]) == ([], False, 0)
        for one in of_causes(2, repeats=3):
            site.admin.feed.record(one)
        seen: list[int] = []
        after = nothing["last"]
        while True:
            told = (await site.ask(f"/api/faults?limit=2&after={after}")).json("faults_response")
            seen += [one["id"] for one in told["faults"]]
            after = told["last"]
            if not told["more"]:
                break
        assert seen == [1, 2, 3, 4, 5]
        newest = (await site.ask("/api/faults?newest=1&limit=2")).json("faults_response")
        assert ([one["id"] for one in newest["faults"]], newest["more"], newest["last"]) == ([4, 5], True, after)
        of_one = (await site.ask("/api/faults?cause=2")).json("faults_response")
        assert [one["id"] for one in of_one["faults"]] == [2]

    async def test_causes_are_told_with_the_reports_own_diagrams(self, site: LiveSite) -> None:
        site.admin.feed.record(SHARED)
        site.admin.feed.record(next(islice(of_causes(1, repeats=1), 1, None)))
        [cause] = (await site.ask("/api/causes")).json("causes_response")["causes"]
        assert (cause["cause"], cause["kind"], cause["times"], cause["sessions"]) == (1, "shared-by-processes", 2, 2)
        card = await site.ask("/causes/1")
        assert card.headers["content-type"] == "text/html; charset=utf-8"
        assert card.text.startswith('<article id="cause-1"')
        assert "<svg" in card.text
        assert "the intruder" in card.text
        assert (await site.ask("/causes/2")).status == 404
        report = await site.ask("/report.html")
        assert "two processes use one connection" in report.text
        assert 'href="static/report.css"' in report.text

    async def test_figures_and_metrics_and_health(self, site: LiveSite) -> None:
        client, backend = await site.house.session()
        figures = (await site.ask("/api/figures")).json("figures_response")
        assert (figures["clients"], figures["opened"], figures["open"]["idle"]) == (1, 1, 1)
        metrics = await site.ask("/metrics")
        assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert 'pgguard_sessions{state="idle"} 1.0' in metrics.text
        health = await site.ask("/healthz")
        assert health.status == 200
        assert health.json("health_response") == {
            "live": True,
            "ready": True,
            "why_not_ready": None,
            "servers": [{"name": None, "answers": True}],
        }
        await part(client, backend)

    async def test_a_guard_that_is_about_to_end_is_alive_and_not_ready(self, site: LiveSite) -> None:
        client, _ = await site.house.session()  # it is waited for
        site.guard.stop()
        answers = {path: (await site.ask(f"/healthz{path}")).status for path in ("", "/live", "/ready")}
        assert answers == {"": 503, "/live": 200, "/ready": 503}
        assert (await site.ask("/healthz")).json("health_response")["why_not_ready"] == "it is about to end"
        await client.close()

    async def test_one_whose_relay_does_not_come_round_is_not_alive(
        self, site: LiveSite, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pgguard.reporting.live.app._ROUND", 0.05)

        async def go_round(_: Guard) -> None:
            await trio.sleep_forever()

        monkeypatch.setattr(type(site.house.guard), "go_round", go_round)
        assert (await site.ask("/healthz/live")).status == 503
        assert (await site.ask("/healthz")).json("health_response")["live"] is False

    @pytest.mark.parametrize(
        ("path", "says"),
        [
            ("/api/sessions?limit=501", "limit should be a number from 0 to 500"),
            ("/api/sessions?limit=-1", "limit should be a number"),
            ("/api/sessions?limit=%D9%A3", "limit should be a number"),
            ("/api/sessions?after=" + "9" * 5000, "after should be a number"),
            ("/api/sessions?order=x", "order should be one of oldest, newest, active, waiting"),
            ("/api/sessions?stat=busy", "there is no such parameter: there are limit, order"),
            ("/api/causes?x=1", "there is no such parameter: there are none here"),
            ("/api/faults?newest=yes", "newest should be one of 1, 0"),
        ],
    )
    async def test_a_parameter_that_makes_no_sense_is_said(self, path: str, says: str, site: LiveSite) -> None:
        answer = await site.ask(path)
        assert answer.status == 400
        assert says in answer.text

    @pytest.mark.parametrize("after", ["x", "x:1", ":", "0:" + "9" * 5000])
    async def test_a_position_that_is_none_is_the_beginning(self, after: str, site: LiveSite) -> None:
        site.admin.feed.record(SHARED)
        assert len((await site.ask(f"/api/faults?after={after}")).json("faults_response")["faults"]) == 1

    async def test_files_are_those_of_the_page_alone(self, site: LiveSite) -> None:
        for name in ("live.js", "live.css", "report.css", "icon.svg"):
            assert (await site.ask(f"/static/{name}")).status == 200
        for name in ("x", "..%2fapp.py", "%2e%2e/app.py", "../../__init__.py"):
            assert (await site.ask(f"/static/{name}")).status == 404
        assert (await site.ask("/api/schema.json")).json() == SCHEMA

    async def test_what_others_have_written_does_no_harm(self, site: LiveSite) -> None:
        for text in (*HOSTILE.values(), "<script>alert(1)</script></article>"):
            for n, one in enumerate(islice(hostile_faults(text), 4), 1):
                site.admin.feed.record(replace(one, id=n, cause=n, run="a"))
            for n in range(1, 5):
                card = await site.ask(f"/causes/{n}")
                assert card.status == 200
                assert "<script" not in card.text
            assert (await site.ask("/api/faults")).json("faults_response")["faults"]
            assert (await site.ask("/api/causes")).json("causes_response")["total"] == 4


class TestWhatIsNew:
    async def test_whoever_follows_is_told_of_faults_and_figures(self, site: LiveSite) -> None:
        async with site.follow() as stream:
            hello, _ = await stream.named("hello")
            check(hello, "hello_event")
            figures, _ = await stream.named("figures")
            check(figures, "figures_response")
            site.admin.feed.record(SHARED)
            told, event = await stream.named("fault")
            assert check(told, "fault")["id"] == 1
            assert event["id"] == f"{hello['run']}:1"

    async def test_whoever_comes_back_gets_what_it_has_missed_once(self, site: LiveSite) -> None:
        async with site.follow() as stream:
            site.admin.feed.record(SHARED)
            _, event = await stream.named("fault")
        for one in of_causes(1, repeats=3):
            site.admin.feed.record(one)
        async with site.follow(last_event_id=event["id"]) as stream:
            places = [(await stream.named("fault"))[1]["id"].partition(":")[2] for _ in range(4)]
        assert places == ["2", "3", "4", "5"]
        async with site.follow("?after=another:99") as stream:
            assert (await stream.named("fault"))[1]["id"].endswith(":1")

    async def test_it_is_told_how_much_is_gone(self, site: LiveSite, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(feed, "KEPT", 3)
        for one in of_causes(1, repeats=9):
            site.admin.feed.record(one)
        async with site.follow(last_event_id=site.admin.feed.identifier(2)) as stream:
            gap, _ = await stream.named("gap")
            assert check(gap, "gap_event") == {"gone": 5}
            assert (await stream.named("fault"))[1]["id"].endswith(":8")
        assert (await site.ask("/api/faults")).json("faults_response")["gone"] == 7

    async def test_who_does_not_keep_up_is_dropped_and_costs_others_nothing(
        self, site: LiveSite, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server, "_TAKING", 0.2)
        large = replace(SHARED, reason="x" * 100_000)
        async with site.follow() as slow, site.follow() as quick:
            await slow.named("hello")
            await quick.named("hello")
            began = time.monotonic()
            for n in range(2, 502):
                site.admin.feed.record(replace(large, id=n))
                assert (await quick.named("fault"))[0]["id"] == n
            assert time.monotonic() - began < 60
            await until(lambda: len(site.admin._streams) == 1)
            assert site.admin.feed.dropped <= 1  # it has been dropped, or its connection broken off before
            with pytest.raises((trio.BrokenResourceError, h11.RemoteProtocolError)):  # in the middle of something
                await slow.to_the_end()

    async def test_no_more_than_some_may_follow(self, site: LiveSite, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(feed, "FOLLOWERS", 1)
        async with site.follow() as first:
            await first.named("hello")
            async with site.follow() as second:
                assert second.status == 503
        await until(lambda: not site.admin.feed.is_full)
        async with site.follow() as third:
            assert third.status == 200

    async def test_nobody_is_looked_at_for_if_nobody_follows(self, site: LiveSite) -> None:
        async with site.follow() as stream:
            await stream.named("figures")
        await until(lambda: not site.admin.feed.has_followers.is_set())

    def test_what_is_kept_is_bounded_by_its_size_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(feed, "KEPT_BYTES", 50_000)
        kept = Feed("x")
        for one in of_causes(40):
            kept.record(one)
        assert 1 < kept.last - kept.gone < 40
        records, _ = kept.records(behind=0, limit=99, cause=None, newest=False)
        assert sum(len(one.line) for one in records) <= 50_000

    @pytest.mark.parametrize(("newest", "places"), [(False, [[1, 2], [3, 4], [5]]), (True, [[4, 5]])])
    def test_what_is_handed_out_at_once_is_bounded_by_its_size_too(
        self, newest: bool, places: list[list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept = Feed("x")
        for one in of_causes(5):
            kept.record(one)
        monkeypatch.setattr(feed, "AT_ONCE", 2 * len(encode(SHARED)) + 100)
        behind, seen = 0, []
        for n in range(len(places)):
            records, more = kept.records(behind=behind, limit=99, cause=None, newest=newest)
            seen.append([one.place for one in records])
            assert more is (newest or n < len(places) - 1)
            behind = records[-1].place
        assert seen == places
        monkeypatch.setattr(feed, "AT_ONCE", 1)
        assert len(kept.records(behind=0, limit=99, cause=None, newest=False)[0]) == 1

    def test_causes_and_their_sessions_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(feed, "CAUSES", 5)
        kept = Feed("x")
        for one in of_causes(9):
            kept.record(one)
        assert [one.number for one in kept.causes] == [5, 6, 7, 8, 9]
        for n in range(200):
            kept.record(replace(SHARED, id=n + 10, cause=9, session=replace(SHARED.session, id=n + 1)))
        last = kept.cause(9)
        assert last is not None
        assert list(last.sessions) == list(range(137, 201))


class TestAccess:
    async def test_without_the_token_nothing_is_told(self, token_file: Path) -> None:
        async with live_site(token_file) as site:
            first = await site.ask("/")
            assert (first.status, first.headers["location"]) == (303, "/login")
            for path in ("/api/sessions", "/api/events", "/metrics", "/report.html", "/causes/1", "/nothing"):
                answer = await site.ask(path)
                assert answer.status == 401
                assert answer.headers["www-authenticate"].startswith("Bearer")
                for wrong in ("Bearer x", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer"):
                    assert (await site.ask(path, authorization=wrong)).status == 401
                assert (await site.ask(path, cookie=f"pgguard={TOKEN}")).status == 401
            assert (await site.ask("/healthz")).status == 200
            assert (await site.ask("/metrics", authorization=f"Bearer {TOKEN}")).status == 200
            for host in ("a/healthz?", "a/static/", "a/login#"):
                assert (await site.ask("/api/sessions", host=host)).status != 200
            for path in ("/static/../api/sessions", "/login/../metrics", "/healthz/%2e%2e/metrics", "//metrics"):
                assert (await site.ask(path)).status in {401, 404}

    async def test_a_browser_gives_it_in_a_form_and_keeps_a_cookie(self, token_file: Path) -> None:
        async with live_site(token_file) as site:
            form = await site.ask("/login")
            assert (form.status, 'type="password"' in form.text) == (200, True)
            wrong = await site.ask("/login", method="POST", body=b"token=wrong")
            assert (wrong.status, "set-cookie" in wrong.headers) == (403, False)
            right = await site.ask("/login", method="POST", body=f"token={TOKEN}".encode())
            assert (right.status, right.headers["location"]) == (303, "/")
            cookie = right.headers["set-cookie"]
            assert TOKEN not in cookie
            assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
            kept = cookie.partition(";")[0]
            assert (await site.ask("/api/sessions", cookie=kept)).status == 200
            assert (await site.ask("/", cookie=kept)).status == 200
            foreign = await site.ask("/login", method="POST", body=b"token=x", origin="http://evil.example")
            assert foreign.status == 403
            assert (await site.ask("/login", method="POST", body=b"x" * 20_000)).status == 413

    def test_a_cookie_is_of_one_run_alone(self) -> None:
        one, other = Access(TOKEN), Access(TOKEN)
        assert one.cookie != other.cookie
        assert not other.admits(None, {"pgguard": one.cookie})
        assert one.admits(None, {"pgguard": one.cookie})
        assert not Access(TOKEN).admits(None, {"pgguard": ""})

    @pytest.mark.parametrize(
        "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "x@127.0.0.1", "[::2]"]
    )
    async def test_a_name_that_anybody_can_lead_here_is_not_answered_to(self, host: str, site: LiveSite) -> None:
        for path in ("/", "/api/sessions", "/metrics"):
            answer = await site.ask(path, host=host)
            assert (answer.status, answer.text) == (400, "Invalid host header")

    async def test_names_of_the_loopback_are(self, site: LiveSite) -> None:
        for host in ("localhost", "LOCALHOST:9187", "127.0.0.1", "[::1]:80"):
            assert (await site.ask("/", host=host)).status == 200

    async def test_with_a_token_any_name_is(self, token_file: Path) -> None:
        async with live_site(token_file) as site:
            answer = await site.ask("/metrics", host="guard.monitoring.svc", authorization=f"Bearer {TOKEN}")
            assert answer.status == 200

    async def test_another_sites_page_is_not_answered(self, site: LiveSite) -> None:
        for kind in ("cross-site", "same-site"):
            assert (await site.ask("/api/events", sec_fetch_site=kind, sec_fetch_mode="cors")).status == 403
        assert (await site.ask("/", sec_fetch_site="cross-site", sec_fetch_mode="navigate")).status == 200
        assert (await site.ask("/api/sessions", sec_fetch_site="same-origin", sec_fetch_mode="cors")).status == 200

    async def test_every_answer_says_what_a_browser_may_do_with_it(self, site: LiveSite) -> None:
        for path in ("/", "/api/sessions", "/nothing", "/static/live.js", "/metrics", "/login"):
            headers = (await site.ask(path)).headers
            assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cache-control"] == "no-store"
            assert headers["referrer-policy"] == "same-origin"
            assert "access-control-allow-origin" not in headers

    async def test_what_is_asked_for_without_its_body_ends(self, site: LiveSite) -> None:
        """As by HEAD: also of what goes on without an end, and then nobody follows it."""
        for path in ("/", "/api/sessions", "/metrics", "/healthz", "/api/events", "/static/live.js"):
            stream = await site._begin(path, "HEAD", b"", None, {})
            with trio.fail_after(20):
                answer = await stream.read()
                assert isinstance(answer, h11.Response)
                assert answer.status_code == 200
                assert (b"content-length" in dict(answer.headers)) is (path != "/api/events")
                assert isinstance(await stream.read(), h11.EndOfMessage)
                while await stream._stream.receive_some():
                    pass
            await stream._stream.aclose()
        assert not site.admin.feed.has_followers.is_set()

    async def test_nothing_can_be_changed(self, site: LiveSite) -> None:
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            assert (await site.ask("/api/sessions", method=method)).status == 405

    def test_other_hosts_need_a_token(self) -> None:
        for host in ("0.0.0.0", "192.0.2.1", "::", "2001:db8::1"):
            with pytest.raises(ConfigurationError, match="other hosts can reach this address: name a file"):
                access_to([TcpAddress("127.0.0.1", 1), TcpAddress(host, 1)], None)
            assert not access_to([TcpAddress(host, 1)], TOKEN).is_open
        for host in ("127.0.0.1", "127.8.0.1", "::1"):
            assert access_to([TcpAddress(host, 1)], None).is_open

    @pytest.mark.parametrize(
        "content",
        [b"", b"short", b"\n" + TOKEN.encode(), b"two words of it, no", b"x" * 5000, "größer-als-sechzehn".encode()],
    )
    def test_a_file_that_holds_no_token_is_said(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "token").write_bytes(content)
        with pytest.raises(
            ConfigurationError, match=r"the first line of .* should be 16 letters, digits or signs at least"
        ) as raised:
            read_token(tmp_path / "token")
        assert "short" not in str(raised.value)

    def test_a_file_that_anybody_may_write_is_not_read(self, token_file: Path) -> None:
        assert read_token(token_file) == TOKEN
        token_file.chmod(0o666)
        with pytest.raises(ConfigurationError, match="token is not read, as "):
            read_token(token_file)
        with pytest.raises(ConfigurationError, match="x can't be read: No such file"):
            read_token(token_file.with_name("x"))


class TestConnections:
    async def test_garbage_ends_a_connection_and_nothing_else(
        self, site: LiveSite, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(server, "_QUIET", 0.5)
        for words in (
            b"\0" * 100,
            b"GET / HTTP/1.1\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nxxxxxxxxxxxxxxxxxxxx",
            b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
            b"GET /api/events HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
            b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
            b"GET /%ff%fe HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
            b"GET /api/sessions?search=%ff HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        ):
            stream = await trio.open_tcp_stream("127.0.0.1", site.port)
            await stream.send_all(words)
            with trio.fail_after(20):
                try:
                    while await stream.receive_some(65536):
                        pass
                except trio.BrokenResourceError:
                    pass
            await stream.aclose()
            assert (await site.ask("/healthz")).status == 200
        assert "Traceback" not in caplog.text

    async def test_however_many_ask_at_once_one_is_heard_in_a_round(
        self, site: LiveSite, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """So that the relay has its turn in between."""
        rounds = 0
        heard: list[int] = []
        handle = ProtocolWrapper.handle

        async def count() -> None:
            nonlocal rounds
            while True:
                await trio.lowlevel.checkpoint()
                rounds += 1

        async def noted(own: ProtocolWrapper, event: Event) -> None:
            heard.append(rounds)
            await handle(own, event)

        several = [await trio.open_tcp_stream("127.0.0.1", site.port) for _ in range(12)]
        await until(lambda: len(site.admin._streams) == 12)
        monkeypatch.setattr(ProtocolWrapper, "handle", noted)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            for stream in several:
                # All of them in one turn of this task.
                assert stream.socket._sock.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")  # type: ignore[attr-defined]
            await until(lambda: len(heard) >= 12)
            for stream in several:
                with trio.fail_after(20):
                    assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
                await stream.aclose()
            nursery.cancel_scope.cancel()
        # What the counter calls one round lies in two.
        assert max(Counter(heard[:12]).values()) <= 2

    async def test_who_says_nothing_is_not_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server, "CONNECTIONS", 3)
        monkeypatch.setattr(server, "_SILENCE", 0.2)
        async with live_site() as site:
            silent = [await trio.open_tcp_stream("127.0.0.1", site.port) for _ in range(6)]
            assert (await site.ask("/metrics")).status == 200  # when their time is over
            for stream in silent:
                await stream.aclose()

    async def test_it_ends_at_once_whoever_follows_and_takes_nothing(self) -> None:
        backend = FakeBackend()
        await backend.listen()
        async with live_site(backend=backend) as site, site.follow() as stream:
            await stream.named("hello")
            large = replace(SHARED, reason="x" * 200_000)
            for n in range(2, 200):
                site.admin.feed.record(replace(large, id=n))
            await trio.sleep(0.2)  # it is being sent that
            began = time.monotonic()
            site.guard.cut_off()
        assert time.monotonic() - began < 5
        await backend.close_all()

    async def test_it_can_be_said_that_it_cannot_listen(self) -> None:
        first = Admin(TcpAddress("127.0.0.1", 0), None)
        await first.listen()
        [address] = first.addresses
        with pytest.raises(ConfigurationError, match=f"--admin {address}: .*another program listens there"):
            await Admin(address, None).listen()
        with pytest.raises(ConfigurationError, match="other hosts can reach this address"):
            await Admin(TcpAddress("0.0.0.0", 0), None).listen()
        first.close()
