from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pgguard.attribution.evidence import Driver, Evidence
from pgguard.attribution.sockets import TcpClient, UnixClient, client_socket
from pgguard.attribution.witness import Opening, Witness
from tests.attribution.puppets import THREADS, Puppet, outlive_a_tick

Puppets = Callable[[], Puppet]


@pytest.fixture
def tcp() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


@pytest.fixture
def unix(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        yield listener


def _opener(opening: Opening) -> tuple[int | None, Evidence]:
    return (None if opening.opener is None else opening.opener.pid), opening.evidence


def test_over_tcp_the_only_holder_is_the_opener(tcp: socket.socket, puppet: Puppets) -> None:
    witness, client = Witness(), puppet()
    outlive_a_tick()
    with client.connect(tcp) as accepted:
        assert _opener(witness.opened(client_socket(accepted))) == (client.pid, Evidence.SOLE_HOLDER)


def test_over_a_unix_socket_the_kernel_names_the_opener_whoever_holds_it(unix: socket.socket, puppet: Puppets) -> None:
    witness, client = Witness(), puppet()
    with client.connect(unix) as accepted:
        child = client.do("fork()")
        opening = witness.opened(client_socket(accepted))
        assert _opener(opening) == (client.pid, Evidence.KERNEL_SENDER)
        assert {process.pid for process in opening.holders.processes} == {client.pid, child}


def test_of_several_holders_the_one_that_is_older_than_the_connection_is_the_opener(
    tcp: socket.socket, puppet: Puppets
) -> None:
    witness, client = Witness(), puppet()
    outlive_a_tick()
    with client.connect(tcp) as accepted:
        described = client_socket(accepted)
        outlive_a_tick()
        client.do("fork()")
        assert _opener(witness.opened(described)) == (client.pid, Evidence.SOCKET_HOLDER)


def test_a_child_forked_before_the_connection_was_accepted_is_not_taken_for_the_opener(
    tcp: socket.socket, puppet: Puppets
) -> None:
    """The child is older than the accepted socket, but not older than the connection."""
    witness, client = Witness(), puppet()
    outlive_a_tick()
    client.do(f"c = socket.create_connection({tcp.getsockname()!r})")
    outlive_a_tick()
    child = client.do("fork()")
    outlive_a_tick()
    with tcp.accept()[0] as accepted:
        opening = witness.opened(client_socket(accepted))
        assert _opener(opening) == (client.pid, Evidence.SOCKET_HOLDER)
        assert {process.pid for process in opening.holders.processes} == {client.pid, child}


def test_of_several_heirs_none_is_called_the_opener(tcp: socket.socket, puppet: Puppets) -> None:
    witness, client = Witness(), puppet()
    with client.connect(tcp) as accepted:
        described = client_socket(accepted)
        outlive_a_tick()
        heirs = {client.do("fork()"), client.do("fork()")}
        client.do("c.close()")
        opening = witness.opened(described)
        assert {process.pid for process in opening.holders.processes} == heirs
        assert _opener(opening) == (None, Evidence.UNKNOWN)


def test_of_two_processes_older_than_the_connection_none_is_called_the_opener(
    tcp: socket.socket, unix: socket.socket, puppet: Puppets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them was handed the connection by the other, which only a walk through all processes shows."""
    monkeypatch.setattr("pgguard.attribution.holders._NEW", 0.0)
    client, other = puppet(), puppet()
    witness = Witness()
    outlive_a_tick()
    with client.connect(tcp) as accepted, client.connect(unix, "ours") as one, other.connect(unix, "ours") as two:
        client.do("socket.send_fds(ours, [b'x'], [c.fileno()])")
        _, fds, _, _ = socket.recv_fds(one, 1, 1)
        socket.send_fds(two, [b"x"], fds)
        os.close(fds[0])
        other.do("received = socket.recv_fds(ours, 1, 1)")
        opening = witness.opened(client_socket(accepted))
        assert {process.pid for process in opening.holders.processes} == {client.pid, other.pid}
        assert _opener(opening) == (None, Evidence.UNKNOWN)


def test_a_process_younger_than_the_connection_did_not_connect_it(unix: socket.socket, puppet: Puppets) -> None:
    """Who did is gone, and its pid was given to another process."""
    witness = Witness()
    with socket.socket(socket.AF_UNIX) as own:
        own.connect(unix.getsockname())
        with unix.accept()[0] as accepted:
            described = client_socket(accepted)
            assert isinstance(described, UnixClient)
            outlive_a_tick()
            reused = described._replace(connected_by=puppet().pid)
            assert _opener(witness.opened(reused)) == (None, Evidence.UNKNOWN)


def test_an_heir_is_not_the_opener_where_the_kernel_has_named_one_that_is_gone(
    unix: socket.socket, puppet: Puppets
) -> None:
    witness, client = Witness(), puppet()
    outlive_a_tick()
    with client.connect(unix) as accepted:
        described = client_socket(accepted)
        assert isinstance(described, UnixClient)
        gone = described._replace(connected_by=2**22)  # beyond what any kernel gives: proc_sys_kernel(5), pid_max
        opening = witness.opened(gone)
        assert _opener(opening) == (None, Evidence.UNKNOWN)
        assert opening.connected == (2**22, None)
        assert opening.driver is witness.opened(described).driver


@pytest.mark.parametrize("listener", ["tcp", "unix"])
def test_of_some_processes_those_that_have_the_socket_open(
    listener: str, request: pytest.FixtureRequest, puppet: Puppets
) -> None:
    witness, client, other = Witness(), puppet(), puppet()
    with client.connect(request.getfixturevalue(listener)) as accepted:
        child, grandchild = client.do("fork()"), client.do("fork()")
        described = client_socket(accepted)
        asked = [other.pid, client.pid, child, 2**22, client.pid]
        assert [process.pid for process in witness.holding(described, asked)] == [client.pid, child]
        assert witness.holding(described, [grandchild])[0].ppid == client.pid
        client.do("c.close()")
        assert [process.pid for process in witness.holding(described, asked)] == [child]
        assert witness.holding(described, [other.pid]) == ()


def test_a_connection_from_elsewhere_is_nobodys(tcp: socket.socket, puppet: Puppets) -> None:
    elsewhere = TcpClient(bytes([192, 0, 2, 1]), 50000, bytes([192, 0, 2, 2]), 5432, 0, 0.0)
    witness, client = Witness(), puppet()
    with client.connect(tcp) as accepted:
        nowhere, here = witness.opened_many([elsewhere, client_socket(accepted)])
    assert (nowhere.inode, nowhere.opener, nowhere.evidence) == (None, None, Evidence.UNKNOWN)
    assert here.inode is not None
    assert witness.findings(nowhere).holders is None
    assert witness.holders(nowhere).holdings == ()


def test_findings_name_everybody_even_who_is_gone(tcp: socket.socket, puppet: Puppets) -> None:
    witness, client = Witness(), puppet()
    outlive_a_tick()
    with client.connect(tcp) as accepted:
        opening = witness.opened(client_socket(accepted))
        assert opening.inode is not None
        child = client.do("fork()")
        sender = witness.sender(child)
        assert sender is not None
        findings = witness.findings(opening, [sender])
        assert findings.holders is not None
        assert [process.pid for process in findings.holders] == [client.pid, child]
        assert findings.driver is Driver.PYTHON
        assert {process.pid for process in witness.holders(opening).processes} == {client.pid, child}
        assert set(witness.watch([opening.inode])) == {opening.inode}

        client.do("open('/proc/self/comm', 'w').write('renamed')")
        client.do(f"release({child})")
        findings = witness.findings(opening, [sender])
        assert findings.senders == {child: sender}
        assert findings.opener is not None
        assert findings.opener.name == "renamed"
        assert findings.opener_evidence is Evidence.SOLE_HOLDER
        assert findings.holders == (findings.opener,)

        client.end()
        findings = witness.findings(opening)
        assert findings.driver is Driver.PYTHON, "the driver is told as of the connection's opening"
        assert findings.opener is not None
        assert (findings.opener.pid, findings.opener.name) == (client.pid, "renamed")
        assert findings.holders is None


# What processes do with a connection


@pytest.fixture
def opening(tcp: socket.socket, puppet: Puppets) -> Iterator[tuple[Witness, Puppet, Opening]]:
    """A witness, a process that has connected as ``c``, and what the witness says of that."""
    witness, client = Witness(), puppet()
    outlive_a_tick()
    with client.connect(tcp) as accepted:
        client.do(THREADS)
        yield witness, client, witness.opened(client_socket(accepted))


Opened = tuple[Witness, Puppet, Opening]


def test_an_opener_that_sleeps_with_its_socket_open_stays(opening: Opened) -> None:
    witness, _, opened = opening
    assert witness.stays(opened, seconds=5)


def test_an_opener_that_has_closed_its_socket_does_not_stay(opening: Opened) -> None:
    witness, client, opened = opening
    client.do("c.close()")
    assert not witness.stays(opened, seconds=5)


def test_an_opener_that_runs_may_be_about_to_close_it(opening: Opened) -> None:
    witness, client, opened = opening
    client.do("start(spin)")
    assert not witness.stays(opened, seconds=0.05)


def test_an_opener_in_an_event_loop_may_wait_for_the_server_to_close(opening: Opened) -> None:
    witness, client, opened = opening
    client.do("start(lambda: epoll(c, other))")
    assert opened.opener is not None
    witness.waits(opened, [opened.opener], enough=lambda waits: bool(waits.threads), seconds=5)
    assert not witness.stays(opened, seconds=1)


def test_an_opener_that_has_ended_does_not_stay(opening: Opened) -> None:
    witness, client, opened = opening
    client.end()
    assert not witness.stays(opened, seconds=1)


def test_heirs_are_children_forked_since_that_run_the_same_program(tcp: socket.socket, puppet: Puppets) -> None:
    """Even those that have closed their copy of the socket; not the elder, not another program."""
    witness, client = Witness(), puppet()
    client.do("fork()")
    outlive_a_tick()
    with client.connect(tcp) as accepted:
        outlive_a_tick()
        opened = witness.opened(client_socket(accepted))
        assert witness.heirs_of(opened) == ()
        younger = {client.do("fork()"), client.do("fork(lambda: c.close())")}
        client.do("other = subprocess.Popen(['sleep', '60'])")
        assert {heir.pid for heir in witness.heirs_of(opened)} == younger
        client.do("other.kill(); other.wait()")


def test_of_one_process_with_one_thread_there_is_nothing_to_see(opening: Opened) -> None:
    witness, client, opened = opening
    assert opened.opener is not None
    waits, blocked = witness.look(opened, [opened.opener])
    assert (waits.threads, blocked) == ((), ())
    client.do("start(lambda: poll(c)); start(lambda: c.recv(1))")
    witness.waits(opened, [opened.opener], enough=lambda waits: len(waits.threads) == 2, seconds=5)
    waits, blocked = witness.look(opened, [opened.opener])
    assert len(waits.threads) == len(blocked) == 2


def test_waits_are_awaited_until_they_are_enough_or_time_is_up(opening: Opened) -> None:
    witness, client, opened = opening
    assert opened.opener is not None
    assert witness.waits(opened, [opened.opener], enough=lambda _: False, seconds=0.01).threads == ()
    tid = client.do("start(lambda: (time.sleep(0.05), poll(c)))")
    waits = witness.waits(opened, [opened.opener], enough=lambda waits: bool(waits.threads), seconds=5)
    assert [one.thread.tid for one in waits.threads] == [tid]


def test_only_threads_are_those_of_processes_that_have_no_other(opening: Opened) -> None:
    witness, client, opened = opening
    assert opened.opener is not None
    child = witness.sender(client.do("fork()"))
    client.do("start(lambda: poll(c))")
    assert child is not None
    deadline = time.monotonic() + 30
    while not (found := witness.only_threads([opened.opener, child])):
        assert time.monotonic() < deadline
    assert set(found) == {child.pid}


def test_a_zombie_is_gone_and_so_is_one_whose_pid_is_anothers(opening: Opened) -> None:
    witness, client, opened = opening
    assert opened.opener is not None
    assert not witness.is_gone(opened.opener)
    assert witness.is_gone(replace(opened.opener, started=opened.opener.started - 1))
    pid = client.do("fork()")
    child = witness.sender(pid)
    assert child is not None
    client.do(f"os.close(holds.pop({pid})); os.waitid(os.P_PID, {pid}, os.WEXITED | os.WNOWAIT)")
    assert witness.is_gone(child)
    client.do(f"os.waitpid({pid}, 0)")
    assert witness.is_gone(child)


def test_an_heir_that_is_younger_than_the_connection_did_not_open_it_alone_as_it_is(
    tcp: socket.socket, puppet: Puppets
) -> None:
    witness, client = Witness(), puppet()
    outlive_a_tick()
    with client.connect(tcp) as accepted:
        described = client_socket(accepted)
        outlive_a_tick()
        heir = client.do("fork()")
        client.do("c.close()")
        opening = witness.opened(described)
        assert [process.pid for process in opening.holders.processes] == [heir]
        assert _opener(opening) == (None, Evidence.UNKNOWN)
        assert not witness.has_lost_opener(opening, opening.holders.processes), "nobody knows who it was"


def test_an_opener_is_lost_when_it_has_ended_and_not_when_it_has_only_closed(
    unix: socket.socket, puppet: Puppets
) -> None:
    witness, client = Witness(), puppet()
    outlive_a_tick()
    with client.connect(unix) as accepted:
        described = client_socket(accepted)
        assert isinstance(described, UnixClient)
        heir = witness.sender(client.do("fork()"))
        assert heir is not None
        opening = witness.opened(described)
        assert not witness.has_lost_opener(opening, [heir])
        unseen = replace(opening, opener=None)
        assert not witness.has_lost_opener(unseen, [heir])
        assert witness.has_lost_opener(replace(unseen, client=described._replace(connected_by=2**22)), [heir])
        outlive_a_tick()
        later = puppet().pid
        assert witness.has_lost_opener(replace(unseen, client=described._replace(connected_by=later)), [heir])
        client.end()
        assert witness.has_lost_opener(opening, [heir])
        assert not witness.has_lost_opener(opening, opening.holders.processes), "it was seen a moment ago"
