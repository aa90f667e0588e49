"""The build's hook: has the modules of :mod:`pgguard.compiled` compiled, where that can be done.

hatchling runs it when a wheel is built (``pyproject.toml``); it isn't installed. Where something is missing, or fails,
the wheel is pure Python, and a line says why: nothing but Python is needed to install pgguard. What compiling takes
beside a C compiler is asked for only where there is one.

``PGGUARD_BUILD`` decides otherwise: ``pure`` compiles nothing, and with ``compiled`` the build fails where nothing can
be compiled; ``auto`` is the default. An editable installation runs the sources as they are, so it is pure unless
``compiled`` is said. Then the extension modules are put beside the sources, and hold until the next installation.
:class:`pgguard.compiled.Form` tells when a source has changed since.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_ROOT: Final = Path(__file__).parent.parent
sys.path.insert(0, str(_ROOT))

from pgguard.compiled import MODULES, WRITTEN_IN_C, c_path_of, group_name, path_of  # noqa: E402 - the tree that is being built

VARIABLE: Final = "PGGUARD_BUILD"
_AUTO: Final = "auto"
_PURE: Final = "pure"
_COMPILED: Final = "compiled"

_REQUIREMENTS: Final = ("mypy>=2.4,<2.5", "setuptools>=75")
_READY_BUILT: Final = ("x86_64", "aarch64")
_LATEST: Final = (3, 14)
"""For these machines and versions of Python, mypy comes ready-built; elsewhere it may have to be compiled itself."""
_COMPILERS: Final = ("cc", "gcc", "clang")
_SECONDS: Final = 900
"""For mypyc and the C compiler, which take tens of seconds."""


class CompilingHook(BuildHookInterface[Any]):
    """Adds extension modules to a wheel, or to the tree of an editable installation."""

    def dependencies(self) -> list[str]:
        """What the build needs beside hatchling."""
        wish = _wish()
        if wish == _PURE or (wish == _AUTO and _obstacle(wish) is not None):
            return []
        return list(_REQUIREMENTS)

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, if that is wanted and can be done.

        Args:
            version: ``standard`` or ``editable``.
            build_data: What goes into the wheel.
        """
        wish = _wish()
        editable = version == "editable"
        if editable:
            _remove_extensions()
        if wish == _PURE or (editable and wish != _COMPILED):
            return
        built: TemporaryDirectory[str] | None = None
        problem = _obstacle(wish)
        if problem is None:
            built = TemporaryDirectory(prefix="pgguard-build-")
            self._built = built  # until the wheel is there
            problem = self._compile(Path(built.name))
        if problem is not None or built is None:
            if wish == _COMPILED:
                sys.exit(f"{VARIABLE}={_COMPILED}: pgguard can't be compiled here: {problem}")
            self.app.display_warning(f"pgguard is built as pure Python, which is slower, as {problem}")
            return
        _add(Path(built.name), build_data, editable=editable)

    def _compile(self, target: Path) -> str | None:
        """Put the extension modules below a directory; what went wrong is returned, if anything did, as a clause."""
        # -P: the directory of this file holds packages with the names of Python's own.
        command = [sys.executable, "-P", __file__, str(target)]
        environ = {**os.environ, "CC": _compiler() or ""}
        try:
            done = subprocess.run(  # noqa: S603 - its own
                command,
                check=False,
                cwd=_ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return f"compiling took more than {_SECONDS} s"
        if not done.returncode:
            return None
        self.app.display_info(done.stdout)
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        said = [line for line in lines if "error: " in line] or lines[-1:] or [f"exit status {done.returncode}"]
        return f"compiling failed: {said[0]}"


def _wish() -> str:
    wish = os.environ.get(VARIABLE) or _AUTO
    if wish not in {_AUTO, _PURE, _COMPILED}:
        sys.exit(f"{VARIABLE}={wish}: it can be {_AUTO}, {_PURE} or {_COMPILED}")
    return wish


def _obstacle(wish: str) -> str | None:
    """Why nothing can be compiled here: a clause; ``None`` if nothing is known to be in the way."""
    if sys.implementation.name != "cpython":
        return "mypyc compiles for CPython alone"
    if _compiler() is None:
        return "there is no C compiler"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "there are no headers of Python (Python.h; python3-dev on Debian)"
    if wish == _AUTO and (sys.version_info[:2] > _LATEST or platform.machine() not in _READY_BUILT):
        return f"mypy may not come ready-built for Python {platform.python_version()} on {platform.machine()}"
    return None


def _compiler() -> str | None:
    """The C compiler's command: the one that is named, or that Python was built with, or a usual one."""
    for command in (os.environ.get("CC"), sysconfig.get_config_var("CC"), *_COMPILERS):
        if command and shutil.which(command.split()[0]):
            return str(command)
    return None


def _remove_extensions() -> None:
    """Remove what earlier installations have compiled, by whatever list, so that the sources are what runs."""
    for path in (_ROOT / "pgguard").rglob("*.so"):
        path.unlink()


def _add(built: Path, build_data: dict[str, Any], *, editable: bool) -> None:
    for path in built.rglob("*"):
        if path.suffix != ".so":
            continue
        below = path.relative_to(built)
        if editable:
            shutil.copyfile(path, _ROOT / below)
        else:
            build_data["force_include"][str(path)] = str(below)
    if not editable:
        build_data["pure_python"] = False
        build_data["infer_tag"] = True


def compile_into(target: Path) -> None:
    """Compile the modules of the current directory's tree.

    Raises:
        Exception, SystemExit: It can't be done; what is printed says why.
    """
    # mypyc needs setuptools to be imported first.
    from setuptools import Distribution, Extension  # noqa: PLC0415, I001 - only in the process that compiles
    from mypyc.build import mypycify  # noqa: PLC0415

    with TemporaryDirectory(prefix="pgguard-build-") as work:
        # What pgguard needs when it runs isn't there when it is built.
        options = ["--config-file=", "--follow-imports=silent", "--ignore-missing-imports"]
        extensions = mypycify(
            [*options, *map(path_of, MODULES)],
            group_name=group_name(Path.cwd()),
            opt_level="2",
            debug_level="0",
            target_dir=work,
        )
        for name in WRITTEN_IN_C:
            extensions.append(Extension(name, [c_path_of(name)], extra_compile_args=["-O2", "-g0"]))
        for extension in extensions:
            # Another compiler warns of other things.
            extension.extra_compile_args = [flag for flag in extension.extra_compile_args if flag != "-Werror"]
            extension.extra_link_args = ["-s"]
        command = Distribution({"ext_modules": extensions}).get_command_obj("build_ext")
        command.build_lib = str(target)
        command.build_temp = work
        command.ensure_finalized()
        command.run()


if __name__ == "__main__":
    compile_into(Path(sys.argv[1]))
