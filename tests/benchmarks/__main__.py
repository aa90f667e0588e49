"""``python -m tests.benchmarks``."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar, get_args

import typer
from rich.console import Console

from pgguard.demo.postgres import ServerFailedError
from tests.benchmarks import programs
from tests.benchmarks.bench import AGAIN, Bench, Protocol
from tests.benchmarks.programs import CannotMeasureError, Guard, Hops
from tests.benchmarks.scenarios import SCENARIOS
from tests.benchmarks.table import Results
from tests.servers import installations

if TYPE_CHECKING:
    from collections.abc import Sequence

_WIDTH = 400
"""Of the table, at most: it is for files too, and isn't cut."""

_Name = TypeVar("_Name", bound=str)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(SCENARIOS)}; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each contender is measured.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of each of those.")] = 2,
    guard: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PYTHON", help="A guard, and the Python that it is installed for; repeatable."),
    ] = None,
    attribution: Annotated[list[str] | None, typer.Option(help="Of the guards; repeatable: auto and off.")] = None,
    peers: Annotated[bool, typer.Option(help="Measure pgbouncer and HAProxy too.")] = True,
    control: Annotated[bool, typer.Option(help="Measure the first guard as if it were two.")] = True,
    server: Annotated[str | None, typer.Option(help="The PostgreSQL, as debian-15 or embedded.")] = None,
    over: Annotated[list[str] | None, typer.Option(help="Both ways; repeatable: by default tcp, then unix.")] = None,
    protocol: Annotated[list[str] | None, typer.Option(help="Repeatable: by default simple, then prepared.")] = None,
    clients: Annotated[list[int] | None, typer.Option(help="That ask at once; repeatable: 1, 16, 64.")] = None,
    idle: Annotated[list[int] | None, typer.Option(help="Numbers of idle sessions; 2,000 and 10,000.")] = None,
    busy: Annotated[int, typer.Option(min=1, help="Sessions beside a crowd of idle ones.")] = 200,
    starts: Annotated[int, typer.Option(min=1, help="How often each contender is given idle sessions.")] = 1,
    settle: Annotated[float, typer.Option(help="Seconds until sessions are idle that have been opened.")] = 8,
    output: Annotated[Path | None, typer.Option("--json", help="Write all values there.")] = None,
) -> None:
    """Measure what pgguard costs, beside pgbouncer in session mode and HAProxy in TCP mode, and print a table.

    The values are medians, with half the range of their middle half. "x" is the ratio to the better of the two others,
    round by round, and A/A that of the first guard to itself: what differs by less is noise. Nothing else should run.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left behind
    scenarios = _chosen("only", only, [*SCENARIOS])
    guards = [
        Guard(name, python, kind)
        for name, python in map(_named, guard or [f"pgguard={sys.executable}"])
        for kind in attribution or ["auto", "off"]
    ]
    console = Console(width=_WIDTH)
    twin = (guards[0].title, guards[0].title + AGAIN) if control else None
    results = Results(twin)
    try:
        with tempfile.TemporaryDirectory(prefix="pgguard-bench-") as name:
            directory = Path(name)
            directory.chmod(0o755)
            bench = Bench(
                results=results,
                guards=guards,
                peers=peers,
                control=control,
                rounds=rounds,
                starts=starts,
                seconds=seconds,
                hops=_chosen("over", over, [one for one in get_args(Hops) if one != "tls"]),
                protocols=_chosen("protocol", protocol, get_args(Protocol)),
                clients=clients or [1, 16, 64],
                sessions=idle or [2_000, 10_000],
                busy=busy,
                settle=settle,
                directory=directory,
                bindir=_bindir(server),
                client=programs.compiled("client", directory),
                server=programs.compiled("server", directory),
            )
            for one in guards:
                console.print(f"{one.title}: {_version(one)}, {one.python}")
            for scenario in scenarios:
                console.print(f"{scenario}: {(SCENARIOS[scenario].__doc__ or '').strip()}")
                SCENARIOS[scenario](bench)
                rows = [row for row in results.rows.values() if row.scenario == scenario]
                console.print(results.table(rows, bench.names))
            for remark in results.remarks:
                console.print(remark)
    except (CannotMeasureError, ServerFailedError) as error:
        console.print(f"benchmark: {error}", markup=False, highlight=False)
        raise typer.Exit(2) from error
    finally:
        if output is not None:
            output.write_text(json.dumps(results.as_json(), indent=1))


def _chosen(option: str, names: Sequence[str] | None, there: Sequence[_Name]) -> list[_Name]:
    """Of what there is, what is named; all of it if nothing is."""
    if unknown := {*(names or ())} - {*there}:
        raise typer.BadParameter(f"--{option}: no {', '.join(sorted(unknown))}; there are {', '.join(there)}")
    return [one for one in there if not names or one in names]


def _named(text: str) -> tuple[str, str]:
    name, sign, python = text.partition("=")
    if not sign or not name or not Path(python).exists():
        raise typer.BadParameter(
            f"--guard {text}: it takes NAME=PYTHON, the path of the Python that pgguard is installed for"
        )
    return name, str(Path(python).absolute())


def _version(guard: Guard) -> str:
    command = [guard.python, "-m", "pgguard", "--version"]
    done = subprocess.run(
        command, cwd="/", env=programs.clean_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CannotMeasureError(f"{guard.python} has no pgguard: {done.stderr.strip()}")
    return done.stdout.strip()


def _bindir(name: str | None) -> Path:
    """Debian's server unless it is said which one, or there is none: pgbench comes with it."""
    there = {name: bindir for name, bindir in installations().items() if bindir and (bindir / "pgbench").exists()}
    chosen = name or next((one for one in there if one.startswith("debian")), next(iter(there), None))
    if chosen not in there:
        raise CannotMeasureError(
            f"a PostgreSQL with pgbench is needed: apt-get install postgresql ({chosen} isn't there)"
        )
    return there[chosen]


if __name__ == "__main__":
    app()
