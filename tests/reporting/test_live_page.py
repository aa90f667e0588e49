"""The live page in a real browser: two thousand sessions, ten thousand faults, wherever it is read."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import trio

from pgguard.attribution.evidence import Process
from pgguard.attribution.findings import Activity
from pgguard.faults.catalogue import Severity
from pgguard.faults.causes import Told
from pgguard.faults.docket import Count
from pgguard.faults.fault import SessionFacts, Spread
from pgguard.faults.policy import Action
from pgguard.faults.sql import SqlMode, SqlText
from pgguard.proxy.addresses import TcpAddress, parse_upstream
from pgguard.proxy.overview import LastRequest, Overview, Seen, SessionSnapshot, Wanted
from pgguard.proxy.settings import Front
from pgguard.reporting.live.server import Admin
from pgguard.session.verdicts import Kind, RequestState
from tests.browser import Browser, browser
from tests.faults.samples import NOW, fault
from tests.reporting.test_metrics import figures
from tests.reporting.test_sequence import FORKED

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from pgguard.faults.fault import Fault
    from pgguard.proxy.figures import Figures

SESSIONS = 2000
FAULTS = 10_000
HARM = "<img src=x onerror=alert(1)><script>alert(2)</script>"
SHARED = fault(story=FORKED, cause=1, run="a", id=1)
TOKEN = "correct-horse-battery-staple"
FRONTS = [
    Front(name, parse_upstream(f"host={name}.internal sslmode=disable"), (TcpAddress("127.0.0.1", port),))
    for name, port in (("orders", 6544), ("audit", 6545))
]


def session(number: int) -> SessionSnapshot:
    name = HARM if number == 1 else f"worker {number}"
    own = Process(10_000 + number, 1, NOW, "ruby", (f"puma: cluster worker {number}", name), 1)
    return SessionSnapshot(
        facts=SessionFacts(
            number,
            "app",
            "app",
            name,
            "tcp",
            f"127.0.0.1:{number}",
            number,
            NOW,
            tls=False,
            through=FRONTS[number % 2].name,
        ),
        activity=Activity.BUSY if number % 3 == 0 else Activity.IDLE,
        requests=number,
        opener=own,
        holders=(own, replace(own, pid=30_000 + number)) if number % 100 == 0 else (own,),
        upstream=TcpAddress("db.internal", 5432),
        last_request=LastRequest(
            number, NOW, "Q", SqlText(f"SELECT {number}".encode(), SqlMode.FULL, cut=False), RequestState.ANSWERED, None
        ),
    )


@dataclass
class Watched:
    """What is known of a guard that has very many sessions."""

    admin: Admin
    requests: int = 0
    missing: tuple[()] = ()
    fronts: Sequence[Front] = tuple(FRONTS)
    takes: float = 0.0
    """Seconds to tell of sessions."""
    server_answers: Mapping[str | None, bool] = field(default_factory=dict)
    lost_records = 0

    def __post_init__(self) -> None:
        self.sessions = [session(number) for number in range(1, SESSIONS + 1)]

    async def figures(self) -> Figures:
        self.requests += 100
        return replace(figures(), at=NOW + self.requests / 100, requests=self.requests)

    async def overview(self, wanted: Wanted) -> Overview:
        await trio.sleep(self.takes)
        causes = {number: (1,) if number <= 5 else () for number in range(1, SESSIONS + 1)}
        found = [
            Seen(one, causes[one.facts.id])
            for one in self.sessions
            if (wanted.cause is None or wanted.cause in causes[one.facts.id])
            and wanted.search in str(one.facts.application_name)
            and wanted.activity in {None, one.activity}
        ]
        open_sessions = {activity: sum(one.activity is activity for one in self.sessions) for activity in Activity}
        return Overview(SESSIONS, open_sessions, len(found), found[: wanted.limit])

    async def go_round(self) -> None:
        await trio.lowlevel.checkpoint()

    def counts(self) -> list[Count]:
        return [Count(Kind.SHARED_BY_PROCESSES, Severity.ERROR, Action.LOGGED, 1, self.admin.feed.last)]

    def causes(self) -> list[Told]:
        return [Told(SHARED, Spread(12_345, 5, 3, NOW))]

    def why_not_ready(self) -> str | None:
        return None


def many_faults(count: int) -> Iterator[Fault]:
    yield SHARED
    yield replace(SHARED, id=2, cause=2, severity=Severity.WARNING, kind=Kind.UNCLEAN_CLOSE, summary=HARM)
    for n in range(3, count + 1):
        spread = Spread(n, 5, 3, NOW)
        facts = replace(SHARED.session, id=n % 5 + 1)
        yield replace(
            SHARED, id=n, repeat_of=1, spread=spread, session=facts, requests=(), story=(), culprits=SHARED.culprits[:1]
        )


class Site:
    """A live page that is served by a thread."""

    def __init__(self, admin: Admin) -> None:
        self.admin = admin
        self.guard = Watched(admin)
        self.trio_token: trio.lowlevel.TrioToken
        self.url = ""
        self._ready = threading.Event()
        self._over = trio.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._serve,))

    async def _serve(self) -> None:
        await self.admin.listen()
        self.url = f"http://{self.admin.addresses[0]}/"
        self.trio_token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.admin.serve, self.guard)
            self._ready.set()
            await self._over.wait()
            nursery.cancel_scope.cancel()
        self.admin.close()

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(30)

    def record(self, one: Fault) -> None:
        trio.from_thread.run_sync(self.admin.feed.record, one, trio_token=self.trio_token)

    def stop(self) -> None:
        trio.from_thread.run_sync(self._over.set, trio_token=self.trio_token)
        self._thread.join(30)
        assert not self._thread.is_alive()


@contextmanager
def served(shown: Browser, token_file: Path | None = None, *, faults: int = 20) -> Iterator[Site]:
    """Serve a page; nothing has gone wrong in the browser by the end."""
    site = Site(Admin(TcpAddress("127.0.0.1", 0), token_file))
    for one in many_faults(faults):
        site.admin.feed.record(one)
    site.start()
    try:
        yield site
        assert shown.said == []
    finally:
        shown.open("about:blank")
        shown.said.clear()
        site.stop()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as shown:
        yield shown


def count(shown: Browser, selector: str) -> Any:
    return shown.evaluate(f"document.querySelectorAll({selector!r}).length")


def click(shown: Browser, selector: str) -> None:
    shown.evaluate(f"document.querySelector({selector!r}).click()")


def text(shown: Browser, selector: str) -> str:
    return str(shown.evaluate(f"document.querySelector({selector!r}).textContent"))


def contrast(shown: Browser, selector: str) -> float:
    """The contrast of an element's text with what it stands on (WCAG 2.2)."""
    return float(
        shown.evaluate(
            """(() => {
              const light = (colour) => {
                const [r, g, b] = colour.match(/[\\d.]+/g).map((one) => one / 255)
                  .map((one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
              };
              const one = document.querySelector(SELECTOR);
              let ground = one;
              while (getComputedStyle(ground).backgroundColor === "rgba(0, 0, 0, 0)") ground = ground.parentElement;
              const values = [getComputedStyle(one).color, getComputedStyle(ground).backgroundColor].map(light).sort();
              return (values[1] + 0.05) / (values[0] + 0.05);
            })()""".replace("SELECTOR", repr(selector))
        )
    )


def test_the_page_shows_very_many_sessions_and_faults_and_loses_none(shown: Browser) -> None:
    with served(shown, faults=FAULTS) as site:
        shown.look_like(width=1280, height=900, scheme="light")
        shown.open(site.url)
        shown.wait_for("document.querySelectorAll('#session-rows tr').length === 100")
        shown.wait_for("document.getElementById('matching')?.textContent.startsWith('2,000 sessions open; 100 shown')")
        shown.wait_for("document.querySelector('#plot-requests .line')?.getAttribute('d').includes('L')")
        assert count(shown, "#causes > li") == 2
        assert "(12,345 times, in 5 sessions, by 3 processes; " in text(shown, "#causes > li")
        assert count(shown, "#fault-rows tr") == 200
        assert text(shown, "#kept").startswith("1,000 records kept here, the latest 200 are shown")

        click(shown, "#more-sessions")
        shown.wait_for("document.querySelectorAll('#session-rows tr').length === 200")
        shown.evaluate("document.getElementById('search').value = 'worker 1999'")
        shown.evaluate("document.getElementById('search').dispatchEvent(new Event('input'))")
        shown.wait_for("document.getElementById('matching').textContent.includes('1 of them match')")
        assert "pid 11999" in text(shown, "#session-rows tr")
        shown.evaluate("document.getElementById('search').value = ''")

        click(shown, "#causes > li:first-child .bar button:last-child")  # its sessions
        shown.wait_for("document.getElementById('matching').textContent.includes('5 of them match')")
        click(shown, "#of-cause")
        shown.wait_for("document.getElementById('matching').textContent.startsWith('2,000 sessions open; ')")

        click(shown, "#causes > li:first-child .bar button")  # what happened
        shown.wait_for("document.querySelector('#causes article svg') !== null")
        assert "the intruder" in text(shown, "#causes article svg")

        click(shown, "#pause")
        for n in range(FAULTS + 1, FAULTS + 4):
            site.record(replace(SHARED, id=n, cause=3 if n == FAULTS + 1 else 1, summary=f"new {n}"))
        shown.wait_for("document.getElementById('pause').textContent === 'Go on (3 new)'")
        assert count(shown, "#causes > li") == 2
        click(shown, "#pause")
        shown.wait_for("document.querySelectorAll('#causes > li').length === 3")
        assert "new 10003" in text(shown, "#fault-rows tr")
        assert count(shown, "#causes article svg") == 1, "what was open has been closed"

        click(shown, "#clear")
        assert (count(shown, "#causes > li"), count(shown, "#fault-rows tr")) == (0, 0)
        site.record(replace(SHARED, id=FAULTS + 4, cause=4, at=NOW + 60, summary="after"))
        shown.wait_for("document.querySelectorAll('#causes > li').length === 1")
        shown.wait_for("document.querySelectorAll('#fault-rows tr').length === 1")
        click(shown, "#unclear")
        assert (count(shown, "#causes > li"), count(shown, "#fault-rows tr")) == (4, 200)
        assert shown.evaluate("window.alert.name") == "alert"
        assert count(shown, "img") + count(shown, "script:not([src])") == 0


def test_of_several_databases_it_says_which(shown: Browser) -> None:
    with served(shown) as site:
        shown.look_like(width=1280, height=900, scheme="light")
        shown.open(site.url)
        shown.wait_for("document.querySelectorAll('#session-rows tr').length === 100")
        assert "through audit, from 127.0.0.1:1" in text(shown, "#session-rows tr:nth-child(1)")
        assert "through orders, from 127.0.0.1:2" in text(shown, "#session-rows tr:nth-child(2)")
        shown.wait_for("!document.getElementById('down').hidden")
        assert text(shown, "#down").startswith("The server of audit could not be connected to for the last client")


def test_what_is_chosen_while_the_guard_still_answers_holds(shown: Browser) -> None:
    with served(shown) as site:
        shown.open(site.url)
        shown.wait_for("document.querySelectorAll('#session-rows tr').length === 100")
        click(shown, "#pause")  # nothing is asked for but what is chosen
        site.guard.takes = 0.5
        for chosen, value in (("order", "newest"), ("state", "busy")):
            shown.evaluate(f"document.getElementById({chosen!r}).value = {value!r}")
            shown.evaluate(f"document.getElementById({chosen!r}).dispatchEvent(new Event('change'))")
        shown.wait_for("document.getElementById('matching').textContent.includes('666 of them match')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390], ids=["wide", "phone"])
def test_it_can_be_read_wherever_it_is_shown(scheme: str, width: int, shown: Browser) -> None:
    with served(shown) as site:
        shown.look_like(width=width, height=844, scheme=scheme)
        shown.open(site.url)
        shown.wait_for("document.querySelectorAll('#session-rows tr').length === 100")
        click(shown, "#causes > li:first-child .bar button")
        shown.wait_for("document.querySelector('#causes article svg') !== null")
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        for selector in (
            "h1",
            "#totals",
            "#causes bdi",
            "#pause",
            ".badge.error",
            "#session-rows td",
            "#fault-rows code",
        ):
            assert contrast(shown, selector) >= 4.5, selector
        ground = shown.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        assert ground == ("rgb(243, 245, 248)" if scheme == "light" else "rgb(13, 17, 23)")


def test_a_token_is_typed_once_and_stands_in_no_address(shown: Browser, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with served(shown, tmp_path / "token") as site:
        shown.look_like(width=1280, height=900, scheme="light")
        shown.open(site.url)
        shown.wait_for("location.pathname === '/login' && document.getElementById('token') !== null")
        shown.evaluate(f"document.getElementById('token').value = {TOKEN!r}")
        click(shown, "button")
        shown.wait_for("document.querySelectorAll('#session-rows tr').length === 100")
        seen = shown.call("Page.getNavigationHistory")["entries"]
        assert not [one["url"] for one in seen if "token" in one["url"] or TOKEN in one["url"]]
        assert shown.evaluate("document.cookie") == ""
        shown.open(f"{site.url}api/figures")
        shown.wait_for("document.body !== null && document.body.innerText.includes('requests')")
