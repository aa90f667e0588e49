"""Who sends: a thread, by the one name that all rooms have for it.

The kernel names senders (:mod:`pgguard.attribution.ebpf.account`, ``SCM_CREDENTIALS`` of unix(7)), the session core
compares them, and records show them.
"""

from __future__ import annotations

from typing import NamedTuple


class Sender(NamedTuple):
    """The process, and where it is known the thread, that sent a chunk of bytes; in the guard's pid namespace."""

    pid: int
    tid: int | None = None
    sampled: bool = False
    """The kernel didn't name it: it was seen to begin to wait for the answer."""
