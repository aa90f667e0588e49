"""The report to share: one HTML file that needs nothing else, neither network nor scripts.

It is readable without any style, as where a policy drops styles: everything is plain HTML, and the drawings are SVG
whose colours are attributes. A policy of its own (``Content-Security-Policy``) forbids all that it doesn't need, which
is everything but its one style sheet.

*Other people's text.* Names, command lines, SQL, the advice even, come from a file that anybody may have written. A
template can't forget to make a value harmless: each one that is printed passes :func:`_harmless`, which spells out what
can't be seen, reorders the text beside it or has no place in HTML, and is then escaped. A source is a link only if it
leads to a web page.

*How large.* Causes are told in full, the gravest first, as long as there is room (:data:`ROOM`); the others are rows of
a table, and of very many the rest is counted.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib import resources
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pgguard.faults.catalogue import CATALOGUE
from pgguard.faults.text import counted, printable, shorten
from pgguard.reporting.page.cards import SYMBOLS, card_of, outline_of, sights
from pgguard.reporting.page.explanations import GLOSSARY
from pgguard.reporting.page.timeline import timeline_of
from pgguard.reporting.record import rfc3339

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pgguard.reporting.page.cards import Outline
    from pgguard.reporting.recorded import RecordedCause, Recording

ROOM: Final = 1_500_000
"""Bytes of all causes that are told in full; the page is no larger than 2 MB."""
ROWS: Final = 300
"""Rows of the table of the others, at most."""
_SESSIONS: Final = 100
"""Rows of the table of sessions, at most."""
_BAR: Final = 160
"""Pixels of the bar of the most frequent kind."""


def html_report(recording: Recording, *, stylesheet: str | None = None, notes: Sequence[str] = ()) -> str:
    """The report on a recording as an HTML page.

    Args:
        recording: What has been recorded.
        stylesheet: Where the style sheet is, as a reference relative to the page; by default it is within the page.
        notes: What else is to be said at the top: sentences.
    """
    templates = environment()
    cards: list[Markup] = []
    outlines: list[Outline] = []
    room = ROOM
    template = templates.get_template("card.html")
    for number, cause in enumerate(recording.causes, 1):
        if room > 0:
            card = Markup(template.render(card=card_of(number, cause)))  # noqa: S704 - a template's, which has escaped it
            room -= len(card.encode())
            if room > 0:
                cards.append(card)
                continue
            room = 0
        if len(outlines) < ROWS:
            outlines.append(outline_of(number, cause))
    style = style_sheet()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    most = max((count.times for count in recording.counts), default=1)
    return templates.get_template(
        "report.html"
    ).render(
        recording=recording,
        title=_title(recording),
        version=version("pgguard"),
        style=Markup(style) if stylesheet is None else None,  # noqa: S704 - a file of ours
        stylesheet=stylesheet,
        policy=f"'sha256-{digest}'" if stylesheet is None else "'self'",
        notes=notes,
        sights=sights(recording),
        cards=cards,
        causes=[outline_of(number, cause) for number, cause in enumerate(recording.causes[: len(cards)], 1)],
        outlines=outlines,
        uncounted=len(recording.causes) - len(cards) - len(outlines),
        counts=[
            (count, CATALOGUE[count.kind], SYMBOLS[count.severity], _bar(count.times, most))
            for count in recording.counts
        ],
        timeline=timeline_of(recording.sessions, recording.more_sessions),
        sessions=recording.sessions[:_SESSIONS],
        glossary=GLOSSARY,
    )


def card_html(number: int, cause: RecordedCause) -> str:
    """What the page says of one cause, by this number: a part of a page that has the words explained."""
    return environment().get_template("card.html").render(card=card_of(number, cause))


def style_sheet() -> str:
    """The style sheet of the page."""
    return (resources.files(__package__) / "templates" / "style.css").read_text(encoding="utf-8")


@cache
def environment(package: str = __package__) -> Environment:
    """What makes pages of templates: of this package's, or of another's that stands beside it.

    Whatever they print is made harmless.
    """
    made = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_harmless,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )
    made.filters |= {"moment": _moment, "number": _number, "link": _link, "short": shorten, "count": counted}
    return made


def _harmless(value: object) -> object:
    """What is printed: text as it can be seen, in its lines."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    if value.isprintable():
        return value
    return "\n".join("\t".join(printable(part) for part in line.split("\t")) for line in value.split("\n"))


def _moment(at: float) -> str:
    text = rfc3339(at)
    return f"{text[:10]} {text[11:19]} UTC"


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _link(source: str) -> bool:
    """Whether a source leads to a web page."""
    return source.startswith(("https://", "http://"))


def _bar(times: int, most: int) -> float:
    return max(2.0, _BAR * times / most)


def _title(recording: Recording) -> str:
    if not recording.causes:
        return "no fault was recorded"
    return (
        f"{recording.times:,} fault{'' if recording.times == 1 else 's'} from {counted(len(recording.causes), 'cause')}"
    )
