"""How processes and other people's text appear."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgguard.attribution.evidence import Process
from pgguard.faults.text import LABEL_LENGTH, discreet_setting, listed, named, printable, process_label, shorten
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
        (("python3", "-uc", "import app", "worker"), "python3 -uc …"),
        (("python3", "-cimport app", "worker"), "python3 -c …"),
        (("python3", "-Werror", "app.py"), "python3 app.py"),
        (("python3", "-", "worker"), "python3 -"),
        (("python3", "-u", "-", "worker"), "python3 -"),
        (("python3", "app.py", "-"), "python3 app.py"),
        (("python3", "app.py", "-c", "x"), "python3 app.py"),
        (("perl", "-we", "work()", "queue"), "perl -we …"),
        (("perl", "-MJSON::Base", "job.pl"), "perl job.pl"),
        (("ruby", "-", "queue"), "ruby -"),
        (("ruby", "-rbundle", "job.rb"), "ruby job.rb"),
        (("node", "-pe", "work()", "queue"), "node -pe …"),
        (("node", "--eval=work()", "queue"), "node --eval …"),
        (("node", "-r", "dotenv/config", "app.js"), "node app.js"),
        (("node", "-", "queue"), "node -"),
        (("php", "-r", "work();", "queue"), "php -r …"),
        (("bash", "-lc", "exec bin/worker"), "bash -lc …"),
        (("bash", "-s", "queue"), "bash -s"),
        (("sh", "-", "job.sh"), "sh job.sh"),
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


def test_names() -> None:
    assert named(4867, WORKER_1) == "pid 4867 (puma: cluster worker 1)"
    assert named(4867, None) == "pid 4867"


def test_lists_end_in_and_and_stay_short() -> None:
    assert [listed(["a", "b", "c"][:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]
    assert listed([str(n) for n in range(100)]) == "0, 1, 2, 3, 4, 5, 6 and 93 more"


def test_shortened_text_says_so() -> None:
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "abcde…"


def test_a_name_is_looked_at_and_shown_as_far_as_a_server_keeps_it() -> None:
    """A stranger's start-up packet has room for ten thousand bytes, and nothing else is needed to send it."""
    assert discreet_setting("a" * 63) == "a" * 63
    assert discreet_setting("a" * 10_000) == "a" * 63 + "…"
    shown = discreet_setting('/pwd:5"" ' * 1100)
    assert shown is not None
    assert len(shown) < 70
    assert discreet_setting("x" * 50 + " password=hunter2" + "3" * 99) == "x" * 50 + " password=***…"
