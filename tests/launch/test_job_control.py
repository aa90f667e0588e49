"""What a terminal's signals are taken for that come so quickly that two of them are pending at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from pgguard.launch.arrivals import STOPS

SECONDS = 30
AGAIN = """
import os, signal, sys
from pgguard.launch.arrivals import stop_as_told
number = int(sys.argv[1])
signal.pthread_sigmask(signal.SIG_BLOCK, {number})
if sys.argv[2:]:
    os.kill(os.getpid(), number)
stop_as_told(number)
assert number not in signal.sigpending()
"""
ASKED = """
import os, signal, sys
import trio
from pgguard.launch.arrivals import Arrivals
from pgguard.launch.companion import Companion
with Arrivals(), Companion() as companion:
    for sent in sys.argv[1].split():
        whom, number = sent[0], int(sent[1:])
        os.kill(0 if whom == "g" else os.getpid(), number)
    print(trio.run(companion.has_got, int(sys.argv[2])))
"""


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("pending", [[], ["pending"]])
def test_one_stop_stops_once(number: int, pending: list[str]) -> None:
    """Also one that a terminal has sent meanwhile, which is pending."""
    process = subprocess.Popen([sys.executable, "-c", AGAIN, str(int(number)), *pending], process_group=0)
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert os.WSTOPSIG(status) == number
        os.kill(process.pid, signal.SIGCONT)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert not os.WIFSTOPPED(status)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("sent", "asked", "has_got"),
    [
        ([("g", signal.SIGTSTP)], signal.SIGTSTP, True),
        ([("g", signal.SIGCONT)], signal.SIGCONT, True),
        *(([("g", signal.SIGCONT), ("g", stop)], signal.SIGCONT, True) for stop in STOPS),
        *(([("g", stop), ("g", signal.SIGCONT)], stop, True) for stop in STOPS),
        ([("p", signal.SIGCONT)], signal.SIGCONT, False),
        ([("p", signal.SIGTSTP)], signal.SIGTSTP, False),
        ([("g", signal.SIGTERM), ("p", signal.SIGTSTP)], signal.SIGTSTP, False),
        ([("g", signal.SIGTTIN), ("p", signal.SIGTSTP)], signal.SIGTSTP, False),
    ],
)
def test_a_signal_that_another_has_undone_has_reached_the_group(
    sent: list[tuple[str, int]], asked: int, has_got: bool
) -> None:
    """The one that undoes it has; and what is sent to the guard alone ("p") has not."""
    words = " ".join(f"{whom}{int(number)}" for whom, number in sent)
    done = subprocess.run(
        [sys.executable, "-c", ASKED, words, str(int(asked))],
        process_group=0,
        stdout=subprocess.PIPE,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    assert done.stdout == f"{has_got}\n"
