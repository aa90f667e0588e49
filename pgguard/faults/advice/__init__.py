"""What to change, for the very software that did it: the hook to use, what to call there, and code to paste.

Two kinds of advice. What a fork took along is cured by a *hook* of whatever forks (Puma's before_fork, gunicorn's
post_fork) and a *call* to whatever owns the connections (Sequel, SQLAlchemy): :data:`.forks.HOOKS` and
:data:`.forks.CALLS`, of which any two fit together that are for the same language and the same side of the fork.
Everything else is one table of whole answers, :data:`.answers.ANSWERS`. In all three a row that asks for a library or
server wins over one that asks for none, and among equals the first; where none matches, the catalogue's general advice
stands.

The side of the fork is no matter of taste. A connection closed in the child sends Terminate on the parent's connection
as well, so what can only close must do so in the parent; what can forget without closing, or has nothing to close, may
do so in the child.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from pgguard.attribution.runtime import Language, Library, Runtime, Server
from pgguard.faults.advice.answers import ANSWERS
from pgguard.faults.advice.forks import CALLS, HOOKS
from pgguard.faults.advice.rows import TAKEN_ALONG, Call, Hook, Side
from pgguard.faults.catalogue import CATALOGUE, Advice
from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Software = Language | Server | Library
"""What advice can be for."""

_CONSTANT: Final = re.compile(r"[A-Z]\w*(?:::[A-Z][a-z]\w*)?")
"""What a line of Ruby calls something of: a module or class, but not a constant like DATABASES within it."""

_ANY_CALL: Final = {
    Side.PARENT: "disconnect whatever may have connected by then; a pool reconnects when needed.",
    Side.CHILD: "reconnect, and forget the old connections without closing them.",
}

_REMARKS: Final = {
    (Kind.INHERITED_CONNECTION, None): (
        "If only one child goes on to use the connection and the parent never touches it again, this is harmless: set "
        "this kind to ignore."
    ),
    (Kind.LEAKED_CONNECTION, None): (
        "Find the process that has the connection open by its pid; if it should have ended with its parent, end it."
    ),
    (Kind.FOREIGN_TERMINATE, Language.RUBY): (
        "A child that has inherited a connection anyway should exit with exit!, which runs neither at_exit blocks nor "
        "finalizers."
    ),
    (Kind.FOREIGN_TERMINATE, Language.PYTHON): (
        "A child of os.fork that has inherited a connection anyway should exit with os._exit, which runs neither "
        "atexit handlers nor destructors."
    ),
    (Kind.FOREIGN_TERMINATE, Language.PERL): (
        "A child that has inherited a connection anyway can exit with POSIX::_exit, which runs neither END blocks nor "
        "destructors."
    ),
}
"""What to add for a kind, or for a kind in one language."""


def advice_for(kind: Kind, runtimes: Sequence[Runtime]) -> Advice:
    """What to change about a fault, given what the processes involved are.

    What they show is taken together: the language of the first that shows one, and the server and the libraries of all
    that have this language.

    Args:
        kind: The fault's.
        runtimes: The processes involved, the most telling first. If nothing is known about them, the advice is the
            catalogue's.
    """
    runtime = _merged(runtimes)
    advice = _about_fork(runtime, kind) if kind in TAKEN_ALONG else _answer(runtime, kind)
    if advice is None:
        return CATALOGUE[kind].advice
    remarks = [remark for key in ((kind, None), (kind, runtime.language)) if (remark := _REMARKS.get(key)) is not None]
    return advice._replace(text=" ".join([advice.text, *remarks]))


def advised(kind: Kind) -> tuple[Runtime, ...]:
    """What there is special advice for, one runtime for each row of the tables; for :func:`advice_for`."""
    rows: list[Runtime] = []
    if kind in TAKEN_ALONG:
        rows.extend(Runtime(hook.language, hook.server) for hook in HOOKS)
        rows.extend(Runtime(call.language, call.server, frozenset({call.library})) for call in CALLS)
    rows.extend(
        Runtime(answer.language, None, frozenset({answer.library} if answer.library else ()))
        for answer in ANSWERS
        if kind in answer.kinds
    )
    return tuple(dict.fromkeys(rows))


def advised_software(kind: Kind | None = None) -> dict[Software, Language]:
    """What there is special advice for, each with the language that it belongs to; a language belongs to itself.

    Args:
        kind: The kind of fault that the advice is about; ``None``: any.
    """
    found: dict[Software, Language] = {}
    for runtime in (runtime for one in Kind if kind in {None, one} for runtime in advised(one)):
        if runtime.language is not None:
            for what in (runtime.language, runtime.server, *runtime.libraries):
                if what is not None:
                    found.setdefault(what, runtime.language)
    return found


def runtime_with(software: Sequence[Software], languages: Mapping[Software, Language]) -> Runtime:
    """A process that runs all of this, for :func:`advice_for`.

    A library that is met with one server alone, for all that the tables say, comes with that server.

    Args:
        software: What it runs, all of one language.
        languages: The language that each belongs to.
    """
    libraries = frozenset(what for what in software if isinstance(what, Library))
    servers: Iterator[Server | None] = (what for what in software if isinstance(what, Server))
    usual: Iterator[Server | None] = (call.server for call in CALLS if call.library in libraries)
    return Runtime(languages[software[0]], next(servers, None) or next(usual, None), libraries)


def _merged(runtimes: Sequence[Runtime]) -> Runtime:
    language = next((runtime.language for runtime in runtimes if runtime.language is not None), None)
    same = [runtime for runtime in runtimes if runtime.language is language]
    return Runtime(
        language,
        next((runtime.server for runtime in same if runtime.server is not None), None),
        frozenset().union(*(runtime.libraries for runtime in same)),
    )


def _answer(runtime: Runtime, kind: Kind) -> Advice | None:
    answers = [answer for answer in ANSWERS if kind in answer.kinds and answer.language is runtime.language]
    fitting = next((answer for answer in answers if answer.library in runtime.libraries), None)
    if fitting is None:
        fitting = next((answer for answer in answers if answer.library is None), None)
    return None if fitting is None else fitting.advice


def _about_fork(runtime: Runtime, kind: Kind) -> Advice | None:
    hooks = [hook for hook in HOOKS if hook.language is runtime.language]
    # Those of the server, or if it has none, those for whatever forks.
    hooks = [hook for hook in hooks if hook.server is runtime.server] or [hook for hook in hooks if hook.server is None]
    calls = [call for call in CALLS if call.language is runtime.language]
    for call in calls:
        if call.library not in runtime.libraries or not call.only:
            continue
        if (hook := next((hook for hook in hooks if hook.side is call.side), None)) is not None:
            return _composed(hook, call)
    if (answer := _answer(runtime, kind)) is not None or not hooks:
        return answer
    return _composed(hooks[0], _any_of([call for call in calls if call.side is hooks[0].side]))


def _any_of(calls: Sequence[Call]) -> Call:
    """What to do where it isn't known which library it is: what any of them needs."""
    first = calls[0]
    text = " ".join([_ANY_CALL[first.side], *(call.text for call in calls if not call.only)])
    return first._replace(
        text=text,
        code=_alternatives([(call.code, call.library) for call in calls], first.language),
        sources=tuple(call.sources[0] for call in calls),
        elsewhere=None,
        closing=_alternatives([(call.closing, call.library) for call in calls if call.closing], first.language) or None,
        anew="\n".join(call.anew for call in calls if call.anew) or None,
    )


def _alternatives(calls: Sequence[tuple[str, str]], language: Language) -> str:
    """All calls: those that apply run in Ruby and PHP, which can tell; elsewhere they are comments to choose from.

    Args:
        calls: the code of each, and whose it is.
        language: theirs.
    """
    users: dict[str, list[str]] = {}
    for code, library in calls:
        *_, line = code.splitlines()
        users.setdefault(line, []).append(library)
    if not users:
        return ""
    if language is Language.RUBY:
        return "\n".join(
            line if " if " in line else f"{line} if defined?({_CONSTANT.findall(line)[0]})" for line in users
        )
    if language is Language.PHP:
        return "\n".join(users)
    width = max(map(len, users))
    lines = [f"# {line:{width}}  # {', '.join(libraries)}" for line, libraries in users.items()]
    # A Python function needs a statement.
    return "\n".join([*lines, "pass"] if language is Language.PYTHON else lines)


def _composed(hook: Hook, call: Call) -> Advice:
    template = hook.code if call.anew is None or hook.anew is None else hook.anew
    code = template
    for name, lines in (("calls", call.code), ("closing", call.closing), ("anew", call.anew)):
        code = _filled(code, name, lines or "pass")
    return Advice(
        "Close the pool before forking" if hook.side is Side.PARENT else "Reconnect after forking",
        f"{hook.text}, {call.text}",
        code if call.elsewhere is None else f"{code}\n\n{call.elsewhere}",
        tuple(dict.fromkeys((*hook.sources, *call.sources))),
    )


def _filled(code: str, name: str, lines: str) -> str:
    """Put lines in the place of that name, as far indented as it is."""

    def indented(match: re.Match[str]) -> str:
        return "\n".join(f"{match[1]}{line}".rstrip() for line in lines.splitlines())

    return re.sub(rf"^( *)\{{{name}\}}", indented, code, flags=re.MULTILINE)
