"""``pgguard doctor``: which evidence is available here, whether pgguard is compiled, and how to get the rest."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import trio
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pgguard.attribution.capabilities import KERNEL_SENDERS, Capability, check
from pgguard.attribution.privileges import ENTERING, LOADING, LOOKING, names
from pgguard.cli.entry import unwinding
from pgguard.cli.progress import progress
from pgguard.cli.statuses import DONE, MISSING
from pgguard.compiled import Form, form
from pgguard.faults.text import printable
from pgguard.proxy.errors import ConfigurationError, Problem, UnfitServerError
from pgguard.proxy.remedies import hints
from pgguard.proxy.settings import load_settings
from pgguard.proxy.shortcut import advice_on, shortcut
from pgguard.proxy.upstream import dial_to

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pgguard.proxy.addresses import Address
    from pgguard.proxy.dialling import Dial
    from pgguard.proxy.settings import Front

_RIGHTS: Final = (
    f"To see other users' processes the guard needs {names(LOOKING)}. (Since Linux 5.14 CAP_SYS_PTRACE is enough to "
    "find who has a connection open, but not for what their threads wait for.) To look into other network namespaces "
    f"it also needs {names(ENTERING)}, which it keeps only if it listens on more than the loopback addresses. It needs "
    f"{names(LOADING)} until its BPF programs are loaded (before Linux 5.19 it keeps CAP_BPF). A guard that is "
    "started as root gives up every other capability, except CAP_DAC_OVERRIDE if the server's Unix socket requires it. "
    "With --user NAME it also becomes an ordinary user."
)
_PATIENCE: Final = 2.0
"""Seconds for the server to say which TLS it gives."""
_WIDTH: Final = 100
"""Columns at most: longer lines are hard to read."""


def doctor(*, as_json: bool) -> int:
    """Try every kind of evidence, look how pgguard was built, print the results, and return the exit status.

    That is 0 if everything essential is available, else 1. Takes a second at most, unless something hangs.
    """
    with unwinding(), progress("Checking what this host allows"):
        capabilities = [*check(), _compiled_code(form()), *_about_the_servers(), *_offered()]
    if as_json:
        print(json.dumps([_as_dict(capability) for capability in capabilities], indent=2))  # noqa: T201 - the answer
    else:
        _print(capabilities)
    return MISSING if _essential_missing(capabilities) else DONE


def _compiled_code(found: Form) -> Capability:
    """In which form the guard runs, as one more thing that may be missing."""
    problem = remedy = None
    if found.pure or found.stale:
        problem = f"pgguard is {found}"
        remedy = (
            "install a C compiler and Python's headers (gcc and python3-dev on Debian), then pgguard again, with "
            "PGGUARD_BUILD=compiled in the environment: if anything else is missing, that says what"
        )
    return Capability(
        "compiled code",
        "follows and forwards messages at a fraction of the CPU time",
        essential=False,
        unix_instead=False,
        problem=problem,
        remedy=remedy,
    )


def _about_the_servers() -> list[Capability]:
    """What there is to say of the way to the servers that ``serve`` would guard."""
    try:
        fronts = load_settings({"upstream": os.environ.get("PGGUARD_UPSTREAM", "")}, None).fronts()
    except ConfigurationError:
        return []  # it says so when it is started
    return [*_shortcuts(fronts), *trio.run(_encryption, fronts)]


def _shortcuts(fronts: Sequence[Front]) -> list[Capability]:
    """Where there is a shorter way; nothing of those that are the shortest."""
    return [
        Capability(
            f"Unix socket to {front.server}",
            "reaches the server with less CPU time than TCP",
            essential=False,
            unix_instead=False,
            problem=f"the guard reaches it at {front.upstream}, and it also listens at {found}",
            remedy=advice_on(found, front.setting),
        )
        for front in fronts
        if (found := shortcut(front.upstream)) is not None
    ]


async def _encryption(fronts: Sequence[Front]) -> list[Capability]:
    """Which TLS servers give at each of their addresses, or why not; nothing of those without, if that may be."""
    places = [
        (front, address) for front in fronts if front.upstream.tls is not None for address in front.upstream.addresses
    ]
    found: dict[int, Dial | Exception] = {}

    async def look(place: int) -> None:
        front, address = places[place]
        try:
            found[place] = dial = await dial_to(address, replace(front.upstream, connect_timeout=_PATIENCE))
            dial.close()
        except (OSError, UnicodeError) as error:
            found[place] = error

    async with trio.open_nursery() as nursery:
        for place in range(len(places)):
            nursery.start_soon(look, place)
    return [one for place, at in enumerate(places) if (one := _tls_at(*at, found[place])) is not None]


def _tls_at(front: Front, address: Address, found: Dial | Exception) -> Capability | None:
    """What there is to say of it. It is essential where nobody can be connected otherwise."""
    name = f"TLS to {front.server}"
    what = f"encrypts what the guard and the server at {address} say"
    problem = remedy = None
    is_essential = False
    error = found if isinstance(found, Exception) else found.why_plain
    if isinstance(error, UnfitServerError):
        if not isinstance(found, Exception) and error.problem is Problem.NO_TLS:
            return None
        is_essential = isinstance(found, Exception)
        problem = str(error) if isinstance(found, Exception) else f"the server is connected to {found.encryption}"
        remedy = " ".join(hints(error, through=front.name, unix=False, ipv4=False)).removesuffix(".")
    elif isinstance(found, Exception) or found.tls is None:
        return None
    else:
        what = f"{what}, {found.encryption}"
    return Capability(
        name,
        what,
        essential=is_essential,
        unix_instead=False,
        problem=problem,
        remedy=remedy,
        consequence="clients can't be connected to the server",
    )


def _offered() -> list[Capability]:
    """The TLS that ``serve`` would offer its clients, if it is to."""
    given = {
        name: os.environ.get(f"PGGUARD_{name.upper()}", "") for name in ("listen", "tls_cert", "tls_key", "tls_ca")
    }
    problem = remedy = None
    purpose = "encrypts the connections of clients that ask for it over TCP"
    try:
        settings = load_settings({**given, "listen": given["listen"].split()}, None)
    except ConfigurationError:
        return []  # it says so when it is started
    try:
        offer = settings.tls()
    except ConfigurationError as error:
        problem, _, remedy = str(error).rpartition(": ")
    else:
        if offer is None:
            return []
        purpose = f"{purpose}, with {offer.certificate.said}"
    return [
        Capability(
            "TLS for clients",
            purpose,
            essential=problem is not None,
            unix_instead=False,
            problem=problem,
            remedy=remedy,
            consequence="pgguard serve doesn't start",
        )
    ]


def _as_dict(capability: Capability) -> dict[str, str | bool | list[str] | None]:
    return {
        "name": capability.name,
        "available": capability.available,
        "essential": capability.essential,
        "purpose": capability.purpose,
        "problem": capability.problem,
        "remedy": capability.remedy,
        "unix_instead": capability.unix_instead,
        "rights": list(capability.rights),
    }


def _print(capabilities: Sequence[Capability]) -> None:
    console = Console(file=sys.stdout, highlight=False)
    console.width = min(console.width, _WIDTH)
    table = Table.grid(padding=(0, 2, 0, 0))
    for capability in capabilities:
        table.add_row(
            _verdict(capability), Text.assemble((capability.name, "bold"), ": ", printable(capability.purpose))
        )
        if not capability.available:
            # Names of processes are in it.
            table.add_row("", Padding(Text(printable(f"problem: {capability.problem}")), (0, 0, 0, 2)))
            table.add_row("", Padding(Text(printable(f"fix: {capability.remedy}")), (0, 0, 0, 2)))
    console.print(table)
    console.print()
    for line in _conclusion(capabilities):
        console.print(Text(line))


def _verdict(capability: Capability) -> Text:
    if capability.available:
        return Text("ok", style="green")
    return Text("missing", style="bold red" if capability.essential else "yellow")


def _conclusion(capabilities: Sequence[Capability]) -> list[str]:
    missing = [capability for capability in capabilities if not capability.available]
    lines: list[str]
    if essential := _essential_missing(capabilities):
        lines = [
            f"Something essential is missing, so {consequence}: "
            f"{', '.join(one.name for one in essential if one.consequence == consequence)}."
            for consequence in dict.fromkeys(one.consequence for one in essential)
        ]
    elif missing:
        lines = [f"Everything essential works. Missing: {', '.join(capability.name for capability in missing)}."]
    else:
        lines = ["Everything works."]
    if any(capability.unix_instead for capability in missing) and all(
        capability.name != KERNEL_SENDERS for capability in missing
    ):
        lines.append(
            "If you can't fix that, have the application connect to a Unix socket (--listen unix:DIR) instead of a TCP "
            "port: there the kernel names the sender of every byte anyway."
        )
    if any(capability.rights for capability in capabilities):
        lines += ["", _RIGHTS]
    return lines


def _essential_missing(capabilities: Sequence[Capability]) -> list[Capability]:
    return [capability for capability in capabilities if capability.essential and not capability.available]
