"""What the README tells people to type works as it is pasted, one block after the other."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from pgguard.proxy.settings import IN_FILE_ALONE, Settings, load_settings
from tests.cli.pasted import pasted
from tests.servers import is_open_to_others

README = (Path(__file__).parents[2] / "README.md").read_text()
INSTALL, *BLOCKS = [
    block for block in re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL) if "pytest" not in block
]
"""How it is installed, and what is typed into the same shell afterwards; the command for the tests is CI's to try."""

VENV = f"""#!/bin/sh
[ "$*" = "-m venv .venv" ] || exec {sys.executable} "$@"
mkdir -p .venv/bin
cat > .venv/bin/activate <<'END'
PATH={Path(sys.executable).parent}:$PATH
pip() {{ [ "$*" = "install .[demo]" ]; }}
pgguard() {{ [ "$*" = demo ] || command pgguard "$@"; }}
END
"""
"""A ``python3`` whose virtual environments are the one that the tests run in. The demonstration has its own tests."""


@pytest.mark.parametrize("block", BLOCKS, ids=[re.sub(r"\W+", " ", block)[:50] for block in BLOCKS])
def test_a_block_works_as_it_is_pasted(block: str, tmp_path: Path) -> None:
    root = "useradd" in block
    if root and not is_open_to_others():
        pytest.skip("the installation is where only root may read")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "python3").write_text(VENV)
    (programs / "python3").chmod(0o755)
    system = [part for part in os.environ["PATH"].split(":") if shutil.which("pgguard", path=part) is None]
    path = ":".join([str(programs), *system])
    (tmp_path / "home").mkdir()
    (tmp_path / "home/faults.jsonl").touch()  # what an earlier block has written
    said = pasted(f"{INSTALL}\n{block}", tmp_path, root=root, path=path)
    assert "command not found" not in said
    assert ("pgguard: ready on " in said) is ("pgguard serve" in block), said


def test_without_the_first_block_there_is_no_such_command(tmp_path: Path) -> None:
    """Or what the others show is nothing."""
    system = [part for part in os.environ["PATH"].split(":") if shutil.which("pgguard", path=part) is None]
    assert "command not found" in pasted("pgguard --version || true", tmp_path, path=":".join(system))


def test_the_configuration_file_is_one(tmp_path: Path) -> None:
    [block] = re.findall(r"^```toml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (tmp_path / "pgguard.toml").write_text(block)
    settings = load_settings({}, tmp_path / "pgguard.toml")
    assert settings.fronts()
    settings.policies()


def test_every_option_of_the_command_line_is_in_its_table() -> None:
    for name in Settings.model_fields.keys() - IN_FILE_ALONE:
        assert re.search(rf"^\| `--{name.replace('_', '-')}[ `]", README, re.MULTILINE), name
        assert f"`PGGUARD_{name.upper()}`" in README
