"""Which calls of a Ruby stack are the application's own.

Told by the files alone, as Ruby knows them: what RubyGems, Bundler and distributions install is a library's, and so is
Ruby's own. All else is the application's, with these exceptions:

- a method that is written in C has no file. Ruby gives it the file and the line that it was called from, those of the
  next outer call. So a method that seems to be where its caller is isn't the application's own, but a block is;
- a call without a file (``<internal:kernel>``, ``(eval)``) is nobody's. But what is given to ``ruby -e``, piped into
  Ruby or typed at a prompt is the application's;
- the script that an installer puts into ``bin`` to start a program (puma, sidekiq) does nothing but load it.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pgguard.attribution.frames import Frame

MAIN: Final = frozenset({"<main>", "<top (required)>"})
"""What the code of a file is called that is in no method."""
LIBRARY: Final = re.compile(
    r"""
      /gems/[^/]+-\d[^/]*/                    # a gem, wherever RubyGems or Bundler has put it
    | /bundler/gems/                          # one that Bundler has checked out
    | /lib(?:32|64)?/(?:[\w.-]+/)?ruby/       # the standard library, and what distributions put beside it
    | /share/(?:rubygems-integration|ruby|gems)/
    | /vendor/bundle/
    """,
    re.VERBOSE,
)
HOME: Final = re.compile(
    r"^.*/(?:gems/(?=[^/]+-\d[^/]*/)|bundler/gems/|ruby/(?:vendor_ruby|(?:site_ruby/)?\d+\.\d+\.\d+|site_ruby)/)(?=.)"
)
"""What libraries are beneath."""
LOOP: Final = r"async/(?:scheduler|reactor)|eventmachine|io/event/selector(?:/select)?|libev_scheduler|polyphony/\w+"
"""Event loops, without ``.rb``: what has started one says nothing about what is being waited for in it."""
_PARTS: Final = ("block ", "rescue in ", "ensure in ", "<")
"""How the names of calls begin that are within a method, or a file."""
_FILELESS: Final = ("<", "(")
_TYPED: Final = re.compile(r"-e?$|\((?:irb|pry)\)$")
"""Code that somebody has written without a file for it."""
_SCRIPT: Final = re.compile(r"/bin/[^/.]+$")
_LOADS: Final = frozenset({"load", "require"})


def told_apart(frames: Sequence[Frame]) -> tuple[Frame, ...]:
    """The calls of one stack, the innermost first, with the application's own marked."""
    own = [_is_own(frame.file) for frame in frames]
    for n, (frame, outer) in enumerate(pairwise(frames)):
        if (frame.file, frame.line) == (outer.file, outer.line) and not frame.function.startswith(_PARTS):
            own[n] = False
    if _is_launcher(frames):
        last = frames[-1].file
        own = [mark and frame.file != last for mark, frame in zip(own, frames, strict=True)]
    return tuple(frame._replace(application=mark) for frame, mark in zip(frames, own, strict=True))


def _is_own(file: str) -> bool:
    if _TYPED.match(file) is not None:
        return True
    return file != "" and not file.startswith(_FILELESS) and LIBRARY.search(f"/{file}") is None


def _is_launcher(frames: Sequence[Frame]) -> bool:
    """Whether the outermost call is of a script that only loads a program: ``/usr/bin/puma``, ``bin/rails``."""
    if len(frames) < 2 or _SCRIPT.search(frames[-1].file) is None:
        return False
    return frames[-2].function.rpartition("#")[2] in _LOADS
