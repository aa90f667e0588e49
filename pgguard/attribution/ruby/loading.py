"""What is added to a program's environment, so that its Ruby processes tell what their threads do.

Ruby loads what ``RUBYOPT`` names with ``-r`` as it starts, and so does every Ruby that it starts, whatever starts them:
Bundler, a shell, a supervisor. ``RUBYOPT`` is split at each white space, and there is no way to quote one
(``moreswitches()`` in Ruby's ``ruby.c``). So where the path of the file has any, its directory goes into ``RUBYLIB``,
whose directories are separated by colons.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

DIRECTORY: Final = "PGGUARD_RUBY_STACKS_DIR"
"""The variable that says where the pipes are."""
FILE: Final = Path(__file__).absolute().with_name("pgguard_ruby_stacks.rb")
"""What Ruby loads."""

ANSWERING: Final = "pgguard stacks"
"""What the thread is called in which it answers: ``NAME`` there."""


class UnloadableError(Exception):
    """Ruby can't load the file: the message is a clause that says why, and what to do."""


def ruby_variables(environ: Mapping[str, str], directory: Path, file: Path = FILE) -> dict[str, str]:
    """The variables to add to an environment, or to change in it; what stands in them already is kept.

    Args:
        environ: the environment.
        directory: where the pipes are.
        file: what Ruby is to load.

    Raises:
        UnloadableError: there is no way to name the file.
    """
    path = str(file)
    added = {DIRECTORY: str(directory)}
    if re.search(r"\s", path) is None:
        name = path
    elif ":" in path:
        raise UnloadableError(
            f"Ruby can't be told to load {path}, as there are blanks and a colon in it: install pgguard elsewhere"
        )
    else:
        name = file.stem
        added["RUBYLIB"] = _joined(":", str(file.parent), environ.get("RUBYLIB"))
    added["RUBYOPT"] = _joined(" ", environ.get("RUBYOPT"), f"-r{name}")
    return added


def closed_to_others(file: Path = FILE) -> Path | None:
    """The first directory on the way to the file, or the file, that other users may not enter or read.

    A program that is started as another user, by a wrapper that keeps the environment, could not load the file then,
    and Ruby would not start. ``None`` if there is none.
    """
    for path in (*reversed(file.parents), file):
        wanted = stat.S_IROTH if path == file else stat.S_IXOTH
        if not path.stat().st_mode & wanted:
            return path
    return None


def _joined(separator: str, *parts: str | None) -> str:
    return separator.join(part for part in parts if part)
