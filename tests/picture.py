"""The picture at the top of the README: what a terminal shows of a real misuse, a little shortened.

    python -m tests.picture

runs the demonstration's application behind ``pgguard run``, in front of an embedded PostgreSQL, keeps what was
recorded as ``docker/report.jsonl``, and draws ``docker/report.svg``. The tests compare the two, so that a picture of a
report that looks different by now is noticed. Python's paths are in the records: let it be one that is installed where
anybody's may be.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.text import Text

from pgguard.demo import app
from pgguard.demo.postgres import embedded_bindir, running_cluster
from pgguard.reporting.console import report_of
from pgguard.reporting.readback import from_record

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

WIDTH: Final = 104
"""Columns."""
DOCKER: Final = Path(__file__).parents[1] / "docker"
RECORDS: Final = DOCKER / "report.jsonl"
PICTURE: Final = DOCKER / "report.svg"
COMMAND: Final = "pgguard run -- python3 app.py"

_OMITTED: Final = ("Session", "Recent requests", "To see which code it was")
"""Sections that the picture is without."""
_DETAIL: Final = re.compile(r" +(command: |#\d|> #\d+ <module> |… \d+ calls? in libraries)")
"""Lines that it is without: in a stack those of libraries, and where a file is begun."""
_FORMAT: Final = """\
<svg class="{unique_id}-matrix" xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {width} {height}">
<title>pgguard's report on a connection that two processes share</title>
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; \
font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
"""Rich's own without fonts from elsewhere, which no picture in a page may load."""


def shortened(report: str) -> Iterator[str]:
    """The lines of a report that have room in a picture."""
    section = ""
    for line in report.splitlines():
        plain = Text.from_ansi(line).plain.rstrip()
        if re.match(r"  \S.*:$", plain):
            section = plain[2:]
            if section.startswith(_OMITTED):
                continue
        if section.startswith(_OMITTED) or plain.startswith(("=", "SUMMARY")) or _DETAIL.match(plain):
            continue
        if section == "What to change:" and not plain:
            yield "    … and the code to paste"
            return
        yield line


def picture(said: Iterable[str], record: dict[str, Any]) -> str:
    """Draw what the application has said and the report of a fault; returns an SVG."""
    lines = [f"$ {COMMAND}", *said, ""]
    report = report_of(from_record(record), terminal=True, width=WIDTH)
    console = Console(file=io.StringIO(), record=True, width=WIDTH, force_terminal=True, color_system="truecolor")
    for line in (*lines, *shortened(report)):
        console.print(Text.from_ansi(line), no_wrap=True, crop=False)
    svg = console.export_svg(title=COMMAND, code_format=_FORMAT, unique_id="pgguard", font_aspect_ratio=0.61)
    return re.sub(r" +$", "", svg, flags=re.MULTILINE)


def counted(said: Sequence[str]) -> list[str]:
    """What an application has said: each line once, in order, and how often."""
    return [line if (n := said.count(line)) == 1 else f"{line} ({n} times)" for line in dict.fromkeys(said)]


def _run(directory: Path) -> list[str]:
    """Run the application behind a guard, and record; returns what it has said."""
    shutil.copy(app.__file__, directory / "app.py")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with running_cluster(embedded_bindir(), settings={"listen_addresses": "127.0.0.1"}, port=54399) as cluster:
        url = f"postgresql://postgres@127.0.0.1:{cluster.port}/postgres"
        variables = {"DATABASE_URL": url, "PGGUARD_FAULTS": "faults.jsonl", "PGGUARD_EVIDENCE_BUDGET": "1"}
        done = subprocess.run(
            COMMAND.split(),
            cwd=directory,
            env={"PATH": path, "HOME": str(directory), **variables},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    return counted(done.stdout.splitlines())


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="app-") as name:
        said = _run(Path(name))
        records = (Path(name) / "faults.jsonl").read_text()
    [shared, *_] = [one for one in map(json.loads, records.splitlines()) if one["kind"] == "shared-by-processes"]
    RECORDS.write_text(records)
    PICTURE.write_text(picture(said, shared))


if __name__ == "__main__":
    main()
