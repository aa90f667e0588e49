"""Which modules are compiled when pgguard is built, and in which form they run.

They run compiled or as pure Python, and do the same. Those that mypyc compiles are one group: they call each other
without going through the interpreter, and each needs all the others to be compiled, too. A few more stand there in C as
well, and are built with them. The build compiles what stands in :data:`MODULES` and :data:`WRITTEN_IN_C`, and whoever
wants to know the list reads it there. This module imports nothing, as the build reads it, too.
"""

from __future__ import annotations

import sys
from hashlib import sha256
from importlib import import_module
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Final, NamedTuple

MODULES: Final = (
    "pgguard.identity",
    "pgguard.wire.messages",
    "pgguard.session.backend",
    "pgguard.session.farewell",
    "pgguard.session.frontend",
    "pgguard.session.ledger",
    "pgguard.session.libpq",
    "pgguard.session.quiet",
    "pgguard.session.refusals",
    "pgguard.session.requests",
    "pgguard.session.senders",
    "pgguard.session.session",
    "pgguard.session.statements",
    "pgguard.session.states",
    "pgguard.session.tracker",
    "pgguard.session.verdicts",
    "pgguard.attribution.ebpf.account",
    "pgguard.attribution.ebpf.ring",
    "pgguard.proxy.ends",
    "pgguard.proxy.kernel_senders",
    "pgguard.proxy.relay",
    "pgguard.proxy.transport",
)
"""What moves and follows bytes: the relay's inner loop, the session core, and who has sent what. ``pgguard.session`` is
in it whole."""

WRITTEN_IN_C: Final = ("pgguard.attribution.ebpf.progress", "pgguard.proxy.sockets")
"""What calls the system for them, and reads what the kernel writes: the source in C of each is beside that in Python,
and has the same name."""

_GROUP: Final = "pgguard.native_"
_SUFFIX: Final = "__mypyc"
"""What mypyc adds to a group's name for that of its library."""


class Form(NamedTuple):
    """In which form the modules run."""

    compiled: tuple[str, ...]
    """Those that are compiled."""
    pure: tuple[str, ...]
    """Those that aren't."""
    stale: bool
    """They have been compiled from other sources than those that are there now."""

    def __str__(self) -> str:
        """As ``pgguard --version`` says it."""
        if not self.compiled:
            return "pure Python"
        said = "compiled by mypyc"
        if self.pure:
            said += f", but for {', '.join(self.pure)}"
        if self.stale:
            said += ", from sources that have changed since"
        return said


def form() -> Form:
    """Find out in which form the modules run here: from what is loaded, or would be."""
    by_form: dict[bool, list[str]] = {False: [], True: []}
    for name in (*MODULES, *WRITTEN_IN_C):
        spec = import_module(name).__spec__
        by_form[spec is not None and isinstance(spec.loader, ExtensionFileLoader)].append(name)
    compiled = by_form[True]
    return Form(tuple(compiled), tuple(by_form[False]), stale=bool(compiled) and _library() not in sys.modules)


def _library() -> str:
    package = import_module("pgguard").__path__[0]
    return group_name(Path(package).parent) + _SUFFIX


def group_name(root: Path) -> str:
    """The name of the group when it is compiled from the sources below ``root``: with other sources, it is another.

    Raises:
        OSError: They can't be read.
    """
    digest = sha256()
    for path in [*map(path_of, (*MODULES, *WRITTEN_IN_C)), *map(c_path_of, WRITTEN_IN_C)]:
        digest.update((root / path).read_bytes())
    return f"{_GROUP}{digest.hexdigest()[:16]}"


def path_of(module: str) -> str:
    """Where a module's source is below the directory that its package is in."""
    return f"{module.replace('.', '/')}.py"


def c_path_of(module: str) -> str:
    """Where its source in C is."""
    return f"{module.replace('.', '/')}.c"
