"""The page to share: complete, valid, harmless whatever stands in the records, and never larger than it may be."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import threading
import time
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import html5lib
import pytest

from pgguard.attribution.evidence import Evidence
from pgguard.cli.outputs import Outputs
from pgguard.faults.catalogue import CATALOGUE, Severity
from pgguard.faults.fault import Chapter, Event, Spread
from pgguard.faults.policy import Action
from pgguard.proxy.errors import ConfigurationError
from pgguard.reporting import page
from pgguard.reporting.jsonl import encode
from pgguard.reporting.page import html_report, style_sheet
from pgguard.reporting.page.drawing import draw
from pgguard.reporting.page.explanations import CONSEQUENCES, EVIDENCE, MESSAGES
from pgguard.reporting.recorded import Gatherer, Recording, read_recording
from pgguard.reporting.sequence import sequence_of
from pgguard.session.verdicts import Kind
from pgguard.wire.messages import BACKEND, FRONTEND
from tests.faults.samples import NOW, TERMINATE, fault, verdict
from tests.reporting.test_hostile_text import HOSTILE, hostile_faults
from tests.reporting.test_opening import as_root, own
from tests.reporting.test_sequence import FORKED
from tests.servers import not_installed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from xml.etree.ElementTree import Element

    from pgguard.faults.fault import Fault

HTML = "{http://www.w3.org/1999/xhtml}"
SVG = "{http://www.w3.org/2000/svg}"
MARKUP = {
    "elements": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "ends": "]]>--%></style></pre></svg></title></bdi></article>--><!--",
    "quotes": '"\' onmouseover="alert(1)" x=\'`',
    "templates": "{{ 7 * 7 }}{% raw %}&lt;b&gt;&#x0;&nbsp;\\u003cscript\\u003e",
    "addresses": "javascript:alert(1)//https://example.org",
    "right to left, emoji": "שלום مرحبا 🐘👩‍💻",
    "a hundred thousand characters": "<x" * 50_000,
}
SHARED = fault(story=FORKED, cause=1, run="a", id=1)


def recording(*faults: Fault) -> Recording:
    gatherer = Gatherer("faults.jsonl")
    for one in faults:
        gatherer.record(one)
    return gatherer.recording()


def parsed(text: str) -> Element:
    """A page as a browser takes it; an error if there is any mistake in it."""
    parser = html5lib.HTMLParser(strict=True)
    tree: Element = parser.parse(text)
    return tree


def text_of(element: Element) -> str:
    return " ".join("".join(element.itertext()).split())


def find(tree: Element, tag: str, **attributes: str) -> list[Element]:
    found = [one for one in tree.iter() if one.tag in (HTML + tag, SVG + tag)]
    return [one for one in found if attributes.items() <= one.attrib.items()]


def causes_of(tree: Element) -> list[Element]:
    return find(tree, "article")


def numbered(faults: Iterable[Fault]) -> list[Fault]:
    """Faults of as many causes."""
    return [replace(one, id=n, cause=n, run="a") for n, one in enumerate(faults, 1)]


class TestContents:
    def test_a_card_says_what_happened_how_often_who_did_it_and_what_to_change(self) -> None:
        again = replace(SHARED, id=2, repeat_of=1, suppressed=41, at=NOW + 60, spread=Spread(43, 11, 4, NOW))
        [card] = causes_of(parsed(html_report(recording(SHARED, again))))
        told = text_of(card)
        for sentence in (
            "✖ error Cause 1: two processes use one connection",
            "Pid 4867 (puma: cluster worker 1) sent Query while the answer to pid 4866 was outstanding.",
            "Whichever of them reads first gets the answer, so one user can be shown another user's data",
            "First seen 2026-11-22 11:52:07.120 UTC",
            "Last seen 2026-11-22 11:53:07.120 UTC",
            "How often 43 times",
            "Where in 11 database sessions and 4 processes",
            "What was done pgguard only recorded it",
            "The message Query, 61 bytes: asks for one text of SQL to be run",
            "Intruder: pid 4867 (puma: cluster worker 1), thread 4880: the kernel named it as the sender",
            "The Linux kernel itself said which process sent exactly these bytes.",
            f"How to fix it: {SHARED.advice.title}",
            SHARED.advice.text,
            "message type 0x54 arrived from server while idle",
            CATALOGUE[Kind.SHARED_BY_PROCESSES].meaning,
        ):
            assert sentence in told
        assert [link.get("href") for link in find(card, "a")][:-1] == list(SHARED.advice.sources)
        assert json.loads(text_of(find(card, "pre")[-1])) == json.loads(encode(SHARED))

    def test_the_gravest_cause_is_the_first_and_all_are_listed_at_the_top(self) -> None:
        kinds = [Kind.UNTRACKED, Kind.INHERITED_CONNECTION, Kind.FOREIGN_TERMINATE]
        tree = parsed(html_report(recording(*numbered(fault(verdict(kind)) for kind in kinds))))
        titles = [CATALOGUE[kind].title for kind in reversed(kinds)]
        assert [text_of(find(card, "h2")[0]).partition(": ")[2] for card in causes_of(tree)] == titles
        links = [link for link in find(tree, "a") if (link.get("href") or "").startswith("#cause-")]
        assert [text_of(link) for link in links] == titles
        assert {link.get("href") for link in links} == {f"#{card.get('id')}" for card in causes_of(tree)}
        [counts] = [one for one in find(tree, "table") if "Compared" in text_of(one)]
        assert [[text_of(cell) for cell in row][:2] for row in find(counts, "tr")[1:]] == [
            ["✖ error", "foreign-terminate"],
            ["▲ warning", "inherited-connection"],
            ["● info", "untracked"],
        ]

    def test_the_diagram_tells_all_that_the_words_do(self) -> None:
        [card] = causes_of(parsed(html_report(recording(SHARED))))
        drawn = text_of(find(card, "svg")[0])
        for part in (
            "pid 4864",
            "opened it",
            "pid 4867",
            "the intruder",
            "thread 4880",
            "connects",
            "fork",
            "the fault",
        ):
            assert part in drawn
        assert "SELECT $1 AS pid" in drawn
        said = [text_of(step) for step in find(card, "li") if "The fault:" in text_of(step)]
        assert len(said) == 1
        assert "pid 4867 (puma: cluster worker 1), thread 4880 sends Query" in said[0]

    @pytest.mark.parametrize(("action", "stopped"), [(Action.LOGGED, False), (Action.REJECTED, True)])
    def test_the_offending_arrow_ends_at_the_guard_if_it_was_stopped_there(self, action: Action, stopped: bool) -> None:
        [card] = causes_of(parsed(html_report(recording(replace(SHARED, action=action)))))
        [offence] = [one for one in find(card, "line") if one.get("class") == "arrow offence"]
        boxes = {text_of(one): float(one.get("x") or 0) for one in find(card, "text") if one.get("class") == "name"}
        assert float(offence.get("x2") or 0) == boxes["pgguard" if stopped else "PostgreSQL"]

    def test_nothing_of_the_pages_own_is_cut_off_where_lanes_are_narrow(self) -> None:
        heirs = [Chapter(Event.INHERITED, NOW - 5, 5000 + n, 4864, Evidence.SOCKET_HOLDER) for n in range(9)]
        drawn = draw(sequence_of(fault(story=(FORKED[0], *heirs))))
        texts = [*(" ".join(box.lines) for box in drawn.boxes), *(label.text for label in drawn.labels)]
        assert "6 other processes" in texts
        assert "inherits the open connection" in texts
        assert not [label.text for label in drawn.labels if "…" in label.text]

    def test_the_timeline_shows_one_session_in_the_rows_of_all_who_had_it(self) -> None:
        drawings = find(parsed(html_report(recording(SHARED))), "svg")
        [drawing] = [one for one in drawings if "timeline" in (one.get("aria-labelledby") or "")]
        rows = [text_of(one) for one in find(drawing, "text") if one.get("class") == "name"]
        assert rows == ["pid 4864", "pid 4866", "pid 4867"]
        bars = [text_of(one) for one in find(drawing, "rect")]
        assert len(bars) == 3
        assert all(bar.startswith("session 3: pid 486") for bar in bars)
        assert len([one for one in find(drawing, "path") if one.get("class") == "mark error"]) == 1

    def test_a_long_time_without_a_connection_is_folded_in_the_timeline(self) -> None:
        """And a short one isn't: several runs may lie in one file, some of them days apart."""

        def shown(*seconds: float) -> list[str]:
            sessions = [replace(SHARED.session, opened_at=SHARED.session.opened_at + n) for n in seconds]
            later = [
                replace(SHARED, run=f"{n}", at=NOW + n, story=(), session=session)
                for n, session in zip(seconds, sessions, strict=True)
            ]
            drawings = find(parsed(html_report(recording(SHARED, *later))), "svg")
            [drawing] = [one for one in drawings if "timeline" in (one.get("aria-labelledby") or "")]
            return [text for one in find(drawing, "text") if (text := text_of(one)).endswith("later")]

        assert shown(15) == []
        assert shown(15, 600, 90_000) == ["9 min 32 s later", "1 day 0 h later"]
        assert len(shown(*(1000 * n for n in range(1, 30)))) == 4

    def test_a_recording_without_faults_says_so(self) -> None:
        tree = parsed(html_report(Gatherer("faults.jsonl").recording(), notes=["no connection came through the guard"]))
        assert "recorded no fault: as far as it could see" in text_of(tree)
        assert "no connection came through the guard" in text_of(tree)
        assert not causes_of(tree)

    def test_what_is_wrong_with_the_file_is_said(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(encode(SHARED) + b'{"id": 2')
        told = text_of(parsed(html_report(read_recording(tmp_path / "x"))))
        assert "line 2, the last one, is cut off, and left out" in told

    def test_a_repeat_alone_has_no_advice_of_its_own(self) -> None:
        [card] = causes_of(parsed(html_report(recording(replace(SHARED, id=9, repeat_of=1)))))
        assert "Only a later record of this cause is in the file" in text_of(card)
        assert "How to fix it" not in text_of(card)

    def test_there_are_words_for_every_kind_and_evidence(self) -> None:
        assert set(CONSEQUENCES) == set(Kind)
        assert set(EVIDENCE) == set(Evidence)
        assert set(MESSAGES) <= {message.name for message in (*FRONTEND, *BACKEND)}
        assert all(text.endswith(".") for text in (*CONSEQUENCES.values(), *EVIDENCE.values()))


class TestAccessible:
    def test_headings_are_in_order_and_names_are_unique(self) -> None:
        tree = parsed(html_report(recording(*numbered(islice(hostile_faults("a name"), 12)))))
        levels = [int(one.tag[-1]) for one in tree.iter() if re.fullmatch(rf"{HTML}h[1-6]", str(one.tag))]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))
        names = [one.get("id") for one in tree.iter() if one.get("id") is not None]
        assert len(names) == len(set(names))
        targets = {str(one.get("href"))[1:] for one in find(tree, "a") if str(one.get("href")).startswith("#")}
        assert targets <= set(names)

    def test_drawings_have_a_title_and_tables_have_headers(self) -> None:
        tree = parsed(html_report(recording(*numbered(islice(hostile_faults("a name"), 25)))))
        assert find(tree, "html")[0].get("lang") == "en"
        for svg in find(tree, "svg"):
            assert svg.get("role") == "img"
            assert find(svg, "title")
            for name in (svg.get("aria-labelledby") or "").split():
                assert [one for one in svg.iter() if one.get("id") == name]
        for table in find(tree, "table"):
            assert all(header.get("scope") in ("col", "row") for header in find(table, "th"))
            assert find(table, "thead")

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_contrasts_are_those_of_level_aa(self, scheme: str) -> None:
        blocks = re.findall(r":root \{(.*?)\}", style_sheet(), re.DOTALL)
        colours = dict(re.findall(r"--([\w-]+): (#\w{6});", "".join(blocks[: 1 if scheme == "light" else 2])))
        texts = {"ink": ["ground", "card", "raised", "note", "paper", "error-ground", "opened", "had"]}
        texts |= {"muted": ["ground", "card", "raised", "paper"], "link": ["ground", "card", "note"]}
        texts |= {one: [f"{one}-ground", "card", "paper"] for one in ("error", "warning", "info")}
        for text, grounds in texts.items():
            for ground in grounds:
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for line in ("opened-rule", "had-rule", "note-rule"):
            assert contrast(colours[line], colours["paper"]) >= 3, line

    def test_without_any_style_drawings_have_their_colours(self) -> None:
        """As attributes: a policy that drops styles leaves them."""
        tree = parsed(html_report(recording(SHARED)))
        for svg in find(tree, "svg"):
            for shape in (*find(svg, "rect"), *find(svg, "text"), *find(svg, "path"), *find(svg, "circle")):
                assert shape.get("fill") is not None
            assert all(line.get("stroke") for line in find(svg, "line"))
        assert not [one for one in tree.iter() if one.get("style") is not None]


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2.2, "contrast ratio"."""
    dark, light = sorted(luminance(colour) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


ALLOWED = frozenset(
    {"html", "head", "meta", "title", "style", "link", "body", "header", "main", "footer", "section", "article"}
    | {"h1", "h2", "h3", "h4", "p", "a", "span", "strong", "code", "pre", "bdi", "time", "br", "div", "figure"}
    | {"ul", "ol", "li", "dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "details", "summary"}
    | {"figcaption", "svg", "desc", "line", "rect", "text", "circle", "path"}
)


def look_for_harm(text: str) -> Element:
    """Nothing of other people's is more than text, and none of it does anything to the text beside it."""
    assert all(character.isprintable() or character in "\n\t" for character in text)
    text.encode()
    tree = parsed(text)
    assert {str(one.tag).rpartition("}")[2] for one in tree.iter()} <= ALLOWED
    for one in tree.iter():
        for name, value in one.attrib.items():
            assert not name.startswith("on")
            if name in ("href", "src"):
                assert value.startswith(("https://", "http://", "#")), value
    return tree


class TestHostile:
    @pytest.mark.parametrize("text", [*HOSTILE.values(), *MARKUP.values()], ids=[*HOSTILE, *MARKUP])
    def test_other_peoples_text_stays_text(self, text: str) -> None:
        gatherer = Gatherer(text)
        few = 4 if len(text) < 20_000 else 1
        for n, one in enumerate(numbered(islice(hostile_faults("TEXT"), 2, 2 + 6 * few, 6)), 1):
            advice = one.advice._replace(title="TEXT", text="TEXT", code="TEXT", sources=("TEXT", "https://x.org/TEXT"))
            line = encode(replace(one, advice=advice, libpq="TEXT"))
            gatherer.take(line.replace(b"TEXT", json.dumps(text)[1:-1].encode()), n)
        gatherer.complain(text)
        tree = look_for_harm(html_report(gatherer.recording(), notes=[text]))
        assert len(causes_of(tree)) == few
        if text.isprintable() and len(text) < 100:
            assert all(text_of(card).count(text) > 5 for card in causes_of(tree))

    def test_records_of_somebodys_own_make(self, tmp_path: Path) -> None:
        """Whatever stands where something else belongs."""
        record = json.loads(encode(SHARED))
        odd: list[Any] = [None, [], {}, "\0<", 10**30, -1, 1.5, True, [[]], {"\ud800<b>": "\udfff"}]
        lines = [
            json.dumps(record | {"id": n, "cause": n, key: value})
            for n, (key, value) in enumerate(((key, value) for key in sorted(record) for value in odd), 1)
            if key not in ("id", "at", "kind", "severity")
        ]
        (tmp_path / "x").write_text("\n".join(lines))
        found = read_recording(tmp_path / "x")
        assert found.records == len(lines)
        look_for_harm(html_report(replace(found, causes=found.causes[::15])))

    def test_only_web_pages_are_links(self) -> None:
        sources = ("https://example.org/a", "javascript:alert(1)", "data:text/html,x", "//example.org", "HTTPS://x")
        [card] = causes_of(
            parsed(html_report(recording(replace(SHARED, advice=SHARED.advice._replace(sources=sources)))))
        )
        assert [link.get("href") for link in find(card, "a")] == ["https://example.org/a", "#words"]
        assert "javascript:alert(1)" in text_of(card)


class TestBounds:
    def test_a_hundred_thousand_faults_are_few_causes(self, tmp_path: Path) -> None:
        """The same rule at a twentieth of the number: half a second, and no larger for it."""
        first = [encode(one) for one in numbered(fault(verdict(kind, message=TERMINATE)) for kind in Kind)]
        repeat = json.loads(encode(replace(SHARED, repeat_of=1, suppressed=1)))
        with (tmp_path / "x").open("wb") as file:
            file.writelines(first)
            for n in range(len(first) + 1, 5000):
                session = repeat["session"] | {"id": n}
                file.write(json.dumps(repeat | {"id": n, "cause": 3, "session": session}).encode() + b"\n")
        began = time.process_time()
        found = read_recording(tmp_path / "x")
        text = html_report(found)
        assert time.process_time() - began < 5
        assert found.records == 4999
        assert len(text.encode()) < 2_000_000

    @pytest.mark.parametrize("text", ["x", "<&" * 10_000], ids=["short", "long"])
    def test_of_thousands_of_causes_the_gravest_are_told_in_full(self, text: str) -> None:
        what = replace(SHARED, libpq=text, summary=text, advice=SHARED.advice._replace(text=text, code=text))
        count = 1200 if text == "x" else 30
        faults = [replace(what, id=n, cause=n, severity=Severity.WARNING) for n in range(1, count)]
        found = recording(*faults, replace(what, id=count, cause=count))
        shown = html_report(found)
        assert len(shown.encode()) < 2_000_000
        tree = parsed(shown)
        cards = causes_of(tree)
        assert "✖ error" in text_of(cards[0])
        assert 5 < len(cards) < 100 or text != "x"
        [others] = find(tree, "section", id="others")
        rows = len(find(others, "tr")) - 1
        more = re.search(r"And (\d+) more cause", text_of(others))
        assert len(cards) + rows + (int(more[1]) if more else 0) == count


class TestFiles:
    def test_it_replaces_what_stood_there(self, tmp_path: Path) -> None:
        (tmp_path / "out.html").write_text("x" * 1_000_000)
        Outputs(html=tmp_path / "out.html").write(recording(SHARED))
        assert (tmp_path / "out.html").read_text() == html_report(recording(SHARED))
        assert stat.S_IMODE((tmp_path / "out.html").stat().st_mode) & stat.S_IWOTH == 0

    def test_the_style_sheet_is_the_only_thing_that_is_allowed(self, tmp_path: Path) -> None:
        Outputs(html=tmp_path / "out.html").write(recording(SHARED))
        tree = parsed((tmp_path / "out.html").read_text())
        [style] = find(tree, "style")
        digest = base64.b64encode(hashlib.sha256((style.text or "").encode()).digest()).decode()
        [policy] = [one for one in find(tree, "meta") if one.get("http-equiv") == "Content-Security-Policy"]
        assert policy.get("content") == (
            f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        )
        assert not find(tree, "link")

    def test_the_style_sheet_can_stand_beside_it(self, tmp_path: Path) -> None:
        (tmp_path / "a b").mkdir()
        Outputs(html=tmp_path / "out.html", css=tmp_path / "a b/p%g.css").write(recording(SHARED))
        tree = parsed((tmp_path / "out.html").read_text())
        assert [link.get("href") for link in find(tree, "link")] == ["a%20b/p%25g.css"]
        assert not find(tree, "style")
        assert (tmp_path / "a b/p%g.css").read_text() == style_sheet()
        assert [one.get("content") for one in find(tree, "meta") if one.get("http-equiv") is not None] == [
            "default-src 'none'; style-src 'self'; base-uri 'none'; form-action 'none'"
        ]

    def test_a_pipe_will_do(self) -> None:
        read, write = os.pipe()
        got: list[bytes] = []

        def drain() -> None:
            with os.fdopen(read, "rb") as file:
                got.append(file.read())

        reader = threading.Thread(target=drain)
        reader.start()
        Outputs(html=Path(f"/proc/self/fd/{write}")).write(recording(SHARED))
        os.close(write)
        reader.join()
        assert got[0].decode() == html_report(recording(SHARED))

    @as_root
    def test_nobody_else_can_lead_it_elsewhere(self, tmp_path: Path) -> None:
        theirs = own(tmp_path, 65534)
        (theirs / "precious").write_text("precious")
        (theirs / "out.html").symlink_to("precious")
        own(theirs / "out.html", 65534)
        with pytest.raises(ConfigurationError, match="is a symbolic link of"):
            Outputs(html=theirs / "out.html").write(recording(SHARED))
        assert (theirs / "precious").read_text() == "precious"


class _Quiet(SimpleHTTPRequestHandler):
    """Serves a directory, and says nothing of it."""

    def __init__(self, *args: Any, asked: list[str], **options: Any) -> None:
        self._asked = asked
        super().__init__(*args, **options)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as it is called
        del format, args

    def do_GET(self) -> None:
        self._asked.append(self.path)
        super().do_GET()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Where the directory is served, and what has been asked for."""
    asked: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, asked=asked, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("beside", [False, True], ids=["one file", "a style sheet beside it"])
def test_a_browser_takes_it_without_a_word_and_asks_for_nothing(
    beside: bool, tmp_path: Path, served: tuple[str, list[str]]
) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-headless-shell")
    if browser is None:
        not_installed("chromium")
    address, asked = served
    theft = (
        f'"><img src="{address}/stolen.png"><link rel=stylesheet href="{address}/x.css"><script src="{address}/x.js">'
    )
    faults = [
        replace(one, advice=one.advice._replace(text=theft, sources=(f"{address}/page",)))
        for one in (SHARED, *islice(hostile_faults(theft), 3))
    ]
    css = tmp_path / "style.css" if beside else None
    Outputs(html=tmp_path / "report.html", css=css).write(recording(*numbered(faults)))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    done = subprocess.run(
        [browser, *options, f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"{address}/report.html"],
        capture_output=True,
        text=True,
        check=True,
        timeout=90,
    )
    assert "Cause 1" in done.stdout
    assert "CONSOLE" not in done.stderr
    assert asked == ["/report.html", *(["/style.css"] if beside else [])]


def test_the_templates_are_part_of_the_package() -> None:
    names = {one.name for one in Path(page.__file__).with_name("templates").iterdir()}
    assert names == {"report.html", "card.html", "sequence.svg", "timeline.svg", "style.css"}
