"""How processes and other people's text appear."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgguard.attribution.evidence import Process
from pgguard.faults.text import LABEL_LENGTH, listed, named, printable, process_label, redact, redact_command, shorten
from tests.faults.samples import WORKER_1, process


@pytest.mark.parametrize(
    ("cmdline", "label"),
    [
        (("puma: cluster worker 1: 4864 [app]",), "puma: cluster worker 1"),
        (("puma: cluster worker 1: 4864 [app]", "", ""), "puma: cluster worker 1"),
        (("celery: ForkPoolWorker-3",), "celery: ForkPoolWorker-3"),
        (("python3", "app.py"), "python3 app.py"),
        (("/usr/bin/python3.12", "-u", "-W", "ignore", "/srv/app/main.py", "--token", "t0ken"), "python3.12 main.py"),
        (("/usr/bin/python3", "/usr/bin/gunicorn", "app:app"), "python3 gunicorn"),
        (("python3", "-m", "app"), "python3 -m app"),
        (("python3", "-c", "import secrets"), "python3 -c …"),
        (("ruby", "-r", "bundler/setup", "bin/rails", "server"), "ruby rails"),
        (("java", "-Xmx1g", "-jar", "app.jar"), "java -jar app.jar"),
        (("/usr/bin/psql", "postgresql://app:s3cret@db/app"), "psql"),
        (("/usr/local/bin/worker",), "worker"),
        (("bash",), "bash"),
        ((), "ruby"),
        (("", ""), "ruby"),
    ],
)
def test_labels_say_what_runs_and_not_with_which_arguments(cmdline: tuple[str, ...], label: str) -> None:
    assert process_label(process(4867, 4864, *cmdline)) == label


@given(st.lists(st.text(), max_size=4), st.text(), st.integers(1, 9) | st.none())
def test_labels_are_short_and_printable_whatever_a_process_calls_itself(
    cmdline: list[str], name: str, ppid: int | None
) -> None:
    label = process_label(Process(7, 1, 1.0, name, tuple(cmdline), ppid))
    assert len(label) <= LABEL_LENGTH
    assert label.isprintable()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 日本", "plain é 日本"),
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\udc80", "\\udc80"),
        ("\x9b31m", "\\x9b31m"),
    ],
)
def test_control_characters_are_spelled_out(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["psql", "postgresql://app:s3cret@db/app"], ["psql", "postgresql://app:***@db/app"]),
        (["psql", "postgresql://app:s3c@ret@db/app"], ["psql", "postgresql://app:***@db/app"]),
        (["psql", "postgresql://app:s3c/r@et@db/app"], ["psql", "postgresql://app:***@db/app"]),
        (["psql", "postgresql://db:5432/app"], ["psql", "postgresql://db:5432/app"]),
        (["app", "app:s3cret@db:5432/app"], ["app", "app:***@db:5432/app"]),
        (["app", "--dsn=app:s3cret@db"], ["app", "--dsn=app:***@db"]),
        (["pgguard", "--listen", "unix:@name:5432"], ["pgguard", "--listen", "unix:@name:5432"]),
        (["pgguard", "--listen", "unix:/run/a@b:1"], ["pgguard", "--listen", "unix:/run/a@b:1"]),
        (["puma", "6.4 (tcp://0.0.0.0:9292) [app@host]"], ["puma", "6.4 (tcp://0.0.0.0:9292) [app@host]"]),
        (["psql", "host=db password=s3cret user=app"], ["psql", "host=db password=*** user=app"]),
        (["psql", "password='s3 \\'cret' user=app"], ["psql", "password=*** user=app"]),
        (
            ["psql", "postgresql:///app?user=a&password=s3cret&x=1"],
            ["psql", "postgresql:///app?user=a&password=***&x=1"],
        ),
        (
            ["psql", "-c", "ALTER ROLE app PASSWORD 's3''cret' LOGIN"],
            ["psql", "-c", "ALTER ROLE app PASSWORD *** LOGIN"],
        ),
        (
            ["psql", "-c", "alter user app encrypted password e's3\\'cret'"],
            ["psql", "-c", "alter user app encrypted password ***"],
        ),
        (["psql", "-c", "CREATE USER a PASSWORD $x$s3cret$x$;"], ["psql", "-c", "CREATE USER a PASSWORD ***;"]),
        (["psql", "-c", "ALTER ROLE app PASSWORD 's3cret"], ["psql", "-c", "ALTER ROLE app PASSWORD ***"]),
        (["psql", "-c", "ALTER ROLE app PASSWORD NULL"], ["psql", "-c", "ALTER ROLE app PASSWORD NULL"]),
        (["psql", "-c", "SELECT 'password' FROM t"], ["psql", "-c", "SELECT 'password' FROM t"]),
        (["app", "--db-password=s3cret"], ["app", "--db-password=***"]),
        (["app", "--password", "s3cret", "-v"], ["app", "--password", "***", "-v"]),
        (["PGPASSWORD=s3cret", "app"], ["PGPASSWORD=***", "app"]),
        (["app", "--password-file", "f"], ["app", "--password-file", "f"]),
    ],
)
def test_command_lines_lose_their_passwords(arguments: list[str], shown: list[str]) -> None:
    assert redact_command(arguments) == shown


def test_passwords_are_redacted_in_titles() -> None:
    assert redact("worker postgres://u:p@h/db busy") == "worker postgres://u:***@h/db busy"


def test_names() -> None:
    assert named(4867, WORKER_1) == "pid 4867 (puma: cluster worker 1)"
    assert named(4867, None) == "pid 4867"


def test_lists_end_in_and_and_stay_short() -> None:
    assert [listed(["a", "b", "c"][:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert listed([str(n) for n in range(100)]) == "0, 1, 2, 3, 4, 5, 6 and 93 more"


def test_shortened_text_says_so() -> None:
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "abcde…"
