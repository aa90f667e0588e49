"""``python -m tests.soak``."""

from __future__ import annotations

import os
import random
import signal
import sys
from typing import Annotated

import typer
from rich.console import Console

from pgguard.faults.policy import Mode
from tests.servers import installations
from tests.soak.run import Plan, soak
from tests.soak.workloads import WORKLOADS

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    minutes: Annotated[float, typer.Option(help="How long to go on starting programs.")] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Of everything that is left to chance; by default a new one.")
    ] = None,
    share: Annotated[
        float, typer.Option(help="Of one processor: what servers, guards and programs may take together.")
    ] = 0.4,
    at_once: Annotated[int, typer.Option(help="Programs beside each other, each directly and through a guard.")] = 3,
    bulk: Annotated[int, typer.Option(help="Megabytes that are copied at once, each way.")] = 1000,
    mode: Annotated[Mode, typer.Option(help="The guards': in reject a false error ends a program as well.")] = Mode.LOG,
    only: Annotated[list[str] | None, typer.Option(help="A workload to run; repeatable; by default all.")] = None,
    server: Annotated[
        list[str] | None, typer.Option(help="A PostgreSQL to run against, as embedded or debian-15; by default all.")
    ] = None,
    nice: Annotated[int, typer.Option(help="By how much everything is nicer than others: nice(1).")] = 0,
) -> None:
    """Have programs of all kinds use PostgreSQL directly and through a guard, and compare what they get, row by row.

    Ends with a table, and with status 1 if anything is wrong: a row that differs, a program that fails or hangs, a
    fault that nobody has brought about, one that is missing, or a guard that grows, complains, or doesn't come to rest.
    """
    os.nice(nice)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left behind
    there = {name: bindir for name, bindir in installations().items() if bindir is not None}
    chosen = [workload for workload in WORKLOADS if not only or workload.name in only]
    unknown = {*(only or ())} - {workload.name for workload in chosen} | {*(server or ())} - {*there}
    if unknown or not there:
        names = ", ".join(workload.name for workload in WORKLOADS)
        raise typer.BadParameter(f"no {', '.join(sorted(unknown))}; there are {names}, on {', '.join(there)}")
    plan = Plan(
        seconds=60 * minutes,
        seed=random.randrange(1_000_000) if seed is None else seed,
        share=share,
        at_once=at_once,
        bulk=bulk,
        mode=mode,
        servers={name: bindir for name, bindir in there.items() if not server or name in server},
        workloads=chosen,
    )
    if not soak(plan, Console(soft_wrap=True)):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
