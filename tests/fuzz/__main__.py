"""``python -m tests.fuzz``."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pgguard.faults.policy import Mode
from tests.fuzz import hostile as ends
from tests.fuzz.corpus import DIRECTORY
from tests.fuzz.many import keep, play_many
from tests.fuzz.minimizing import minimized
from tests.fuzz.recording import record as record_all
from tests.fuzz.script import decode, encode
from tests.fuzz.script import show as lines
from tests.servers import installations, running_server

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

Seed = Annotated[int | None, typer.Option(help="Of everything that is left to chance; by default a new one.")]
Into = Annotated[Path, typer.Option(help="The directory for files that fail.")]
_HERE = Path()


@app.command()
def conversations(
    number: Annotated[int, typer.Option(help="How many.")] = 10_000,
    first: Annotated[int, typer.Option(help="The number of the first, to go on where another run has ended.")] = 0,
    seconds: Annotated[float | None, typer.Option(help="End after this time at the latest.")] = None,
    seed: Seed = None,
    into: Into = _HERE,
) -> None:
    """Play recorded conversations, mutated at random, to the session core, each cut in two ways."""
    seed = random.randrange(1 << 20) if seed is None else seed
    account = play_many(seed, first, number, seconds=seconds)
    done = first + account.conversations
    print(f"seed {seed}: {account.conversations} conversations in {account.seconds:.0f} s, up to number {done - 1}")
    print(f"{account.faultless} without a verdict; memory has grown by {account.grown:.1f} MB")
    _count(account.verdicts)
    for failed, why in account.failed:
        print(f"{keep(seed, failed, into)}: {why}")
    raise typer.Exit(bool(account.failed))


@app.command()
def guided(
    seconds: Annotated[int, typer.Option(help="For how long.")] = 60,
    found: Annotated[
        Path | None, typer.Option(help="A directory for what reaches something new, to go on with; else it is lost.")
    ] = None,
    into: Into = _HERE,
) -> None:
    """Play conversations, mutated by what of the code they reach, to the session core."""
    with tempfile.TemporaryDirectory() as temporary:
        own = found or Path(temporary)
        own.mkdir(exist_ok=True)
        options = [f"-max_total_time={seconds}", f"-artifact_prefix={into}/", "-max_len=8192", "-timeout=10"]
        command: list[str | Path] = [
            sys.executable,
            "-m",
            "tests.fuzz.guided",
            *options,
            "-print_final_stats=1",
            own,
            DIRECTORY,
        ]
        raise typer.Exit(subprocess.run(command, check=False).returncode)


@app.command()
def hostile(
    seconds: Annotated[float, typer.Option(help="How long clients are hostile, and then a server, in each mode.")] = 60,
    seed: Seed = None,
) -> None:
    """Have clients and servers that do whatever they like use a guard, over real sockets."""
    seed = random.randrange(1 << 20) if seed is None else seed
    wrong = False
    with running_server(_bindir()) as server:
        for mode in Mode:
            for name, report in (
                ("clients", ends.attack_server(server, seed, seconds, mode)),
                ("servers", ends.attack_clients(seed, seconds, mode)),
            ):
                print(
                    f"seed {seed}, {mode}: {report.attacks} hostile {name}, {report.compared} compared; a bystander "
                    f"has waited for {report.longest * 1000:.0f} ms at most; memory has grown by {report.grown:.1f} MB"
                )
                _count(report.faults)
                for line in report.wrong:
                    print(line)
                wrong = wrong or bool(report.wrong)
    raise typer.Exit(wrong)


@app.command()
def record(into: Annotated[Path, typer.Option(help="The directory for the files.")] = DIRECTORY) -> None:
    """Record what real drivers and a real server say to each other."""
    with running_server(_bindir()) as server:
        for path in record_all(server, into):
            print(f"{path}: {path.stat().st_size} bytes")


@app.command()
def show(file: Path) -> None:
    """Print a file of a conversation, a line for each step."""
    for line in lines(decode(file.read_bytes())):
        print(line)


@app.command()
def minimize(file: Path, to: Path) -> None:
    """Make a file that fails as small as it still fails in the same way."""
    to.write_bytes(encode(minimized(decode(file.read_bytes()))))
    show(to)


def _bindir() -> Path:
    return next(bindir for bindir in installations().values() if bindir is not None)


def _count(counted: Mapping[Any, int]) -> None:
    for what, times in sorted(counted.items(), key=lambda item: -item[1]):
        print(f"{times:9} {what}")


if __name__ == "__main__":
    app()
