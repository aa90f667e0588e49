"""Programs in other languages for the tests: what Go builds, and what npm installs."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.servers import not_installed

_LIB_PQ = Path("/usr/share/gocode/src/github.com/lib/pq/go.mod")
_NPM_PACKAGES = ("pg@8.23.1", "postgres@3.4.9")
_SECONDS = 120


def go_program(source: Path, directory: Path) -> Path:
    """Build a program in Go that uses Debian's lib/pq, and return where it is."""
    go = shutil.which("go")
    if go is None or not _LIB_PQ.exists():
        not_installed("Go with golang-github-lib-pq-dev")
    program = directory / source.name
    offline = {"GOPROXY": "off", "GOFLAGS": "-mod=mod", "GONOSUMDB": "*", "GONOSUMCHECK": "1", "GOTOOLCHAIN": "local"}
    built = directory / f"{source.name}-source"
    shutil.copytree(source, built)
    done = subprocess.run(
        [go, "build", "-o", program, "."],
        cwd=built,
        env=os.environ | offline,
        check=False,
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return program


def node_directory() -> Path:
    """A directory with node-postgres and postgres.js in its ``node_modules``, of fixed versions."""
    return npm_directory(*_NPM_PACKAGES)


@functools.cache
def npm_directory(*packages: str) -> Path:
    """A directory with these packages, of the versions that are named, in its ``node_modules``.

    It is kept between runs of the tests.
    """
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        not_installed("Node.js with npm")
    directory = Path(tempfile.gettempdir()) / f"pgguard-tests-{os.getuid()}-{'-'.join(packages).replace('@', '-')}"
    if directory.exists():
        return directory
    with tempfile.TemporaryDirectory(prefix="pgguard-npm-") as name:
        fresh = Path(name) / "node"
        fresh.mkdir()
        done = subprocess.run(
            [npm, "install", "--no-audit", "--no-fund", "--ignore-scripts", "--save-exact", *packages],
            cwd=fresh,
            check=False,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        with contextlib.suppress(OSError):  # another run of the tests was quicker
            fresh.rename(directory)
    return directory
