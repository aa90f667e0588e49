"""The build: compiled where that can be done, pure Python everywhere else, and it says why."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import TYPE_CHECKING, Final
from zipfile import ZipFile

import pytest

import pgguard.session
from pgguard import compiled
from pgguard.compiled import MODULES, WRITTEN_IN_C, Form, c_path_of, form, group_name, path_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT: Final = Path(__file__).parents[1]
SOURCES: Final = {*map(path_of, (*MODULES, *WRITTEN_IN_C)), *map(c_path_of, WRITTEN_IN_C)}


def test_the_session_core_is_in_the_group_whole() -> None:
    room = Path(pgguard.session.__file__ or "").parent
    sources = {f"pgguard.session.{path.stem}" for path in room.glob("*.py")} - {"pgguard.session.__init__"}
    assert sources <= set(MODULES)
    assert len(set(MODULES)) == len(MODULES)


@pytest.mark.parametrize(
    ("listed", "found", "said"),
    [
        (("json", "string"), Form((), ("json", "string"), stale=False), "pure Python"),
        (("_json",), Form(("_json",), (), stale=True), "compiled by mypyc, from sources that have changed since"),
        (
            ("json", "_json", "string"),
            Form(("_json",), ("json", "string"), stale=True),
            "compiled by mypyc, but for json, string, from sources that have changed since",
        ),
    ],
)
def test_the_form_is_that_of_what_is_loaded(
    listed: Sequence[str], found: Form, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "MODULES", listed[:-1])
    monkeypatch.setattr(compiled, "WRITTEN_IN_C", listed[-1:])
    monkeypatch.setattr(compiled, "group_name", lambda _: "pgguard.native_0")
    assert form() == found
    assert str(found) == said


def test_what_was_compiled_from_other_sources_can_be_told(tmp_path: Path) -> None:
    for source in SOURCES:
        path = tmp_path / source
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / source, path)
    names = {group_name(ROOT)}
    assert {group_name(tmp_path)} == names
    for source in path_of(MODULES[-1]), path_of(WRITTEN_IN_C[-1]), c_path_of(WRITTEN_IN_C[-1]):
        with (tmp_path / source).open("a") as file:
            file.write("\n")
        names.add(group_name(tmp_path))
    assert len(names) == 4


# The build itself, by what an installer calls

WITHOUT_COMPILER: Final = {"CC": "", "PATH": "/nonexistent"}


def _build(
    call: str, variables: Mapping[str, str] | None = None, *, root: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Call hatchling as an installer does; what it returns is printed last."""
    code = f"from hatchling import build; print(build.{call})"
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        check=False,
        cwd=root,
        env=os.environ | {"PGGUARD_BUILD": "", "PIP_BUILD_TRACKER": "1"} | {**(variables or {})},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What the build takes of the checkout."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / "pgguard", tree / "pgguard", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in "pyproject.toml", "README.md", "LICENSE", ".gitignore":
        shutil.copyfile(ROOT / name, tree / name)
    return tree


def _names(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_without_a_compiler_the_wheel_is_pure_and_nothing_is_asked_for(tmp_path: Path) -> None:
    done = _build(f"build_wheel({str(tmp_path)!r})", WITHOUT_COMPILER)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "pgguard is built as pure Python, which is slower, as there is no C compiler\n"
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = _names(wheel)
    assert names >= SOURCES
    assert "pgguard/compiling.py" not in names
    assert not [name for name in names if name.endswith(".so")]
    done = _build("get_requires_for_build_wheel()", WITHOUT_COMPILER)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def test_the_variable_forces_either() -> None:
    """What compiling takes is asked for where it is going to be done."""
    for variables, asked in (({"PGGUARD_BUILD": "pure"}, False), ({"PGGUARD_BUILD": "compiled", "CC": "true"}, True)):
        done = _build("get_requires_for_build_wheel()", variables)
        assert ("mypy" in done.stdout) == asked, done


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"PGGUARD_BUILD": "fast"}, "PGGUARD_BUILD=fast: it can be auto, pure or compiled\n"),
        (
            {"PGGUARD_BUILD": "compiled", **WITHOUT_COMPILER},
            "PGGUARD_BUILD=compiled: pgguard can't be compiled here: there is no C compiler\n",
        ),
    ],
    ids=["unknown", "no compiler"],
)
def test_what_can_not_be_is_an_error_of_one_line(variables: dict[str, str], said: str, tmp_path: Path) -> None:
    done = _build(f"build_wheel({str(tmp_path)!r})", variables)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("wish", ["auto", "compiled"])
def test_compiling_that_fails(wish: str, tmp_path: Path) -> None:
    """It may be that mypyc is missing, or refuses what it is given."""
    (tmp_path / "mypyc.py").write_text('raise ImportError("there is no mypyc")\n')
    out = tmp_path / "out"
    done = _build(f"build_wheel({str(out)!r})", {"PGGUARD_BUILD": wish, "CC": "true", "PYTHONPATH": str(tmp_path)})
    why = "compiling failed: ImportError: there is no mypyc\n"
    if wish == "auto":
        assert done.returncode == 0
        assert done.stderr.endswith(f"pgguard is built as pure Python, which is slower, as {why}")
        assert [path.name for path in out.iterdir()] == [done.stdout.splitlines()[-1]]
        assert done.stdout.endswith("-py3-none-any.whl\n")
    else:
        assert done.returncode == 1
        assert done.stderr.endswith(f"PGGUARD_BUILD=compiled: pgguard can't be compiled here: {why}")


def test_an_editable_installation_runs_the_sources(tree: Path, tmp_path: Path) -> None:
    """Whatever an earlier one has compiled, it would go on running when they change."""
    left = [tree / f"pgguard/session/ledger{EXTENSION_SUFFIXES[0]}", tree / "pgguard/native_0__mypyc.abi3.so"]
    for path in left:
        path.touch()
    done = _build(f"build_editable({str(tmp_path / 'out')!r})", {"CC": "true"}, root=tree)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("-py3-none-any.whl\n")
    assert not any(path.exists() for path in left)


def test_what_is_distributed_as_source_can_be_built(tree: Path, tmp_path: Path) -> None:
    (tree / f"pgguard/session/ledger{EXTENSION_SUFFIXES[0]}").touch()
    done = _build(f"build_sdist({str(tmp_path / 'out')!r})", root=tree)
    assert done.returncode == 0, done.stderr
    [archive] = (tmp_path / "out").iterdir()
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    assert not [*unpacked.rglob("*.so")]
    done = _build(f"build_wheel({str(tmp_path / 'wheels')!r})", {"PGGUARD_BUILD": "pure"}, root=unpacked)
    assert done.returncode == 0, done.stderr
    [wheel] = (tmp_path / "wheels").iterdir()
    assert _names(wheel) >= SOURCES
