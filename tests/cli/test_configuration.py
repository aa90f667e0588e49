"""A configuration error exits with 2 and one line that says what to change."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pgguard.faults.policy import KindAction, Mode
from pgguard.proxy.errors import ConfigurationError
from pgguard.proxy.settings import DatabaseSettings, KindSettings, Settings, load_settings
from pgguard.session.verdicts import Kind
from tests.cli.conftest import Refused
from tests.proxy.spawned import environment, run, spawned


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["serve", "--xyzzy"], "No such option: --xyzzy: see pgguard serve --help"),
        (["serve", "--unread-anwser", "3"], "No such option: --unread-anwser: did you mean --unread-answer?"),
        (["serve", "-upstream", "host=x"], "No such option: -u: did you mean --upstream?"),
        (["serve", "-u", "host=x"], "No such option: -u: see pgguard serve --help"),
        (["--upstream", "host=x", "serve"], "No such option: --upstream: did you mean pgguard serve --upstream?"),
        (["doctor", "--jsno"], "No such option: --jsno: did you mean --json?"),
        (["explain", "--xyzzy"], "No such option: --xyzzy: see pgguard explain --help"),
        (["--versoin"], "No such option: --versoin: did you mean --version?"),
        (["--xyzzy"], "No such option: --xyzzy: see pgguard --help"),
        (["bogus"], "No such command 'bogus': see pgguard --help"),
        (["sevre"], "No such command 'sevre': did you mean pgguard serve?"),
        (["Doctor"], "No such command 'Doctor': did you mean pgguard doctor?"),
        (["help"], "No such command 'help': did you mean pgguard --help?"),
        (["version"], "No such command 'version': did you mean pgguard --version?"),
        (["serve", "extra"], "unexpected extra argument(s) (extra): see pgguard serve --help"),
        (["doctor", "extra"], "unexpected extra argument(s) (extra): see pgguard doctor --help"),
        (["serve", "--mode"], "'--mode' requires an argument: see pgguard serve --help"),
        (["serve", "--mode", "rejetc"], "should be 'log' or 'reject', not 'rejetc': did you mean reject?"),
        (["serve", "--attribution", "epbf"], "'proc' or 'off', not 'epbf': did you mean ebpf?"),
        (["serve", "--sql", "normalised"], "not 'normalised': did you mean normalized?"),
        (["serve", "--evidence-budget", "6"], "should be a number of seconds, from 0 to 5, not '6'"),
        (["serve", "--mode", "strict"], "--mode or PGGUARD_MODE should be 'log' or 'reject', not 'strict'"),
        (["serve", "--sql", "some"], "should be 'normalized', 'full' or 'none', not 'some'"),
        (["serve", "--attribution", "on"], "should be 'auto', 'ebpf', 'proc' or 'off', not 'on'"),
        (
            ["serve", "--unread-answer", "x"],
            "PGGUARD_UNREAD_ANSWER should be a number of seconds, from 0 to 86400, not 'x'",
        ),
        (["serve", "--unread-answer", "-1"], "should be a number of seconds, from 0 to 86400, not '-1'"),
        (["serve", "--idle-in-transaction", "inf"], "should be a number of seconds, from 0 to 86400, not 'inf'"),
        (["serve", "--listen", "6544"], "--listen 6544: write HOST:PORT or unix:DIR[:PORT]"),
        (["serve", "--listen", "unix:/nowhere"], "create the directory /nowhere"),
        (["serve", "--upstream", "host"], '--upstream: missing "=" after "host"'),
        (["serve", "--upstream", "sslmode=requir"], "--upstream: there is no such sslmode: use disable, allow, prefer"),
        (
            ["serve", "--upstream", "host=a sslcert=/nowhere"],
            "--upstream: sslcert: the certificate in /nowhere can't be",
        ),
        (["serve", "--upstream", "service=nowhere"], 'definition of service "nowhere" not found'),
        (["serve", "--faults", "/nowhere/faults.jsonl"], "--faults: "),
        (["serve", "--faults", ""], "--faults: "),
        (["serve", "--tls-cert", "nowhere.pem"], "--tls-cert nowhere.pem: --tls-key is missing: name the file with"),
        (
            ["serve", "--tls-cert", "nowhere.pem", "--tls-key", "x"],
            "--tls-cert: the certificate in nowhere.pem can't be",
        ),
        (
            ["serve", "--tls-key", "x"],
            "--tls-key is given, and --tls-cert is missing: name the certificate's file, too",
        ),
        (["serve", "--tls-cert", "self-signed", "--tls-key", "x"], "makes a key: leave it out"),
        (["serve", "--tls-cert", "self-signed", "--tls-ca", "x"], "--tls-ca: the root certificates in x"),
        (["serve", "--config", "nowhere.toml"], "--config nowhere.toml: No such file or directory"),
        (["serve", "--config", "."], "--config .: Is a directory"),
    ],
    ids=" ".join,
)
def test_what_is_typed(arguments: list[str], says: str, refused: Refused) -> None:
    refused(*arguments, says=says)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("PGGUARD_MODE", "strict", "--mode or PGGUARD_MODE should be"),
        ("PGGUARD_LISTEN", "127.0.0.1:0 nowhere", "--listen nowhere: write HOST:PORT"),
        ("PGSERVICE", "nowhere", 'definition of service "nowhere" not found'),
        ("PGSSLMODE", "requir", "use disable, allow, prefer, require, verify-ca or verify-full"),
    ],
)
def test_what_is_in_the_environment(name: str, value: str, says: str, refused: Refused) -> None:
    refused("serve", says=says, **{name: value})


def test_a_port_in_use(refused: Refused) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        where = f"127.0.0.1:{other.getsockname()[1]}"
        refused("serve", "--listen", where, says=f"--listen {where}: Address already in use")


def test_a_guard_in_front_of_itself(tmp_path: Path) -> None:
    """As one gets it who has told all clients in this shell about the guard."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # It has given up its rights by then, and so it is a process.
    variables = {"PGHOST": "localhost", "PGPORT": port}
    done = run("serve", "--listen", f"127.0.0.1:{port}", cwd=tmp_path, variables=variables)
    assert (done.returncode, done.stdout) == (2, "")
    says = "that is where pgguard itself listens: name PostgreSQL's own address"
    assert done.stderr == f"pgguard: --upstream localhost:{port}: {says}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mode = ", "is not valid TOML"),
        ("a = " + "[" * 5000, "a number in it is too long, or its brackets are nested too deeply"),
        (f"idle_in_transaction = {'9' * 5000}", "a number in it is too long, or its brackets are nested too deeply"),
        ("mode = 'strict'", "mode should be 'log' or 'reject', not 'strict'"),
        ("moed = 'log'", "moed: there is no such setting: did you mean mode?"),
        ("unread-answer = 3", "unread-answer: there is no such setting: did you mean unread_answer?"),
        ("Upstream = ''", "Upstream: there is no such setting: did you mean upstream?"),
        ("bogus = 3", "bogus: there is no such setting: remove it"),
        ("mode = 'rejetc'", "mode should be 'log' or 'reject', not 'rejetc': did you mean reject?"),
        ("[kinds]\nunclean-close = 'ignroe'", "not 'ignroe': did you mean ignore?"),
        ("evidence_budget = 5.5", "evidence_budget should be a number of seconds, from 0 to 5, not 5.5"),
        ("listen = 6544", "listen should be an address, or a list of them, not 6544"),
        ("listen = []", "listen should be an address, or a list of them, not an empty one"),
        ("listen = [5432]", "listen.0 should be text in quotation marks, not 5432"),
        ("startup_timeout = 0", "startup_timeout should be a number of seconds, more than 0 and at most 3600, not 0"),
        ("shutdown_timeout = nan", "shutdown_timeout "),
        ("[kinds]\nbogus = 'log'", "kinds.bogus: there is no such kind of fault: pgguard explain lists them"),
        (
            "[kinds]\nunclean-clsoe = 'log'",
            "no such kind of fault: did you mean unclean-close?",
        ),
        ("[kinds]\nunread = 'log'", "kinds.unread: there is no such kind of fault: did you mean unread-answer?"),
        ("unread_answer = 'soon'", "unread_answer should be a number of seconds, from 0 to 86400, not 'soon'"),
        ("[kinds]\nunclean-close = 'forgive'", "kinds.unclean-close.action should be 'log', 'reject'"),
        (
            "[kinds]\nunclean-close = {action = 'log', then = 1}",
            "unclean-close.then: there is no such setting: remove it",
        ),
        (
            "[kinds]\nunclean-close = {acton = 'log'}",
            "acton: there is no such setting: did you mean action?",
        ),
        ("[kinds]\nunclean-close = 'drop'", "unclean-close can't be dropped"),
        ("[kinds]\nuntracked = 'reject'", "untracked can't be rejected"),
        ("kinds = 1", "kinds should be a table, as in [kinds], not 1"),
        ("upstream = 1", "upstream should be text in quotation marks, not 1"),
        ("faults = 1", "faults should be text in quotation marks, not 1"),
        ('faults = "a\\u0000b"', "faults holds a NUL character"),
        ('listen = ["127.0.0.1:0", "unix:a\\u0000b"]', "listen holds a NUL character"),
        ('upstream = "host=h\\u0000 password=x"', "upstream holds a NUL character"),
    ],
)
def test_what_is_in_the_file(text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pgguard.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as raised:
        load_settings({}, None).policies()
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--listen", f"127.0.0.1:{'9' * 5000}"), "the port is not a port number"),
        (("--upstream", f"host=h port={'9' * 5000}"), "is not a port number: write one from 0 to 65535"),
        (("--upstream", f"postgresql://h:{'9' * 5000}/"), "is not a port number: write one from 0 to 65535"),
        (("--upstream", f"host=h connect_timeout=1{'0' * 400}"), "is not a number of seconds"),
        (("--listen", "\x1b[31mx:5\u202e"), "\\x1b[31mx:5\\u202e"),
        # bytes that are no UTF-8
        (("--listen", "\udcff:5"), "\\udcff:5: this can't be a host name"),
        (("--upstream", "host=a b\udcff"), "missing"),
        (("--upstream", "postgresql://\udcff:x/"), "is not a port number"),
        (("--sql", "\udcff"), "not '\\udcff'"),
    ],
)
def test_numbers_and_characters_that_nobody_means(arguments: tuple[str, str], says: str, refused: Refused) -> None:
    refused("serve", "--listen", "127.0.0.1:0", *arguments, says=says)


VALUES = [
    *("true", "false", "5", "-1", "0.5", "nan", "inf", "-inf", f"1{'0' * 400}", "1979-05-27", "07:32:00"),
    *('""', '"x"', '"0.5"', '"true"', '"log"', '"off"', '"full"', f'"{"x" * 5000}"', '"a\\u0000b"'),
    *("[]", "[5]", "[true]", "[[]]", "[{}]", '["x"]', "{}", "{a = 1}", "{a = {}}", "{action = {}}", '{"\\u0000" = 1}'),
]
PROGRAMMERS_WORDS = re.compile(
    r"input|valid|dictionary|instance|required|type|bool|int\b|float|str\b|Settings|pydantic|None|True|False|greater|less"
)


def _suits(field: FieldInfo, value: Any) -> bool:
    """Whether this is a value that a setting may have in the file."""
    annotation: Any = field.annotation
    if annotation is float:
        highest = next(limit.le for limit in field.metadata if hasattr(limit, "le"))
        return type(value) in {int, float} and 0 < value <= highest
    if annotation is bool:
        return isinstance(value, bool)
    if annotation in {str, Path | None}:
        return isinstance(value, str) and "\0" not in value
    if annotation == list[str]:
        texts = [value] if isinstance(value, str) else value
        return isinstance(texts, list) and texts != [] and all(_suits(FieldInfo(annotation=str), one) for one in texts)
    if annotation == dict[Kind, KindSettings]:
        return bool(value == {})
    if annotation == list[DatabaseSettings]:
        return bool(value == [])
    return isinstance(value, str) and value in (get_args(annotation) or list(annotation))


def _settings() -> list[tuple[str, FieldInfo]]:
    """Every setting that there is, by the keys that lead to it; of databases see tests/proxy/test_databases.py."""
    found = []
    for name, field in Settings.model_fields.items():
        found.append((name, field))
        for model in get_args(field.annotation):
            if isinstance(model, type) and issubclass(model, BaseModel) and model is not DatabaseSettings:
                found += [(f"{name}.unclean-close.{key}", inner) for key, inner in model.model_fields.items()]
    return found


@pytest.mark.parametrize(("name", "field"), [pytest.param(*one, id=one[0]) for one in _settings()])
def test_whatever_stands_there_it_is_taken_for_what_it_is_or_said_what_should_stand_there(
    name: str, field: FieldInfo, tmp_path: Path
) -> None:
    """In words of everyday, whatever library has found it out; and of a long value only the beginning."""
    path = tmp_path / "pgguard.toml"
    for text in VALUES:
        path.write_text(f"{name} = {text}\n")
        if _suits(field, tomllib.loads(f"value = {text}")["value"]):
            load_settings({}, path)
            continue
        with pytest.raises(ConfigurationError) as raised:
            load_settings({}, path)
        said = str(raised.value)
        where = re.match(rf"{re.escape(str(path))}: {re.escape(name)}[\w.\0]*(?P<what>.*)", said)
        assert where is not None, (text, said)
        expected = r" should be |: there is no such | holds a NUL character: remove it| is missing: each of "
        assert re.match(expected, where["what"]), said
        assert PROGRAMMERS_WORDS.search(re.sub(r"'[^']*'", "", where["what"])) is None, (text, said)
        assert len(where["what"]) < 200, text


@pytest.mark.parametrize("text", [text for text in VALUES if text not in {'"log"', "{}", '""'}])
def test_whatever_stands_for_a_kinds_action(text: str, tmp_path: Path) -> None:
    path = tmp_path / "pgguard.toml"
    path.write_text(f"[kinds]\nunclean-close = {text}\n")
    with pytest.raises(ConfigurationError) as raised:
        load_settings({}, path)
    said = str(raised.value).partition(f"{path}: kinds.unclean-close")[2]
    assert " should be " in said or ": there is no such setting: " in said
    assert PROGRAMMERS_WORDS.search(re.sub(r"'[^']*'", "", said)) is None, said
    assert len(said) < 200


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("evidence_budget = true", "evidence_budget should be a number of seconds, from 0 to 5, not true"),
        (
            "evidence_budget = '0.25'",
            "evidence_budget should be a number of seconds, from 0 to 5, not '0.25': leave out the quotation marks",
        ),
        ("mode = true", "mode should be 'log' or 'reject', not true"),
        ("[kinds]\nuntracked = 5", "kinds.untracked should be an action: 'log', 'reject', 'ignore' or 'drop', not 5"),
        ("[kinds]\nuntracked = {}", "kinds.untracked.action is missing: name an action, 'log', 'reject', 'ignore' or"),
        ("[kinds]\nuntrakced = {then = 1}", "kinds.untrakced: there is no such kind of fault: did you mean untracked?"),
        (f"idle_in_transaction = 1{'0' * 400}", f"from 0 to 86400, not 1{'0' * 58}…"),
    ],
)
def test_a_value_is_shown_as_it_is_written(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "pgguard.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=re.escape(says)):
        load_settings({}, path)


def test_what_is_typed_is_text_and_may_be_a_number(tmp_path: Path) -> None:
    (tmp_path / "pgguard.toml").write_text("evidence_budget = 1\n")
    settings = load_settings({"idle_in_transaction": "2.5"}, tmp_path / "pgguard.toml")
    assert (settings.idle_in_transaction, settings.evidence_budget) == (2.5, 1.0)
    with pytest.raises(ConfigurationError, match="number of seconds, from 0 to 86400, not 'true'"):
        load_settings({"idle_in_transaction": "true"}, None)


def test_an_error_of_the_file_in_one_line(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "pgguard.toml").write_text("[kinds]\nunclean-close = 'drop'\n")
    refused("serve", says="unclean-close can't be dropped")


def test_a_file_in_no_encoding(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_bytes(b"mode = '\xff'")
    with pytest.raises(ConfigurationError, match="is not valid TOML"):
        load_settings({}, tmp_path / "other.toml")


def test_a_file_without_an_end(refused: Refused) -> None:
    refused("serve", "--config", "/dev/zero", says="--config /dev/zero: it is larger than 1 MiB: name another file")


def test_what_is_given_comes_before_the_file_and_the_file_before_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "other.toml"
    file.write_text(
        "mode = 'reject'\nsql = 'none'\nlisten = ['127.0.0.1:1']\n[kinds]\nmessage-while-idle = 'drop'\n"
        "unclean-close = {action = 'ignore'}\n"
    )
    settings = load_settings({"sql": "full", "mode": "", "listen": [], "faults": None}, file)
    assert settings.mode is Mode.REJECT
    assert settings.sql == "full"
    assert settings.listen == ["127.0.0.1:1"]
    assert settings.attribution == "auto"
    assert settings.policies()[None].per_kind == {
        Kind.MESSAGE_WHILE_IDLE: KindAction.DROP,
        Kind.UNCLEAN_CLOSE: KindAction.IGNORE,
    }


NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


async def test_which_file_the_settings_are_from_is_said(tmp_path: Path) -> None:
    (tmp_path / "pgguard.toml").write_text("sql = 'none'\n")
    with spawned("host=127.0.0.1 port=1", cwd=tmp_path) as guard:
        guard.signal(signal.SIGTERM)
        assert f"pgguard: PostgreSQL is at 127.0.0.1:1; settings are from {tmp_path}/pgguard.toml\n" in guard.end()


@needs_root
@pytest.mark.parametrize("kind", ["file", "link", "fifo", "directory"])
async def test_a_file_that_somebody_else_has_put_where_the_guard_is_started_is_not_read(
    kind: str, tmp_path: Path
) -> None:
    """Nor what a link of theirs leads to, though that is root's own; and a FIFO isn't waited for."""
    path = tmp_path / "pgguard.toml"
    (tmp_path / "other.toml").write_text("mode = 'nonsense'\n")
    match kind:
        case "file":
            path.write_text("mode = 'nonsense'\n")
        case "link":
            path.symlink_to(tmp_path / "other.toml")
        case "fifo":
            os.mkfifo(path)
        case _:
            path.mkdir()
    os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    with spawned("host=127.0.0.1 port=1", cwd=tmp_path) as guard:
        guard.signal(signal.SIGTERM)
        said = guard.end()
    whose = "it is a link made by user nobody" if kind == "link" else "it belongs to user nobody"
    what = "make root or the guard's user its owner, and let nobody else write to it, or remove it"
    assert f"pgguard: {path} is ignored, because {whose}: {what}\n" in said


@needs_root
def test_a_file_that_is_named_and_somebody_elses_is_refused(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "other.toml"
    path.write_text("mode = 'log'\n")
    os.chown(path, NOBODY, NOBODY)
    says = f"--config {path}: it belongs to user nobody: make root or the guard's user its owner"
    refused("serve", "--config", str(path), says=says)


def test_a_file_that_anybody_may_write_is_refused(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "other.toml"
    path.write_text("mode = 'log'\n")
    path.chmod(0o666)
    refused("serve", says=f"--config {path}: anybody can write to it: make root", PGGUARD_CONFIG=str(path))


def test_a_link_that_leads_nowhere_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pgguard.toml").symlink_to(tmp_path / "nowhere")
    assert load_settings({}, None) == Settings()


def test_an_error_in_what_was_typed_is_not_blamed_on_the_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "pgguard.toml").write_text("sql = 'none'\n")
    refused("serve", "--mode", "strict", says="pgguard: --mode or PGGUARD_MODE should be")


def test_an_option_comes_before_the_environment_and_that_before_the_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "pgguard.toml").write_text("mode = 'file'\n")
    refused("serve", says="not 'file'")
    refused("serve", says="not 'environment'", PGGUARD_MODE="environment")
    refused("serve", "--mode", "option", says="not 'option'", PGGUARD_MODE="environment")


def test_several_addresses_in_the_environment(short_directory: Path) -> None:
    addresses = f"unix:{short_directory}:1 unix:{short_directory}:2 127.0.0.1:0"
    with spawned("host=127.0.0.1 port=1", cwd=short_directory, listen=None, PGGUARD_LISTEN=addresses) as guard:
        sockets = sorted(path.name for path in short_directory.iterdir() if path.is_socket())
        assert sockets == [".s.PGSQL.1", ".s.PGSQL.2"]
        guard.signal(signal.SIGTERM)
        guard.end()


def test_one_address_needs_no_list(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text("listen = 'unix:/run/pgguard'\n")
    assert load_settings({}, tmp_path / "one.toml").listen == ["unix:/run/pgguard"]


def test_the_defaults_are_those_of_the_contract() -> None:
    settings = Settings()
    assert settings.listen == ["127.0.0.1:6544"]
    assert settings.evidence_budget == 0.25
    assert (settings.mode, settings.attribution, settings.sql, settings.faults) == ("log", "auto", "normalized", None)


@pytest.mark.parametrize(
    "arguments", [["--bogus"], ["--listen", "nowhere"], ["--listen", "unix:/nowhere"]], ids=" ".join
)
def test_as_a_process(arguments: list[str], tmp_path: Path) -> None:
    """What the other tests see from inside is what a shell sees."""
    done = run("serve", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("pgguard: ")
    assert done.stderr.count("\n") == 1


def test_no_command_gets_the_help(tmp_path: Path) -> None:
    done = run(cwd=tmp_path)
    assert done.returncode == 2
    assert "serve" in done.stdout
    assert done.stderr == ""


def test_standard_streams_that_are_closed_are_nobody_elses(tmp_path: Path) -> None:
    """A supervisor may start the guard without them: a socket in their place would get the reports."""
    command = [sys.executable, "-m", "pgguard", "serve", "--mode", "nonsense"]
    script = '"$@" <&- >&- 2>&-; echo $?'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *command], cwd=tmp_path, env=environment(), capture_output=True, check=True
    )
    assert done.stdout == b"2\n"


@pytest.mark.parametrize(
    "value", ["host=db password=x S3CR3T/@'S3CR3T", "postgresql://app:S3 CR3T@db/app", "app:S3CR3T@db"]
)
def test_a_value_that_may_hold_a_password_is_not_shown(value: str, tmp_path: Path) -> None:
    """What would show where the password ends may be mistyped, or cut off."""
    file = tmp_path / "pgguard.toml"
    file.write_text(f'upstream = "host=db"\nmode = {json.dumps(value)}\n')
    with pytest.raises(ConfigurationError) as raised:
        load_settings({}, file)
    assert "CR3T" not in str(raised.value)
    assert str(raised.value).endswith('not "…"')
