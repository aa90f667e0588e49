"""What docker/ holds is valid, by whatever can check it without an engine, a cluster or a running systemd."""

from __future__ import annotations

import importlib.resources
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import jsonschema
import kubernetes_validate
import pytest
import yaml

from pgguard.attribution.privileges import Right
from pgguard.faults.causes import CAUSES, RECORD_INTERVAL, SHARE_OF_AGE
from pgguard.proxy.settings import DEFAULT_LISTEN, IN_FILE_ALONE, Settings, load_settings
from pgguard.reporting.otel.logs import ROOM
from tests.proxy.spawned import environment, started
from tests.servers import not_installed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tests.guard_process import GuardProcess

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
COMPOSE = DOCKER / "compose.yaml"
MANIFESTS = sorted((DOCKER / "kubernetes").glob("*.yaml"))
UNIT = DOCKER / "pgguard.service"
KUBERNETES = ("1.29", kubernetes_validate.latest_version().rpartition(".")[0])
"""The oldest version that starts native sidecars without being told to, and the latest that there is a schema of."""
RIGHTS = {"BPF", "PERFMON", "NET_ADMIN", "SYS_PTRACE"}
HEALTHCHECK = "/usr/local/lib/pgguard/healthcheck.py"


def variables_are_known(names: set[str]) -> None:
    known = {f"PGGUARD_{name.upper()}" for name in {*Settings.model_fields, "config"} - IN_FILE_ALONE}
    assert {name for name in names if name.startswith("PGGUARD_")} <= known


# Compose


def test_what_compose_is_given() -> None:
    document = yaml.safe_load(COMPOSE.read_text())
    vendored = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    jsonschema.validate(document, json.loads(vendored.read_text()))
    guard = document["services"]["guard"]
    assert set(guard["cap_add"]) == RIGHTS
    assert "privileged" not in guard
    variables_are_known(set(guard["environment"]))


def test_the_files_that_compose_is_told_of_are_there() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    build = services["app"]["build"]
    assert (COMPOSE.parent / build["context"] / build["dockerfile"]).is_file()
    for volume in services["app"]["volumes"]:
        assert (COMPOSE.parent / volume.partition(":")[0]).is_file()
    assert (
        services["app"]["environment"]["DATABASE_URL"]
        .split("@")[1]
        .startswith(services["guard"]["environment"]["PGGUARD_LISTEN"])
    )


def test_the_sample_shows_the_fault(guard: GuardProcess) -> None:
    url = {"DATABASE_URL": guard.tcp.conninfo}
    command = [sys.executable, "-u", str(DOCKER / "sample.py")]
    with subprocess.Popen(command, env=guard.tcp.environ() | url, start_new_session=True) as sample:
        try:
            [fault, *_] = guard.wait_for("shared-by-processes")
        finally:
            os.killpg(sample.pid, signal.SIGKILL)
    first = guard.first_of_cause(fault)
    assert {culprit["process"]["name"] for culprit in first["culprits"] if culprit["process"]}


# Kubernetes


def documents() -> list[Any]:
    return [document for path in MANIFESTS for document in yaml.safe_load_all(path.read_text())]


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("document", documents(), ids=lambda one: f"{one['kind']}-{one['metadata']['name']}")
def test_manifests_are_valid(document: Any, version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def pods() -> dict[str, Any]:
    return {one["kind"]: one["spec"]["template"]["spec"] for one in documents() if one["kind"] != "ConfigMap"}


def test_the_guards_of_pods_have_their_rights_and_no_others() -> None:
    for kind, pod in pods().items():
        [guard] = [one for one in (*pod.get("initContainers", ()), *pod["containers"]) if one["name"] == "pgguard"]
        security = guard["securityContext"]
        assert security["capabilities"]["drop"] == ["ALL"]
        assert set(security["capabilities"]["add"]) == RIGHTS
        assert not security.get("privileged")
        assert not security["allowPrivilegeEscalation"]
        for probe in ("startupProbe", "livenessProbe"):
            assert guard[probe]["exec"]["command"] == ["python", HEALTHCHECK], kind
        names = {one["name"] for one in guard["env"]}
        assert {"POD_NAME", "POD_NAMESPACE", "POD_UID", "NODE_NAME"} <= names
        variables_are_known(names)


def test_the_sidecar_is_a_native_one() -> None:
    pod = pods()["Deployment"]
    [guard] = pod["initContainers"]
    assert guard["restartPolicy"] == "Always"
    assert pod["shareProcessNamespace"] is True


def test_one_guard_for_a_node_sees_the_node() -> None:
    pod = pods()["DaemonSet"]
    assert (pod["hostPID"], pod["hostNetwork"]) == (True, True)
    [path] = [one["hostPath"]["path"] for one in pod["volumes"] if one["name"] == "sockets"]
    [config] = [one["data"]["pgguard.toml"] for one in documents() if one["kind"] == "ConfigMap"]
    listens = [listen for one in tomllib.loads(config)["databases"] for listen in one["listen"]]
    assert {listen.split(":")[1] for listen in listens if listen.startswith("unix:")} == {path}


def test_the_configuration_of_the_node_is_one(tmp_path: Path) -> None:
    [config] = [one["data"]["pgguard.toml"] for one in documents() if one["kind"] == "ConfigMap"]
    (tmp_path / "pgguard.toml").write_text(config)
    settings = load_settings({}, tmp_path / "pgguard.toml")
    assert [front.name for front in settings.fronts()] == ["orders", "audit"]
    settings.policies()


# The health check, wherever it is told to look


def check(**variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, DOCKER / "healthcheck.py"],
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_health_check_asks_all_listeners_of_the_file(tmp_path: Path, guard: GuardProcess) -> None:
    there = [f"127.0.0.1:{guard.tcp.port}", f"unix:{guard.unix.host}", f"unix:{guard.unix.host}:{guard.unix.port}"]
    config = tmp_path / "pgguard.toml"
    for text in (
        f"listen = {there[0]!r}",
        f"listen = {there!r}",
        "".join(f"[[databases]]\nname = 'd{n}'\nlisten = {one!r}\n" for n, one in enumerate(there)),
    ):
        config.write_text(text)
        done = check(PGGUARD_CONFIG=str(config))
        assert (done.returncode, done.stderr) == (0, "")
    config.write_text("mode = 'log'")
    done = check(PGGUARD_CONFIG=str(config))
    assert done.returncode == 0 or done.stderr.startswith(f"{DEFAULT_LISTEN}: ")  # whoever may be there on this host
    config.write_text(f"listen = [{there[0]!r}, 'unix:{tmp_path}']")
    done = check(PGGUARD_CONFIG=str(config))
    assert done.returncode == 1
    assert done.stderr.startswith(f"unix:{tmp_path}: ")
    guard.assert_no_faults()


# systemd


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit, with the program where it is here."""
    if shutil.which("systemd-analyze") is None:
        not_installed("systemd")
    program = Path(sys.executable).with_name("pgguard")
    text = UNIT.read_text()
    assert text.count("/opt/pgguard/bin/pgguard") == 1
    path = tmp_path / UNIT.name
    path.write_text(text.replace("/opt/pgguard/bin/pgguard", str(program)))
    return path


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def test_the_unit_is_valid(unit: Path) -> None:
    done = analyze("verify", unit)
    # Of other units of this system it may say what it likes.
    assert "pgguard" not in done.stderr
    assert done.returncode == 0, done.stderr


def test_the_unit_is_hardened(unit: Path) -> None:
    """Its exposure is 2.6 of 10, most of which is the network that it is there for."""
    done = analyze("security", "--offline=true", "--threshold=27", unit)
    assert done.returncode == 0, done.stdout


def test_the_unit_has_the_rights_that_it_needs() -> None:
    text = UNIT.read_text()
    for setting in ("AmbientCapabilities", "CapabilityBoundingSet"):
        [given] = re.findall(rf"^{setting}=(.*)$", text, re.MULTILINE)
        assert {name.removeprefix("CAP_") for name in given.split()} == RIGHTS
    assert {f"CAP_{name}" for name in RIGHTS} <= {right.name for right in Right}


# The image


class Instruction(NamedTuple):
    name: str
    text: str


def instructions() -> list[Instruction]:
    lines = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [Instruction(*line.split(maxsplit=1)) for line in lines if line and not line.startswith("#")]


SHIM = """#!/bin/sh
case $1 in
  wheel) shift; exec {python} -m pip -q wheel --no-deps --no-build-isolation --no-index "$@" ;;
  install) shift; exec {python} -m pip -q install --no-deps --target {target} "$@" ;;
esac
exit 9
"""
USERADD = """#!/bin/sh
exec {useradd} --prefix {root} "$@"
"""


class Stage:
    """A stage of the image, in a directory that stands for its root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.directory = "/"
        self.variables: dict[str, str] = {}
        (root / "bin").mkdir(parents=True)
        (root / "etc").mkdir()
        for name in ("passwd", "group", "shadow", "gshadow", "login.defs"):
            (root / "etc" / name).touch()
        self._shim("pip", SHIM.format(python=sys.executable, target=root / "site"))
        self._shim("useradd", USERADD.format(useradd=shutil.which("useradd"), root=root))

    def _shim(self, name: str, text: str) -> None:
        path = self.root / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def at(self, path: str) -> Path:
        return self.root / str(PurePosixPath(self.directory, path)).lstrip("/")

    def copy(self, text: str) -> None:
        *sources, target = shlex.split(text)
        for source in sources:
            to = self.at(target)
            if target.endswith("/") or len(sources) > 1:
                to /= source
            to.parent.mkdir(parents=True, exist_ok=True)
            found = ROOT / source
            if found.is_dir():
                shutil.copytree(found, to, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
            else:
                shutil.copy(found, to)

    def run(self, text: str, stages: Mapping[str, Stage]) -> None:
        mounts = {
            target: stages[source] / path.lstrip("/")
            for source, path, target in re.findall(r"--mount=type=bind,from=(\w+),source=(\S+),target=(\S+)", text)
        }
        command = re.sub(r"--mount=\S+", "", text)
        for target, source in mounts.items():
            command = command.replace(f" {target} ", f" {source} ")
        # What is compiled takes a minute, and CI compiles it anyway.
        command = command.replace("PGGUARD_BUILD=compiled", "PGGUARD_BUILD=pure")
        command = command.replace(" /wheels ", f" {self.root}/wheels ")
        subprocess.run(
            ["sh", "-ec", command],
            cwd=self.at("."),
            env=os.environ | {"PATH": f"{self.root / 'bin'}:{os.environ['PATH']}"},
            check=True,
            timeout=100,
        )

    def __truediv__(self, path: str) -> Path:
        return self.root / path


@pytest.mark.skipif(os.geteuid() != 0, reason="an image is built by root")
def test_the_steps_of_the_image_make_a_guard_that_is_healthy(tmp_path: Path) -> None:
    """Each is taken where it can be taken here: what is installed goes into a directory, and so does the user."""
    stages: dict[str, Stage] = {}
    stage = Stage(tmp_path / "none")
    kept: dict[str, str] = {}
    for name, text in instructions():
        if name == "FROM":
            image, _, alias = text.partition(" AS ")
            assert re.fullmatch(r"python:3\.\d+(-slim)?", image)
            stage = stages[alias or "final"] = Stage(tmp_path / (alias or "final"))
        elif name == "COPY":
            stage.copy(text)
        elif name == "RUN":
            stage.run(text, stages)
        elif name == "WORKDIR":
            stage.directory = text
            stage.at(".").mkdir(parents=True, exist_ok=True)
        elif name == "ENV":
            variable, _, value = text.partition("=")
            stage.variables[variable] = value
        else:
            kept[name] = text
    assert kept.keys() == {"USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert f"{kept['USER']}:x:10001:" in (stage / "etc/passwd").read_text()
    variables_are_known(set(stage.variables))
    [command] = re.findall(r"CMD (\[.*\])$", kept["HEALTHCHECK"])
    assert json.loads(command) == ["python", HEALTHCHECK]
    entrypoint, arguments = json.loads(kept["ENTRYPOINT"]), json.loads(kept["CMD"])
    assert (stage / "site/bin" / entrypoint[0]).is_file()
    config = stage / stage.variables["PGGUARD_CONFIG"].lstrip("/")
    assert f":{kept['EXPOSE']}" in config.read_text()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config.write_text(config.read_text().replace(f"0.0.0.0:{kept['EXPOSE']}", f"127.0.0.1:{port}"))
    given = {"PGGUARD_CONFIG": str(config), "PYTHONPATH": str(stage / "site"), "PGGUARD_ATTRIBUTION": "off"}
    variables = environment(**given) | {"PGGUARD_UPSTREAM": "host=127.0.0.1 port=1"}
    with started([stage / "site/bin" / entrypoint[0], *arguments], tmp_path, variables) as guard:
        done = subprocess.run(
            [sys.executable, stage / HEALTHCHECK.lstrip("/")],
            env=environment(**given),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        guard.signal(signal.SIGTERM)
        guard.end()


def test_the_image_has_the_extras_that_there_are() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = set(re.findall(r"\[([\w,]+)\]", (DOCKER / "Dockerfile").read_text().replace('["', "")))
    [extras] = wanted
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()


# The documentation


def test_the_documentation_names_each_file_and_each_right() -> None:
    text = (DOCKER / "README.md").read_text()
    for path in (COMPOSE, *MANIFESTS, UNIT, DOCKER / "Dockerfile"):
        assert f"]({path.relative_to(DOCKER)})" in text
    table = text.partition("## What each privilege is for")[2].partition("\n## ")[0]
    assert all(f"`{right}`" in table for right in RIGHTS)


def test_the_arithmetic_is_that_of_the_rate_limit() -> None:
    """Of one cause, by the formula, and counted as the docket does; and how much room there is for it."""
    text = (DOCKER / "README.md").read_text()
    day, hour = 86400, 3600
    settled = RECORD_INTERVAL / SHARE_OF_AGE
    in_a_day, in_an_hour = (settled + settled * math.log(seconds / settled) for seconds in (day, hour))
    assert f"{round(in_a_day)} records" in text
    assert f"{round(in_a_day)},000 records" in text
    assert f"{math.ceil(in_an_hour)} records in the first hour" in text
    assert f"one record in {day * SHARE_OF_AGE / 60:.0f} minutes" in text
    assert f"tells {CAUSES} causes apart" in text
    assert f"room for {ROOM:,}" in text
    at, records = 0.0, 0
    while at <= day:
        records += 1
        at += max(RECORD_INTERVAL, at * SHARE_OF_AGE)
    assert records == pytest.approx(in_a_day, rel=0.02)
