"""What is run: each workload is a program, what it is told to do, and what the guard may say about it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import pytest

from tests.languages import go_program, node_directory
from tests.soak.steps import ALL, PLAIN, STATELESS, Do, Step, steps

_PROGRAMS: Final = Path(__file__).parent / "programs"
_PGJDBC: Final = Path("/usr/share/java/postgresql.jar")
_LINES: Final = re.compile(rb"^(?:number of transactions actually processed|SQL script).*$|^.*\d+/\d+$", re.MULTILINE)
"""What pgbench says that isn't about time."""


_MANY: Final = "SELECT md5(g::text) FROM generate_series(1, :n) AS g;"


class NotThereError(Exception):
    """A program that a workload needs is not installed."""


@dataclass(frozen=True, slots=True)
class Kit:
    """What the programs of a run need."""

    directory: Path
    """Where what is built and written goes."""
    bindir: Path
    """PostgreSQL's own client programs."""
    bulk: int
    """Megabytes that are copied at once."""


@dataclass(frozen=True, slots=True)
class Command:
    """How a program is started."""

    arguments: list[str | Path]
    stdin: bytes = b""
    environ: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the table."""

    name: str
    command: Callable[[Kit, int], Command]
    """For a seed; raises :class:`NotThereError`."""
    expects: frozenset[tuple[str, str]] = frozenset()
    """Kind and severity of faults that it may cause, any number of them."""
    kept: re.Pattern[bytes] | None = None
    """Of what it says, only that counts; ``None``: all."""
    turns: int = 1
    """How often it comes in a round, compared to others."""
    tcp_alone: bool = False
    """It knows no Unix sockets."""
    is_killed: bool = False
    """It is run through the guard alone, and killed: each of its connections ends without a word."""
    is_stopped: bool = False
    """It is stopped for some seconds in the middle of its work, and goes on."""
    once: bool = False
    """It comes once in a run, not in each round."""

    @property
    def user(self) -> str:
        """Whom it connects as: so faults are told apart."""
        return f"soak_{self.name.replace('-', '_')}"


def _python(program: str, *arguments: str) -> list[str | Path]:
    return [sys.executable, "-W", "error", "-m", f"tests.soak.programs.{program}", *arguments]


def _told(arguments: list[str | Path], seed: int, count: int, kinds: tuple[Do, ...]) -> Command:
    lines = (json.dumps(step) + "\n" for step in steps(seed, count, kinds))
    return Command(arguments, "".join(lines).encode(), {"PYTHONPATH": str(Path(__file__).parents[2])})


def _in_python(name: str, program: str, *arguments: str, count: int, kinds: tuple[Do, ...]) -> Workload:
    return Workload(name, lambda _, seed: _told(_python(program, *arguments), seed, count, kinds))


def _seeded(program: str, *arguments: str) -> Callable[[Kit, int], Command]:
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    return lambda _, seed: Command(_python(program, str(seed), *arguments), environ=path)


def _bulk(kit: Kit, seed: int) -> Command:
    return Command(_python("bulk", str(seed), str(kit.bulk)), environ={"PYTHONPATH": str(Path(__file__).parents[2])})


def _interpreted(interpreter: str, program: str, *arguments: str, needs: tuple[str, ...] = ()) -> list[str | Path]:
    found = shutil.which(interpreter)
    run = ["-r", "1;"] if interpreter == "php" else ["-e", "1"]
    if found is None or subprocess.run([found, *needs, *run], capture_output=True, check=False).returncode:
        raise NotThereError(" ".join([interpreter, *needs]))
    return [found, _PROGRAMS / program, *arguments]


def _ruby(_: Kit, seed: int) -> Command:
    return _told(_interpreted("ruby", "ruby_pg.rb", needs=("-rpg",)), seed, 60, (*PLAIN, "copy"))


def _perl(_: Kit, seed: int) -> Command:
    # It begins transactions by itself.
    kinds: tuple[Do, ...] = tuple(kind for kind in PLAIN if kind != "transaction")
    return _told(_interpreted("perl", "perl_dbi.pl", needs=("-MDBD::Pg",)), seed, 60, kinds)


def _php(*arguments: str) -> Callable[[Kit, int], Command]:
    needs = ("-r", 'exit(extension_loaded("pdo_pgsql") && extension_loaded("pgsql") ? 0 : 1);')

    def command(_: Kit, seed: int) -> Command:
        php = shutil.which("php")
        if php is None or subprocess.run([php, *needs], check=False).returncode:
            raise NotThereError("php with pgsql")
        return _told([php, _PROGRAMS / "steps.php", *arguments], seed, 60, PLAIN)

    return command


def _node(driver: str) -> Callable[[Kit, int], Command]:
    def command(_: Kit, seed: int) -> Command:
        try:
            directory = node_directory()
        except pytest.skip.Exception as skipped:
            raise NotThereError(str(skipped)) from None
        told = _told(["node", _PROGRAMS / "node.js", driver], seed, 60, PLAIN)
        return Command(told.arguments, told.stdin, {"NODE_PATH": str(directory / "node_modules")})

    return command


def _go(kit: Kit, seed: int) -> Command:
    program = kit.directory / "go"
    if not program.exists():
        try:
            go_program(_PROGRAMS / "go", kit.directory)
        except pytest.skip.Exception as skipped:
            raise NotThereError(str(skipped)) from None
    return _told([program], seed, 60, PLAIN)


def _java(kit: Kit, seed: int) -> Command:
    java, compiler = shutil.which("java"), shutil.which("javac")
    if java is None or compiler is None or not _PGJDBC.exists():
        raise NotThereError("Java with libpostgresql-jdbc-java")
    if not (kit.directory / "Steps.class").exists():
        source = _PROGRAMS / "Steps.java"
        subprocess.run([compiler, "-encoding", "utf-8", "-d", kit.directory, source], check=True, timeout=120)
    path = f"{kit.directory}:{_PGJDBC}"
    lines = "".join(line + "\n" for line in map(_with_tabs, steps(seed, 100, PLAIN)))
    return Command([java, "-Dstdout.encoding=UTF-8", "-XX:TieredStopAtLevel=1", "-cp", path, "Steps"], lines.encode())


def _with_tabs(step: Step) -> str:
    sql = re.sub(r"\$\d+", "?", step.get("sql", ""))
    lists = step.get("lists") or ([step["values"]] if step.get("values") else [])
    if step["do"] == "big":
        parts = ["big", sql, step["letter"], step["size"]]
    elif lists:
        parts = ["prepared", sql, len(lists[0]), *(_escaped(value) for values in lists for value in values)]
    else:
        parts = [step["do"], *step.get("statements", [step.get("sql")])]
    return "\t".join(map(str, [step["n"], *parts]))


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n")


def _psql(kit: Kit, seed: int) -> Command:
    """Statements of all kinds, several in one query, COPY, and errors."""
    lines = "".join(line + "\n" for step in steps(seed, 80, (*PLAIN, "copy")) for line in _for_psql(step))
    options = ["-X", "-q", "-A", "-t", "-v", "VERBOSITY=sqlstate", "-v", "SHOW_CONTEXT=never"]
    return Command([kit.bindir / "psql", *options], lines.encode())


def _for_psql(step: Step) -> Iterator[str]:
    def written(values: Iterable[str]) -> str:
        remaining = iter(values)
        return re.sub(r"\$\d+(?!\$)", lambda _: "'" + next(remaining).replace("'", "''") + "'", step["sql"])

    match step["do"]:
        case "transaction":
            separator = "\\;" if step["n"] % 2 else ";"
            yield separator.join(step["statements"]) + ";"
            yield "ROLLBACK;"
        case "prepared":
            yield from (written(values) + ";" for values in step["lists"])
        case "big":
            yield written([step["letter"] * (step["size"] // 4)] * 2) + ";"
        case "copy":
            yield "DROP TABLE IF EXISTS copied; CREATE TEMP TABLE copied (n int, word text);"
            yield "COPY copied FROM STDIN;"
            yield from ("\t".join(row) for row in step["rows"])
            yield "\\."
            yield "COPY copied TO STDOUT;"
        case _:
            yield written(step.get("values", ())) + ";"


def _script(kit: Kit, name: str, *lines: str) -> Path:
    """A script that is written once, as another program may be reading it."""
    script = kit.directory / name
    if not script.exists():
        script.write_text("".join(f"{line}\n" for line in lines))
    return script


def _pgbench(protocol: str, *options: str) -> Callable[[Kit, int], Command]:
    def command(kit: Kit, seed: int) -> Command:
        script = _script(kit, "pgbench.sql", "\\set n random(1, 1000)", "SELECT :n;", _MANY)
        arguments = ["-n", "-c", "4", "-j", "2", "-M", protocol, f"--random-seed={seed}", "-f", str(script), *options]
        return Command([kit.bindir / "pgbench", *arguments])

    return command


def _pgbench_pipelines(kit: Kit, seed: int) -> Command:
    pipelined = ("SELECT 1;", "SELECT md5('x');") * 10
    script = _script(kit, "pipeline.sql", "\\startpipeline", *pipelined, "\\endpipeline")
    arguments = ["-n", "-c", "3", "-t", "50", "-M", "prepared", f"--random-seed={seed}", "-f", str(script)]
    return Command([kit.bindir / "pgbench", *arguments])


_HEIRS: Final = frozenset({("inherited-connection", "info")})

WORKLOADS: Final = (
    _in_python("psycopg", "psycopg_steps", count=120, kinds=ALL),
    _in_python("psycopg-threads", "pools_psycopg", "threads", count=200, kinds=STATELESS),
    _in_python("psycopg-tasks", "pools_psycopg", "tasks", count=200, kinds=STATELESS),
    _in_python("psycopg2", "psycopg2_steps", count=120, kinds=tuple(kind for kind in ALL if kind != "pipeline")),
    _in_python("asyncpg", "asyncpg_steps", count=120, kinds=tuple(kind for kind in ALL if kind != "pipeline")),
    _in_python("asyncpg-pool", "pools_asyncpg", count=200, kinds=STATELESS),
    _in_python("pg8000", "pg8000_steps", count=60, kinds=(*PLAIN, "copy")),
    _in_python("sqlalchemy-psycopg", "pools_sqlalchemy", "psycopg", count=100, kinds=STATELESS),
    _in_python("sqlalchemy-psycopg2", "pools_sqlalchemy", "psycopg2", count=100, kinds=STATELESS),
    Workload("ruby-pg", _ruby),
    Workload("node-postgres", _node("pg")),
    Workload("postgres-js", _node("postgres")),
    Workload("lib-pq", _go),
    Workload("pgjdbc", _java, tcp_alone=True),
    Workload("php-pgsql", _php()),
    Workload("php-pdo", _php("pdo")),
    Workload("perl-dbi", _perl),
    Workload("psql", _psql),
    Workload("pgbench-simple", _pgbench("simple", "-t", "60"), kept=_LINES),
    Workload("pgbench-prepared", _pgbench("prepared", "-t", "60"), kept=_LINES),
    Workload("pgbench-connects", _pgbench("extended", "-t", "10", "-C"), kept=_LINES),
    Workload("pgbench-pipelines", _pgbench_pipelines, kept=_LINES),
    Workload("connects", _seeded("connects", "60"), turns=2),
    Workload(
        "forks",
        lambda _, seed: _told(_python("forks"), seed, 18, ("rows", "error")),
        expects=_HEIRS,
        turns=2,
    ),
    Workload("killed", _seeded("killed"), is_killed=True, turns=2),
    replace(_in_python("stopped", "psycopg_steps", count=120, kinds=ALL), is_stopped=True),
    Workload("bulk", _bulk, once=True),
)
"""All there are."""
