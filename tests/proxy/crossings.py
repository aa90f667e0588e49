"""Which calls cross from the relay into what it could do without: found in the code, seen in a run, made to fail.

The relay is what moves bytes: all of ``pgguard/proxy`` but the modules that think (``_BESIDE``). A call crosses if one
of the relay's functions calls one of those, or anything in ``pgguard/proxy`` calls another room's. What a worker thread
or a task of trio's begins with has no caller, and crosses too.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

import trio

import pgguard

_PACKAGE = Path(pgguard.__file__).parent
_TESTS = str(Path(__file__).parent.parent)
_ROOMS = ("session", "attribution", "faults", "reporting")
_BESIDE = {
    "proxy.investigation",
    "proxy.judge",
    "proxy.kernel_senders",
    "proxy.lateness",
    "proxy.rollcall",
    "proxy.unread",
    "proxy.watch",
}
_PROTECTING = {"proxy.losses", "proxy.looking"}
"""They call nothing by themselves: what they run, they run for others."""

_PYTHONS = {name for kind in (bytearray, dict, set, str) for name in dir(kind)}
"""Methods of Python's own types: when the code is only read, those are taken for that."""
_SOCKETS = {"sock", "listener"}
"""What sockets are called."""


@functools.cache
def module_of(file: str) -> str | None:
    """The guard's module that a file is, without ``pgguard.``; ``None`` if it is none."""
    path = Path(file)
    if not path.is_relative_to(_PACKAGE):
        return None
    return ".".join(path.relative_to(_PACKAGE).with_suffix("").parts)


def _is_beyond(module: str) -> bool:
    return module in _BESIDE or module.partition(".")[0] in _ROOMS


def _crosses(caller: str | None, callee: str) -> bool:
    if not _is_beyond(callee):
        return False
    if caller is None:
        return True
    return caller.startswith("proxy.") and (callee not in _BESIDE or caller not in _BESIDE)


class Crossing(NamedTuple):
    """Calls of one function by another."""

    caller: tuple[str, str] | None
    """Its module and qualified name; ``None``: a thread or task begins with it."""
    callee: tuple[str, str]

    def __str__(self) -> str:
        return f"{'-' if self.caller is None else ':'.join(self.caller)} > {':'.join(self.callee)}"


def _name(frame: FrameType) -> tuple[str, str] | None:
    module = module_of(frame.f_code.co_filename)
    return None if module is None else (module, frame.f_code.co_qualname)


def _caller(frame: FrameType | None) -> tuple[str, str] | None:
    """The guard's function that has called, whatever of other libraries' stands in between."""
    while frame is not None:
        name = _name(frame)
        if name is not None and name[0] not in _PROTECTING:
            return name
        if frame.f_code.co_filename.startswith(_TESTS) and frame.f_code.co_filename != __file__:
            return "tests", frame.f_code.co_qualname
        frame = frame.f_back
    return None


class Watcher:
    """Sees which calls cross, and which of the proxy's lines are run."""

    def __init__(self) -> None:
        self.crossings: dict[Crossing, CodeType] = {}
        self.lines: set[tuple[str, int]] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        before = sys.gettrace()
        run_sync = trio.to_thread.run_sync

        async def watched(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return await run_sync(self._in_thread, function, *args, **kwargs)

        trio.to_thread.run_sync = watched  # type: ignore[assignment]
        sys.settrace(self._called)
        try:
            yield
        finally:
            sys.settrace(before)
            trio.to_thread.run_sync = run_sync

    def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        sys.settrace(self._called)
        try:
            return function(*args)
        finally:
            sys.settrace(None)

    def _called(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        module = module_of(code.co_filename)
        if module is None:
            return None
        # What stands in a function is part of that.
        if event == "call" and _is_beyond(module) and "<locals>" not in code.co_qualname:
            caller = _caller(frame.f_back)
            if _crosses(None if caller is None else caller[0], module):
                self.crossings[Crossing(caller, (module, code.co_qualname))] = code
        if not module.startswith("proxy."):
            return None
        self.lines.add((module, frame.f_lineno))
        return self._called


class Injected(Exception):
    """What is raised where nothing else is meant."""


@contextmanager
def failing(crossing: Crossing, code: CodeType, error: BaseException, *, once: bool) -> Iterator[list[int]]:
    """Have the calls fail, or the first alone; yields a list that gets an item with each.

    Args:
        crossing: the calls.
        code: the callee's.
        error: what they raise.
        once: only the first one does.
    """
    raised: list[int] = []

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if not (once and raised) and _caller(sys._getframe(1)) == crossing.caller:
                raised.append(1)
                raise type(error)(*error.args)
            return function(*args, **kwargs)

        return wrapper

    places = list(_places(code))
    assert places, f"{crossing}: it is not known where that is kept"
    for holder, name, value in places:
        setattr(holder, name, _like(value, wrapped))
    try:
        yield raised
    finally:
        for holder, name, value in places:
            setattr(holder, name, value)


def _like(value: Any, wrapped: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    if isinstance(value, staticmethod | classmethod):
        return type(value)(wrapped(value.__func__))
    if isinstance(value, property):
        assert value.fget is not None
        return property(wrapped(value.fget), value.fset, value.fdel)
    return wrapped(value)


def _function(value: Any) -> FunctionType | None:
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    value = inspect.unwrap(value) if callable(value) else value
    return value if isinstance(value, FunctionType) else None


def _places(code: CodeType) -> Iterator[tuple[Any, str, Any]]:
    """Where a function is kept: modules and classes, under which name, as what."""
    modules = tuple(name for name in sys.modules if name.partition(".")[0] == "pgguard")
    for holder, name in _kept(modules).get(code, ()):
        yield holder, name, vars(holder)[name]


@functools.cache
def _kept(modules: tuple[str, ...]) -> dict[CodeType, list[tuple[Any, str]]]:
    """Where each function of these modules is kept."""
    kept: dict[CodeType, list[tuple[Any, str]]] = {}
    classes = set()
    for module in map(sys.modules.__getitem__, modules):
        for name, value in list(vars(module).items()):
            if inspect.isclass(value) and value.__module__.startswith("pgguard"):
                classes.add(value)
            elif isinstance(value, FunctionType):
                kept.setdefault(inspect.unwrap(value).__code__, []).append((module, name))
    for holder in classes:
        for name, value in list(vars(holder).items()):
            function = _function(value)
            if function is not None:
                kept.setdefault(function.__code__, []).append((holder, name))
    return kept


# In the code


class Site(NamedTuple):
    """A place in the proxy's code where something may be called that is beyond the relay."""

    module: str
    function: str | None
    line: int
    last_line: int
    what: str

    def __str__(self) -> str:
        return f"{self.module.replace('.', '/')}.py:{self.line}: {self.what}"


def unprotected_sites() -> list[Site]:
    """Where the proxy may call another room's function with nothing around it that catches exceptions.

    A method's name alone doesn't tell whose it is, so there are more of them than calls that cross. What catches
    exceptions may stand around all calls of the function in which the call is, and so on.
    """
    files = [_File(path) for path in sorted((_PACKAGE / "proxy").glob("*.py"))]
    protected = _protected_functions(files)
    beyond = {beside: _Names(beside=beside) for beside in (True, False)}
    return [
        site
        for file in files
        for site, catches in file.sites(beyond[file.module not in _BESIDE])
        if not catches and site.function not in protected
    ]


class _Names:
    """What is called like a function, or a property, of the other rooms."""

    def __init__(self, *, beside: bool) -> None:
        self.functions: set[str] = set()
        self.properties: set[str] = set()
        for path in _PACKAGE.rglob("*.py"):
            module = module_of(str(path))
            if module is not None and _is_beyond(module) and (beside or module not in _BESIDE):
                for node in ast.walk(ast.parse(path.read_text())):
                    self._add(node)

    def _add(self, node: ast.AST) -> None:
        if isinstance(node, ast.ClassDef):
            # Data alone are put together by Python.
            if any(isinstance(one, ast.FunctionDef) and one.name == "__init__" for one in node.body):
                self.functions.add(node.name)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {getattr(one, "id", None) for one in node.decorator_list}
            (self.properties if "property" in decorators else self.functions).add(node.name)


class _Place(NamedTuple):
    node: ast.AST
    catches: bool
    """Exceptions are caught around it."""
    function: str | None
    """The function that it is in."""


class _File:
    """A module of the proxy's."""

    def __init__(self, path: Path) -> None:
        module = module_of(str(path))
        assert module is not None
        self.module = module
        tree = ast.parse(path.read_text())
        self.places = list(_walk(tree, catches=False, function=None))
        self.functions = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
        self._libraries = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        self._theirs = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and _is_beyond((node.module or "").removeprefix("pgguard."))
            for alias in node.names
        }

    def sites(self, names: _Names) -> Iterator[tuple[Site, bool]]:
        """Where something of one of these names is, or may be, called; and whether exceptions are caught there."""
        for node, catches, function in self.places:
            if isinstance(node, ast.Call):
                name, found = getattr(node.func, "attr", getattr(node.func, "id", None)), names.functions
                what: ast.AST = node.func
            elif isinstance(node, ast.Attribute):
                name, found, what = node.attr, names.properties, node
            else:
                continue
            if name in found and not self._is_own(what):
                last_line = node.end_lineno or node.lineno
                yield Site(self.module, function, node.lineno, last_line, ast.unparse(what)), catches

    def _is_own(self, node: ast.AST) -> bool:
        """Whether it is this module's, a library's, or by its name what the relay imports from itself."""
        if isinstance(node, ast.Name):
            return node.id not in self._theirs
        if not isinstance(node, ast.Attribute):
            return False
        if node.attr in _PYTHONS:
            return True
        if isinstance(node.value, ast.Attribute):
            return node.value.attr in _SOCKETS
        if not isinstance(node.value, ast.Name):
            return False
        return node.value.id in self._libraries | _SOCKETS or (node.value.id == "self" and node.attr in self.functions)


def _protected_functions(files: list[_File]) -> set[str]:
    """The functions of the proxy's of which all uses are protected."""
    functions = {function for file in files for function in file.functions}
    uses: dict[str, list[_Place]] = {name: [] for name in functions}
    for file in files:
        for place in file.places:
            name = getattr(place.node, "attr", getattr(place.node, "id", None))
            if name in uses:
                uses[name].append(place)
    protected = {name for name, places in uses.items() if places}
    while True:
        exposed = {
            name
            for name in protected
            if any(not place.catches and place.function not in protected for place in uses[name])
        }
        if not exposed:
            return protected
        protected -= exposed


def _walk(node: ast.AST, *, catches: bool, function: str | None) -> Iterator[_Place]:
    """All that stands below a node."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        catches, function = False, node.name
    elif isinstance(node, ast.Lambda):
        catches = False
    yield _Place(node, catches, function)
    inside: list[ast.AST] = []
    if isinstance(node, ast.Try | ast.With | ast.AsyncWith) and _protects(node):
        inside = list(node.body)
    elif isinstance(node, ast.Call) and _runs(node):
        inside = list(node.args)
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, catches=catches or child in inside, function=function)


def _protects(node: ast.Try | ast.With | ast.AsyncWith) -> bool:
    """Whether it catches exceptions of all kinds."""
    if isinstance(node, ast.Try):
        return any(isinstance(one.type, ast.Name) and one.type.id == "Exception" for one in node.handlers)
    calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
    return any(isinstance(call.func, ast.Name) and call.func.id == "spared" for call in calls)


def _runs(call: ast.Call) -> bool:
    """Whether it has a function run by what catches its exceptions: ``keep_going``, ``Sweep.start``."""
    names = {getattr(one, "id", None) for one in call.args}
    return "keep_going" in names or (isinstance(call.func, ast.Attribute) and call.func.attr == "start")
