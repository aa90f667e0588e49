from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.attribution.puppets import Puppet


@pytest.fixture
def puppet() -> Iterator[Callable[[], Puppet]]:
    """Starts processes that do what they are told; all are gone at the end of the test."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(Puppet())
