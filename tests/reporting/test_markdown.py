"""Markdown for GitHub: read by GitHub's own parser, whatever others say in it, and no longer than a comment may be."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import cmarkgfm
import pytest
from cmarkgfm.cmark import Options
from hypothesis import given
from hypothesis import strategies as st

from pgguard.attribution.findings import Share
from pgguard.attribution.frames import Frame
from pgguard.faults.advice.tracing import Tracing
from pgguard.faults.catalogue import Advice
from pgguard.faults.fault import Fault, Role, Spread
from pgguard.faults.text import printable
from pgguard.reporting.markdown import COMMENT, _cell, block, code, prose, to_markdown
from pgguard.reporting.words import with_tabs
from pgguard.session.verdicts import Kind
from tests.faults.samples import FACTS, NOW, OUTSTANDING, OVERLAP, WORKER_1, fault, verdict
from tests.reporting.gathered import causes, recorded, seen

SHARED = replace(seen(roles=(Role.INTRUDER, Role.REQUESTER)), id=1, cause=1, run="0")
_EMPTY = {"br", "hr", "img", "input"}


class Page(HTMLParser):
    """What GitHub makes of Markdown, before it takes anything away."""

    def __init__(self, markdown: str) -> None:
        super().__init__()
        self.outline: list[str] = []
        """Its tags in order, without those of code within a line."""
        self.links: list[str] = []
        self.text = ""
        self.outside = ""
        """The text that isn't code, in which GitHub looks for mentions and the like."""
        self.blocks: list[tuple[str, str]] = []
        """Blocks of code with their languages."""
        self._open: list[str] = []
        html = cmarkgfm.github_flavored_markdown_to_html(markdown, Options.CMARK_OPT_UNSAFE)
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "a":
            self.links.append(given["href"])
        if tag == "pre":
            self.blocks.append((given.get("lang", ""), ""))
        if tag != "code":
            self.outline.append(" ".join([tag, *(given if tag != "pre" else [])]))
        if tag not in _EMPTY:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag != "code":
            self.outline.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.text += data
        if not {"code", "pre"}.intersection(self._open):
            self.outside += data
        elif "pre" in self._open:
            language, before = self.blocks[-1]
            self.blocks[-1] = (language, before + data)

    def handle_comment(self, data: str) -> None:
        self.outline.append(f"!{data}")


def saying(text: str) -> Fault:
    """A fault in which every text that comes from others is this one."""
    worker = replace(WORKER_1, cmdline=("program", text), name=text)
    facts = replace(FACTS, user=text, database=text, application_name=text)
    request = replace(OUTSTANDING, sql=f"SELECT '{text}'".encode("utf-8", "replace"), messages=text)
    frame = Frame(text, f"/srv/{text}.py", 3, application=True)
    what = seen((frame,), opening=(frame,), of=fault(replace(OVERLAP, requests=(request,)), facts=facts))
    culprits = tuple(
        replace(one, process=worker, thread_name=text, system_call=text, declared={"controller": text})
        for one in what.culprits
    )
    advice = Advice(text, text, f"{text}\n{text}", ("https://example.org/a", text))
    tracing = Tracing(text, text, (text,))
    shares = (Share(worker, 3),)
    return replace(
        what, summary=text, reason=text, libpq=text, culprits=culprits, advice=advice, tracing=tracing, shares=shares
    )


def test_a_cause_is_told_with_all_that_is_known_of_it() -> None:
    again = replace(SHARED, id=2, repeat_of=1, suppressed=40, at=NOW + 60, spread=Spread(42, 11, 4, NOW))
    page = Page(to_markdown(recorded(SHARED, again)))
    for says in (
        "pgguard: 42 faults from 1 cause",
        "Seen between 2026-11-22 11:52:07 UTC and 2026-11-22 11:53:07 UTC.",
        "1. error: two processes use one connection (shared-by-processes)",
        SHARED.summary,
        "It came 42 times in 11 sessions, 4 processes involved, between ",
        "Intruder: pid 4867 (puma: cluster worker 1), thread 4880: the kernel named it as the sender",
        "sent Query, 61 bytes, at 11:52:07.120402",
        'Session 3: user app, database app, application_name "puma", over TCP from 127.0.0.1:53984',
        "message type 0x54 arrived from server while idle",
        "SELECT $1 AS pid",
        "What to change: Close the pool before forking. ",
    ):
        assert says in page.text
    assert [language for language, _ in page.blocks] == ["mermaid", "text", "text"]
    assert "> #1 serve /srv/app/src/app.py:36\n" in page.blocks[1][1]
    assert page.outline.count("details") == 2
    assert page.outline.count("table") == 2
    assert page.links == list(SHARED.advice.sources)


def test_the_code_to_paste_is_there_as_it_is_pasted() -> None:
    advice = Advice("Do", "Do it.", "# config.rb\nbefore_fork do\n\tDB.disconnect\n  # ```\nend\n````")
    page = Page(to_markdown(recorded(replace(SHARED, advice=advice))))
    assert page.blocks[-1][1] == "# config.rb\nbefore_fork do\n\tDB.disconnect\n  # ```\nend\n````\n"


def test_no_faults_are_a_result() -> None:
    assert to_markdown(recorded()) == "## pgguard: no faults\n"


HARMLESS = "plain words"
HOSTILE = (
    "<script>alert(1)</script>",
    "</summary></details><img src=x onerror=alert(1)>",
    "@octocat and @github/team, mail me@example.org",
    "#1 and octo/repo#2 and GH-3",
    "https://evil.example www.evil.example mailto:a@b.c xmpp:a@b.c",
    "[a](https://evil.example) ![a](x) [ref]: https://evil.example",
    "# heading",
    "- item",
    "12. item",
    "> quote",
    "| a | b |",
    "```\n# out",
    "~~~",
    "`` ` ``` code",
    "**bold** __bold__ _em_ *em* ~~gone~~",
    "&lt;b&gt; &#64;octocat &copy;",
    "\\`\\<b> \\",
    "$x$ $$x$$ $`x`$",
    "---",
    "===",
    "    indented",
    "line\n\n# heading\r- item\x0b\x0c\u2028<b>\x1b[2J\u202e",
    "a<!-- b --> <?php ?> <![CDATA[x]]>",
    "end; participant X\n%%{init: {}}%%",
    "[x] [ ] :tada: a:b",
)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_whatever_others_say_stays_in_its_place(text: str) -> None:
    made = to_markdown(recorded(saying(text)))
    page, other = Page(made), Page(to_markdown(recorded(saying(HARMLESS))))
    assert page.outline == other.outline
    assert page.links == other.links == ["https://example.org/a"]
    shown = printable(text).strip()
    assert page.text.count(shown) >= 10
    assert not re.search(r"@[a-z]|#\d|GH-\d", page.outside), "GitHub would make a mention or a link of it"
    assert len(made) <= COMMENT


@pytest.mark.parametrize(
    "text", [*HOSTILE, "snake_case app.py:23", "a*b", " a ", "`", "` `", "a`", "__init__"], ids=ascii
)
def test_other_peoples_text_is_shown_as_it_is(text: str) -> None:
    shown = printable(text)
    assert Page(prose(text)).text.strip() == shown.strip()
    assert Page(f"x {code(text)}").text.strip() == f"x {shown}".strip()
    assert Page("\n".join(block([text]))).blocks == [("", f"{with_tabs(text)}\n")]


@given(st.text(st.sampled_from("ab 1.-+=*_`~#@!|<>[](){}&;:/\\$^w\"'\t\u2028"), max_size=30))
def test_any_text_is_shown_as_it_is(text: str) -> None:
    shown = printable(text).strip()
    page = Page(prose(text))
    assert page.text.strip() == shown
    assert [tag for tag in page.outline if tag not in {"p", "/p"}] == []
    cells = Page(f"| a |\n| --- |\n| {_cell(text)} |")
    assert cells.text.split() == ["a", *printable(text).split()]
    assert page.links == cells.links == []


def test_what_needs_no_escape_has_none() -> None:
    plain = "pid 4867 (puma: cluster worker 1) sent Query at 11:52:07; seen at app.py:23 in load_user"
    assert prose(plain) == plain


def test_what_has_no_room_is_told_in_brief_or_counted() -> None:
    idle = [replace(one, cause=99 + one.id) for one in causes(400, fault(verdict(Kind.IDLE_IN_TRANSACTION)))]
    made = to_markdown(recorded(*causes(60, SHARED), *idle))
    assert 60_000 < len(made) <= COMMENT
    headings = re.findall(r"^### (\d+)\.", made, re.MULTILINE)
    assert headings == [str(n) for n in range(1, len(headings) + 1)]
    assert 16 < len(headings) < 460
    assert made.count("```mermaid") == 16, "a browser draws each of them"
    left_out = 460 - len(headings)
    assert f"There is no room here for {left_out} more causes: " in made
    assert Page(made).outline.count("h3") == len(headings)
    short = to_markdown(recorded(*causes(3, SHARED)), limit=3000)
    assert len(short) <= 3000
    assert "```" not in short


def test_the_room_that_there_is_can_be_counted_in_bytes() -> None:
    many = recorded(*causes(30, replace(SHARED, summary="日本" * 100)))
    made = to_markdown(many, limit=30_000, size=lambda text: len(text.encode()))
    assert 20_000 < len(made.encode()) <= 30_000
