"""``pgguard report``: what recorded faults say, in the form that somebody can read, or some service can take."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pgguard.cli.options import FORMATS, one_of, threshold
from pgguard.cli.outputs import write_out
from pgguard.cli.statuses import DONE, FAULT_SEEN
from pgguard.faults.catalogue import Severity
from pgguard.faults.text import counted, listed, printable
from pgguard.proxy.errors import ConfigurationError
from pgguard.reporting.github import harmless, to_github
from pgguard.reporting.places import Sources
from pgguard.reporting.recorded import RecordingError, read_recording
from pgguard.reporting.text import to_text

if TYPE_CHECKING:
    from pgguard.cli.outputs import Outputs
    from pgguard.reporting.recorded import Recording


def report(
    source: Path, outputs: Outputs, *, form: str | None = None, fail_on: str | None = None, root: Path | None = None
) -> int:
    """Read recorded faults, and write reports on them; return the exit status.

    Args:
        source: The file that ``--faults`` has written; ``-``: standard input.
        outputs: Files to be written.
        form: What is to be printed, one of ``FORMATS``; ``None``: text, unless a file is to be written.
        fail_on: From which severity on a fault makes the status :data:`~pgguard.cli.statuses.FAULT_SEEN`, and a test
            case of JUnit's fail: one of ``FAIL_ON``. ``None``: the status is 0 whatever was found, and errors fail.
        root: Where the application's sources are, as they are called where it runs. ``None``: what GitHub calls its
            workspace, or this directory.

    Raises:
        ConfigurationError: Something can't be read or written, or makes no sense.
    """
    if form is None and not outputs:
        form = "text"
    if form is not None:
        form = one_of("--format", form, FORMATS)
        if (option := outputs.on_standard_output) is not None:
            raise ConfigurationError(f"--format {form} and {option} - both go to standard output: name a file")
    enough = Severity.ERROR if fail_on is None else threshold(fail_on)
    outputs.check(("FAULTS.jsonl", source))
    try:
        recording = read_recording(source)
    except RecordingError as error:
        raise ConfigurationError(str(error)) from error
    for trouble in recording.troubles:
        _say(f"{recording.name}: {trouble}")
    written = outputs.write(recording)
    match form:
        case None:
            _say(
                f"{_verdict(recording)}: see {listed([str(path) for path in written])}"
                if written
                else _verdict(recording)
            )
        case "text":
            for piece in to_text(recording, terminal=sys.stdout.isatty()):
                sys.stdout.write(piece)
        case "junit":
            _print_junit(recording, enough)
        case "github":
            _print_github(recording, _sources(root), outputs.markdown)
        case _:
            _print_sarif(recording, _sources(root))
    worst = max((count.severity.rank for count in recording.counts), default=-1)
    seen = fail_on is not None and enough is not None and worst >= enough.rank
    return FAULT_SEEN if seen else DONE


def _sources(root: Path | None) -> Sources:
    given = root or Path(os.environ.get("GITHUB_WORKSPACE", ""))
    return Sources(str(given.absolute()))


def _print_junit(recording: Recording, fail_on: Severity | None) -> None:
    from pgguard.reporting.junit import to_junit  # noqa: PLC0415 - each takes its time to load

    write_out(to_junit(recording, fail_on=fail_on))


def _print_sarif(recording: Recording, sources: Sources) -> None:
    from pgguard.reporting.sarif import to_sarif  # noqa: PLC0415 - likewise

    made = to_sarif(recording, sources)
    write_out(f"{made.text}\n")
    causes = counted(len(recording.causes), "cause")
    if made.placeless:
        _say(
            f"{made.placeless} of {causes} {'is' if made.placeless == 1 else 'are'} no result in the SARIF file but a "
            "notification: nobody was seen in the application's own code"
        )
    if made.left_out:
        _say(f"{made.left_out} of {causes} had no room in the SARIF file")


def _print_github(recording: Recording, sources: Sources, markdown: Path | None) -> None:
    made = to_github(recording, sources)
    write_out(made.text)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        if markdown is None or not _are_the_same(Path(summary), markdown):
            _add_to_summary(recording, Path(summary))
    elif made.left_out:
        causes = counted(made.left_out, "more cause")
        _say(f"{causes}: a step shows ten annotations of each level; add --markdown OUT.md to see all")


def _are_the_same(path: Path, other: Path) -> bool:
    return path.exists() and other.exists() and path.samefile(other)


def _add_to_summary(recording: Recording, path: Path) -> None:
    """Add the whole to what a step says of itself, as far as it has room there."""
    from pgguard.reporting.markdown import STEP_SUMMARY, to_markdown  # noqa: PLC0415 - likewise

    try:
        with path.open("a", encoding="utf-8", errors="replace", newline="\n") as file:
            room = STEP_SUMMARY - file.tell()
            file.write(to_markdown(recording, limit=room, size=lambda text: len(text.encode("utf-8", "replace"))))
    except OSError as error:
        _say(f"the job's summary can't be written: GITHUB_STEP_SUMMARY: {error.strerror}")


def _verdict(recording: Recording) -> str:
    if not recording.times:
        return "no faults"
    return f"{counted(recording.times, 'fault')} from {counted(len(recording.causes), 'cause')}"


def _say(text: str) -> None:
    sys.stderr.write(harmless(f"pgguard: {printable(text)}\n"))
