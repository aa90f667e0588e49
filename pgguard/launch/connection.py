"""What stands somewhere in a text and tells a program where its PostgreSQL is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pgguard.proxy.addresses import Address

Edit = tuple[int, int, str]
"""From which character to before which other one, and what is to stand there instead."""


Lead = Callable[["Address", Mapping[str, str]], list[Edit]]
"""Gives the edits that lead to an address, with settings, by their names here, that are to be others besides."""

Pin = Callable[[Sequence["Address"]], list[Edit]]
"""Gives the edits that say in full where it leads now, which are these addresses."""


def _all_said(_: Sequence[Address]) -> list[Edit]:
    return []


@dataclass(frozen=True, slots=True)
class Connection:
    """An address of PostgreSQL in a text."""

    said: Mapping[str, str]
    """Where it leads, in libpq's form, as far as it is said: ``host``, ``hostaddr``, ``port`` and ``service``; and its
    ``passfile``."""
    lead: Lead
    """How to lead it elsewhere."""
    what: str
    """What it is, for a message."""
    tcp_only: bool = False
    """It can't lead to a Unix socket."""
    own_defaults: bool = False
    """Its driver fills in ``localhost`` and 5432, and not what libpq's variables say."""
    pin: Pin = _all_said
    """How to make it independent of libpq's variables."""

    @property
    def follows_libpq(self) -> bool:
        """Whether it is a URL that leaves all of it to libpq's variables."""
        return not self.said.keys() - {"passfile"} and not self.own_defaults and self.what == "URL"


def edited(text: str, edits: Iterable[Edit]) -> str:
    """A text with edits that don't overlap."""
    done, said = 0, []
    for start, end, instead in sorted(edits):
        said += [text[done:start], instead]
        done = end
    return "".join([*said, text[done:]])
