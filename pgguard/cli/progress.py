"""A line that says what is going on, for as long as it takes: on standard error, and if that is a terminal."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def progress(doing: str, *, moving: bool = True) -> Iterator[Callable[[str], None]]:
    """Say what is going on until the context is left; then the line is gone.

    Args:
        doing: What is being done; an ellipsis is added.
        moving: Show a moving sign, which takes a thread. Without it no thread is started.

    Yields:
        A function that takes what is being done from then on.
    """
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal or console.is_dumb_terminal:
        yield _say_nothing
    elif moving:
        with console.status(f"{doing}…") as status:
            yield lambda doing: status.update(f"{doing}…")
    else:
        line = Text(f"{doing}…")
        # Nothing is printed meanwhile, and so nothing has to be kept apart from the line.
        with Live(
            line, console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        ) as live:
            yield lambda doing: live.update(Text(f"{doing}…"), refresh=True)


def _say_nothing(doing: str) -> None:
    """Nobody is there to read it."""
