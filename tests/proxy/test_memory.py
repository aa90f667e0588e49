"""What an idle session holds: there may be thousands."""

from __future__ import annotations

import gc
import socket
import tracemalloc

from pgguard.attribution.ebpf.account import Account
from pgguard.identity import Sender
from pgguard.proxy.kernel_senders import TcpAccount
from pgguard.proxy.session import ProxiedSession
from pgguard.proxy.sockets import Stream
from pgguard.session.tracker import Tracker
from tests.proxy.messages import ANSWER, LOGGED_IN, query

_SESSIONS = 100
_MOST = 3350
"""Bytes a session: what is needed, and less than half a deque more; an empty one takes 760, an empty set 216."""


def _session(number: int) -> ProxiedSession:
    """One that has asked something and got its answer."""
    session = ProxiedSession(number, transport="tcp", client_name="here:1", client_socket=None, opened_at=0.0)
    session.kernel_account = TcpAccount(b"", Account(1))
    tracker = Tracker({"user": "app"}, Sender(1, 1))
    asked = query("select 1")
    tracker.backend(LOGGED_IN, 0, len(LOGGED_IN))
    tracker.frontend(asked, 0, len(asked), Sender(1, 1), 0.0)
    tracker.backend(ANSWER, 0, len(ANSWER))
    client, server = map(Stream, socket.socketpair())
    session.connect(client, server, tracker)
    return session


def test_an_idle_session_is_small() -> None:
    sessions = [_session(0)]  # with what all of them share
    try:
        gc.collect()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        sessions += [_session(number) for number in range(_SESSIONS)]
        gc.collect()
        size = (tracemalloc.get_traced_memory()[0] - before) / _SESSIONS
    finally:
        tracemalloc.stop()
        for session in sessions:
            session.client.sock.close()
            session.server.sock.close()
    assert size < _MOST
