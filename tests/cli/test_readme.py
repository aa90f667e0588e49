"""What the README tells people to type works as it is pasted, one block after the other."""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import cmarkgfm
import jsonschema
import pytest
import yaml
from cmarkgfm.cmark import Options
from typer.testing import CliRunner

from pgguard.cli.explain import explain
from pgguard.cli.main import app
from pgguard.proxy.settings import IN_FILE_ALONE, Settings, load_settings
from pgguard.session.verdicts import Kind
from tests.cli.pasted import pasted
from tests.servers import is_open_to_others

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
INSTALL, *BLOCKS = [
    block for block in re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL) if "pytest" not in block
]
"""How it is installed, and what is typed into the same shell afterwards; the command for the tests is CI's to try."""

WORKFLOWS = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)]
"""Steps of GitHub's workflows."""
_STEPS = [step["run"] for steps in WORKFLOWS for step in steps]
_OURS = r"(?:pgguard|pytest|pip|python3? -m) "
_SENTENCES = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = dict.fromkeys(
    re.sub(r"\s+", " ", command).strip()
    for command in (
        *re.findall(rf"^(?:.*&& )?({_OURS}[^|&\n]*)", "\n".join([INSTALL, *BLOCKS]), re.MULTILINE),
        *re.findall(r"^\$ (.*)$", README, re.MULTILINE),
        *re.findall(rf"`({_OURS}[^`|…=]*)(?:[|…][^`]*)?`", _SENTENCES),
        *_STEPS,
    )
)
"""Every command of pgguard's, and of its tests, that is mentioned anywhere, in a block or within a sentence."""
BEHIND = [command for command in COMMANDS if re.match(r"pgguard run .*-- [a-z]", command) and command not in _STEPS]
"""Those that run something behind a guard, but for the workflow's."""

VENV = f"""#!/bin/sh
[ "$*" = "-m venv .venv" ] || exec {sys.executable} "$@"
mkdir -p .venv/bin
cat > .venv/bin/activate <<'END'
PATH={Path(sys.executable).parent}:$PATH
pip() {{ [ "$*" = "install .[demo]" ]; }}
pgguard() {{ [ "$*" = demo ] || command pgguard "$@"; }}
END
"""
"""A ``python3`` whose virtual environments are the one that the tests run in. The demonstration has its own tests."""


@pytest.mark.parametrize("block", BLOCKS, ids=[re.sub(r"\W+", " ", block)[:50] for block in BLOCKS])
def test_a_block_works_as_it_is_pasted(block: str, tmp_path: Path) -> None:
    root = "useradd" in block
    if root and not is_open_to_others():
        pytest.skip("the installation is where only root may read")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "python3").write_text(VENV)
    (programs / "python3").chmod(0o755)
    system = [part for part in os.environ["PATH"].split(":") if shutil.which("pgguard", path=part) is None]
    path = ":".join([str(programs), *system])
    (tmp_path / "home").mkdir()
    (tmp_path / "home/faults.jsonl").touch()  # what an earlier block has written
    said = pasted(f"{INSTALL}\n{block}", tmp_path, root=root, path=path)
    assert "command not found" not in said
    assert ("pgguard: ready on " in said) is ("pgguard serve" in block), said


def test_without_the_first_block_there_is_no_such_command(tmp_path: Path) -> None:
    """Or what the others show is nothing."""
    system = [part for part in os.environ["PATH"].split(":") if shutil.which("pgguard", path=part) is None]
    assert "command not found" in pasted("pgguard --version || true", tmp_path, path=":".join(system))


def standing_in(program: str, says: str, directory: Path) -> str:
    """A ``PATH`` on which something that only says something is in a program's place; pgguard is there, too."""
    programs = directory / "programs"
    programs.mkdir()
    (programs / program).write_text(f"#!/bin/sh\necho {says}\n")
    (programs / program).chmod(0o755)
    return f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"


SAYS = '"ran ${0##*/}${*:+ $*} at $DATABASE_URL"'
THERE = r"at postgresql://\w+:\w+@127\.0\.0\.1:(?!5432)\d+/\w+$"


@pytest.mark.parametrize("command", {command.split(" -- ")[0]: command for command in BEHIND}.values())
def test_what_runs_behind_a_guard_is_led_there(command: str, tmp_path: Path) -> None:
    """One for each way to call pgguard, as it is pasted, with something else in the place of the application."""
    _, behind = command.split(" -- ")
    path = standing_in(behind.split()[0], SAYS, tmp_path)
    url = "export DATABASE_URL=postgresql://app:secret@db.internal/app"
    said = pasted(f"{url}\n{command}", tmp_path, path=path, ctrl_c=False)
    assert re.search(rf"^ran {re.escape(behind)} {THERE}", said, re.MULTILINE), said


def test_what_a_workflow_is_told(tmp_path: Path) -> None:
    vendored = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "github-workflows.json"
    [steps] = WORKFLOWS
    workflow = {"on": "push", "jobs": {"tests": {"runs-on": "ubuntu-latest", "steps": steps}}}
    jsonschema.validate(workflow, json.loads(vendored.read_text()))
    path = standing_in("make", SAYS, tmp_path)
    variables = [f"export {name}='{value}'" for step in steps for name, value in step.get("env", {}).items()]
    said = pasted("\n".join([*variables, *(step["run"] for step in steps)]), tmp_path, path=path, ctrl_c=False)
    assert re.search(rf"^ran make test {THERE}", said, re.MULTILINE), said


def test_tests_run_with_a_guard(tmp_path: Path) -> None:
    [block] = re.findall(r"^```sh\n((?:[^`\n].*\n)*pytest --pgguard\n)```$", README, re.MULTILINE)
    path = standing_in("pip", '"$*"', tmp_path)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/test_nothing.py").write_text("def test_nothing():\n    pass\n")
    said = pasted(f"export DATABASE_URL=postgresql://app:secret@db.internal/app\n{block}", tmp_path, path=path)
    assert "pgguard: no connection came through the guard" in said
    assert re.search(r"^=+ 1 passed", said, re.MULTILINE), said


@pytest.mark.parametrize("block", re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))
def test_what_a_test_is_told_is_python(block: str) -> None:
    compile(block, "README.md", "exec")


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("pgguard ")])
def test_a_command_that_is_mentioned_is_one(command: str) -> None:
    """It is there, and so is each of its options."""
    words = shlex.split(command)[1:]
    own = words[: words.index("--")] if "--" in words else words
    done = CliRunner().invoke(app, [*own, "--help"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    "command", [one for one in COMMANDS if re.match(r"pgguard explain \S+ --for (?!FRAMEWORK)", one)]
)
def test_there_is_code_to_paste(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, kind, *software = shlex.split(command)
    assert set(software[::2]) == {"--for"}
    assert explain(kind, software[1::2]) == 0
    assert re.search(r"^    \S.*\n(.*\n)*?  See https:", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("command", [one for one in COMMANDS if re.match(r"python3? -m tests\.", one)])
def test_a_command_for_those_who_work_on_it_is_one(command: str) -> None:
    _, _, module, *options = shlex.split(command)
    if options:
        done = subprocess.run(
            [sys.executable, "-m", module, *options, "--help"], cwd=ROOT, check=False, capture_output=True
        )
        assert done.returncode == 0, done.stderr
    else:
        assert importlib.util.find_spec(module) is not None


def test_what_is_installed_can_be() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.findall(r"pip install (?:-e )?'?(?:\.|pgguard)\[([\w,]+)\]", README)
    assert {"demo", "stacks", "admin", "otel", "test"} <= set(asked) <= extras.keys()


def test_links_lead_somewhere() -> None:
    """Within the page, and to files beside it; nothing that is folded is left open."""
    headings = {
        re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert "docker/report.svg" in targets
    for target in targets:
        assert target.startswith("https://") or (
            target[1:] in headings if target.startswith("#") else (ROOT / target).exists()
        ), target
    page = cmarkgfm.github_flavored_markdown_to_html(README, options=Options.CMARK_OPT_UNSAFE)
    assert page.count("<details>") == page.count("</details>") == page.count("<summary>") > 3


def test_each_log_line_leads_to_a_kind() -> None:
    """And so does each that the page begins with."""
    [table] = re.findall(r"^\| what somebody found .*\n\|.*\n((?:\|.*\n)+)", README, re.MULTILINE)
    symptoms = re.findall(r"^    (\S.*)$", README[: README.index("\n## ")], re.MULTILINE)
    assert symptoms
    assert all(f"`{symptom}" in table for symptom in symptoms)
    for row in table.splitlines():
        kinds = set(re.findall(r"`([a-z]+(?:-[a-z]+)+)`", row.split("|")[2]))
        assert kinds
        assert kinds <= set(Kind), row


@pytest.mark.parametrize("block", re.findall(r"^```toml\n(.*?)^```$", README, re.MULTILINE | re.DOTALL))
def test_a_configuration_file_is_one(block: str, tmp_path: Path) -> None:
    (tmp_path / "pgguard.toml").write_text(block)
    settings = load_settings({}, tmp_path / "pgguard.toml")
    assert settings.fronts()
    settings.policies()


def test_every_option_of_the_command_line_is_in_its_table() -> None:
    for name in Settings.model_fields.keys() - IN_FILE_ALONE:
        assert re.search(rf"^\| `--{name.replace('_', '-')}[ `]", README, re.MULTILINE), name
        assert f"`PGGUARD_{name.upper()}`" in README
