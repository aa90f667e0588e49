"""The files that reports are written to: checked before anything else is done, as a run may take an hour.

``-`` stands for standard output, as everywhere.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import quote

from pgguard.attribution.trust import UntrustedError
from pgguard.proxy.errors import ConfigurationError
from pgguard.reporting.opening import write_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pgguard.reporting.recorded import Recording

STANDARD: Final = Path("-")
"""Standard output, or input."""


class Outputs(NamedTuple):
    """Where reports on a recording are to be written."""

    html: Path | None = None
    css: Path | None = None
    """A file of its own for the style of the HTML, instead of within it."""
    markdown: Path | None = None

    def __bool__(self) -> bool:
        return any(path is not None for path in self)

    @property
    def on_standard_output(self) -> str | None:
        """The option of the one that goes to standard output."""
        return next((option for option, path in self._named() if path == STANDARD), None)

    def check(self, *others: tuple[str, Path | None]) -> None:
        """See whether everything can be written, before there is anything to write.

        Args:
            others: Other files that are read or written, by what they are called in messages.

        Raises:
            ConfigurationError: It can't, or two of them are the same file; the message says what to change.
        """
        if self.css is not None and self.html is None:
            raise ConfigurationError("--css is the style of a page: add --html")
        if STANDARD in {self.html, self.css} and self.css is not None:
            raise ConfigurationError("--css: a page and its style are two files: name both")
        taken: dict[object, str] = {}
        for name, path in others:
            # What comes from standard input doesn't stand in the way of what goes to standard output.
            if path is not None and path != STANDARD and (place := _place(path)) is not None:
                taken[place] = name
        for option, path in self._named():
            _check(option, path)
            place = _place(path)
            if place is None:
                continue
            if place in taken:
                raise ConfigurationError(f"{option} {path}: {taken[place]} is the same file: give each one of its own")
            taken[place] = option

    def write(self, recording: Recording, notes: Sequence[str] = ()) -> list[Path]:
        """Write them; returns the files.

        Args:
            recording: What has been recorded.
            notes: What else a page is to say at its top, of how it was recorded: sentences.

        Raises:
            ConfigurationError: One can't be written.
        """
        written: list[Path] = []
        if self.markdown is not None:
            from pgguard.reporting.markdown import to_markdown  # noqa: PLC0415 - each takes its time to load

            written += _write("--markdown", self.markdown, to_markdown(recording))
        if self.html is not None:
            from pgguard.reporting.page import html_report, style_sheet  # noqa: PLC0415 - likewise

            link = None
            if self.css is not None:
                link = quote(os.path.relpath(self.css, self.html.parent))
                written += _write("--css", self.css, style_sheet())
            written += _write("--html", self.html, html_report(recording, stylesheet=link, notes=notes))
        return written

    def _named(self) -> Iterator[tuple[str, Path]]:
        for option, path in (("--html", self.html), ("--css", self.css), ("--markdown", self.markdown)):
            if path is not None:
                yield option, path


def _check(option: str, path: Path) -> None:
    if path == STANDARD:
        return
    try:
        facts = path.stat()
    except FileNotFoundError:
        _check_directory(option, path)
    except OSError as error:
        raise ConfigurationError(f"{option} {path}: {error.strerror}") from error
    else:
        if stat.S_ISDIR(facts.st_mode):
            raise ConfigurationError(f"{option} {path}: it is a directory: name a file")
        if not os.access(path, os.W_OK):
            raise ConfigurationError(f"{option} {path}: this user may not write to it: name another file")


def _check_directory(option: str, path: Path) -> None:
    directory = path.parent
    if not directory.is_dir():
        raise ConfigurationError(f"{option} {path}: there is no directory {directory}: create it, or name another file")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigurationError(f"{option} {path}: this user may not create files in {directory}: name another file")


def _place(path: Path) -> object:
    """What two names of one file have in common; ``None`` for what can be written to by several: a device, a pipe."""
    if path == STANDARD:
        return STANDARD
    try:
        facts = path.stat()
    except OSError:
        return path.absolute().parent.resolve() / path.name
    return (facts.st_dev, facts.st_ino) if stat.S_ISREG(facts.st_mode) else None


def _write(option: str, path: Path, text: str) -> list[Path]:
    if path == STANDARD:
        write_out(text)
        return []
    try:
        write_file(path, text)
    except UntrustedError as error:
        raise ConfigurationError(f"{option}: can't write {path}: {error}") from error
    except OSError as error:
        raise ConfigurationError(f"{option}: can't write {path}: {error.strerror}") from error
    return [path]


def write_out(text: str) -> None:
    """Write what programs read to standard output: in UTF-8, whatever the terminal's encoding is."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace", newline="\n")
    sys.stdout.write(text)
