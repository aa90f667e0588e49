"""The harness that is guided by coverage, for a few seconds."""

from __future__ import annotations

import importlib.util
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pgguard.compiled import form
from tests.fuzz.corpus import DIRECTORY
from tests.servers import not_installed

_SECONDS = 10
_HAS_WHEELS = (
    sys.version_info[:2] == (3, 11)
    and sys.platform == "linux"
    and platform.machine() == "x86_64"
    and platform.python_implementation() == "CPython"
)
"""As the extra ``fuzz`` says it."""


def test_conversations_guided_by_coverage(tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        if _HAS_WHEELS:
            not_installed("atheris")
        pytest.skip("atheris isn't there for this Python")
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "tests.fuzz",
        "guided",
        "--seconds",
        str(_SECONDS),
        "--into",
        tmp_path,
    ]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], check=False, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(tmp_path.iterdir())
    executed = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    assert executed is not None, done.stderr
    assert int(executed[1]) > len(list(DIRECTORY.iterdir()))
    # Compiled code is fuzzed as well, but what of it is reached can't be seen.
    assert form().compiled or re.search(r"cov: [1-9]\d\d", done.stderr), "the core isn't instrumented"
