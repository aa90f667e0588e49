"""The project says under which licence it is, and what is loaded into the kernel says what the kernel wants to hear."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

from pgguard.attribution import ebpf
from pgguard.attribution.ebpf import bpf

_ROOT = Path(__file__).parent.parent
_KERNEL = "# SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only\n"
_OTHERS = "# SPDX-License-Identifier: Apache-2.0\n"


def test_the_licence_is_said_and_is_in_what_is_distributed() -> None:
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())
    assert project["project"]["license"] == "Apache-2.0"
    files = project["project"]["license-files"]
    assert files[0] == "LICENSE"
    assert all((_ROOT / file).is_file() for file in files)
    assert (_ROOT / "LICENSE").read_text().split()[:4] == ["Apache", "License", "Version", "2.0,"]
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {"/LICENSE", "/CHANGELOG.md"} <= set(included)
    installed = importlib.metadata.metadata("pgguard")
    assert installed["License-Expression"] == "Apache-2.0"
    assert installed.get_all("License-File") == files


def test_programs_for_the_kernel_are_under_a_licence_that_it_takes_for_compatible() -> None:
    room = Path(ebpf.__file__).parent
    for file in room.glob("*.py"):
        expected = _KERNEL if file.name in {"programs.py", "bpf.py"} else _OTHERS
        assert file.read_text().startswith(expected), file
    assert bpf._LICENSE == b"Dual MIT/GPL\0"
    assert '"Dual MIT/GPL"' in (room / "LICENSE").read_text()
