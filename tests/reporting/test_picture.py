"""The README's picture is of a report as it looks today."""

from __future__ import annotations

import html
import json
import re

from rich.text import Text

from pgguard.demo.app import USERS
from pgguard.reporting.console import report_of
from pgguard.reporting.readback import from_record
from tests.picture import COMMAND, PICTURE, RECORDS, WIDTH, shortened

ANEW = "make it anew: python -m tests.picture"
SVG = PICTURE.read_text()
[RECORD, *_] = [
    one for one in map(json.loads, RECORDS.read_text().splitlines()) if one["kind"] == "shared-by-processes"
]


def lines() -> list[str]:
    """What is read in the picture, from top to bottom."""
    parts = re.findall(
        r'<text class="[^"]*" x="([\d.]+)" y="([\d.]+)" textLength="([\d.]+)"[^>]*>(.*?)</text>', SVG, re.DOTALL
    )
    rows: dict[float, str] = {}
    for x, y, length, escaped in parts:
        text = html.unescape(escaped).replace("\N{NO-BREAK SPACE}", " ")
        column = round(float(x) / float(length) * len(text))
        rows[float(y)] = rows.get(float(y), "").ljust(column) + text
    return [row.rstrip() for _, row in sorted(rows.items())]


def test_it_shows_the_report_as_it_is_printed_now() -> None:
    report = shortened(report_of(from_record(RECORD), terminal=True, width=WIDTH))
    today = [Text.from_ansi(line).plain.rstrip() for line in report]
    assert "  How the socket came to be shared:" in today
    assert lines()[-len(today) :] == today, ANEW


def test_it_begins_with_what_the_application_has_seen() -> None:
    command, *said = lines()[: lines().index("")]
    assert command == f"$ {COMMAND}"
    alice, bob = USERS.values()
    assert re.search(rf"asked for {alice}, was shown {bob} \(\d+ times\)$", "\n".join(said), re.MULTILINE), ANEW
    assert re.search(rf"libpq: {RECORD['libpq']}$", "\n".join(said), re.MULTILINE), ANEW


def test_it_loads_nothing_and_runs_nothing() -> None:
    assert not re.search(r"https?:(?!//www\.w3\.org/2000/svg)|<script|@import|url\((?!#)", SVG)
