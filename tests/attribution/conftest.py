from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pgguard.attribution.namespaces import TABLE_LIMIT
from tests.attribution.puppets import Puppet


@pytest.fixture
def puppet() -> Iterator[Callable[[], Puppet]]:
    """Starts processes that do what they are told; all are gone at the end of the test."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(Puppet())


@pytest.fixture
def _few_sockets() -> None:
    """Of a table with thousands of sockets not all is read, and other tests leave as many in TIME-WAIT for a minute."""
    deadline = time.monotonic() + 90
    while len(Path("/proc/net/tcp").read_bytes()) > TABLE_LIMIT / 2 and time.monotonic() < deadline:
        time.sleep(1)
