"""What is added to an environment so that Ruby loads the file, wherever it is, and keeps what stands there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pgguard.attribution.ruby.loading import ANSWERING, FILE, UnloadableError, closed_to_others, ruby_variables
from tests.integration.running import interpreter

if TYPE_CHECKING:
    from collections.abc import Mapping

PIPES = Path("/run/pipes")


def features(environ: Mapping[str, str]) -> list[str]:
    """The files of that name that a Ruby has loaded, and what it has of the variables that it knew before."""
    script = 'puts $LOADED_FEATURES.grep(/pgguard_ruby_stacks/), $VERBOSE.inspect, $LOAD_PATH.include?("/other")'
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RUBY")}
    command = [interpreter("ruby"), "-e", script]
    done = subprocess.run(command, env={**plain, **environ}, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_ruby_loads_the_file_that_is_in_the_package() -> None:
    added = ruby_variables({}, PIPES)
    assert added == {"PGGUARD_RUBY_STACKS_DIR": "/run/pipes", "RUBYOPT": f"-r{FILE}"}
    assert features(added) == [str(FILE), "false", "false"]


@pytest.mark.parametrize("name", ["plain", "with blanks  in it", "with\ttab", "with:colon", "ünï"])
def test_ruby_loads_it_from_wherever_it_is_and_keeps_its_options(name: str, tmp_path: Path) -> None:
    directory = tmp_path / name
    directory.mkdir()
    file = Path(shutil.copy(FILE, directory))
    before = {"RUBYOPT": "-w -I/other", "RUBYLIB": "/third"}
    added = ruby_variables(before, PIPES, file)
    assert features({**before, **added}) == [str(file), "true", "true"]
    assert "/third" in {**before, **added}["RUBYLIB"].split(":")


def test_a_path_that_can_not_be_named_is_said_to_be_so() -> None:
    with pytest.raises(UnloadableError, match="blanks and a colon"):
        ruby_variables({}, PIPES, Path("/a b:c/pgguard_ruby_stacks.rb"))


def test_it_is_said_who_else_can_load_it(tmp_path: Path) -> None:
    file = Path(shutil.copy(FILE, tmp_path))
    for directory in tmp_path.parents:
        if not directory.stat().st_mode & 0o001:
            assert closed_to_others(file) in tmp_path.parents
    tmp_path.chmod(0o750)
    file.chmod(0o644)
    assert closed_to_others(file) in {tmp_path, *tmp_path.parents}


def test_the_threads_name_is_the_one_that_it_is_known_by() -> None:
    assert f'NAME = "{ANSWERING}"' in FILE.read_text()
    assert len(ANSWERING.encode()) <= 15
