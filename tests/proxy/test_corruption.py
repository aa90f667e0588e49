"""What TLS tells of the end of a client's stream: who is named, and what is none of anybody's doing."""

from __future__ import annotations

import ssl

import pytest

from pgguard.identity import Sender
from pgguard.proxy.corruption import last_words, mixture
from pgguard.proxy.session import ProxiedSession
from pgguard.proxy.transport import Failure, Tls
from pgguard.session.tracker import Tracker
from pgguard.session.verdicts import Kind, Verdict
from tests.proxy.messages import ANSWER, LOGGED_IN, TERMINATE, query
from tests.proxy.test_relay_alone import FakeSocket
from tests.proxy.tls_peers import Peer, server_context

PARENT, CHILD = Sender(1, 1), Sender(2, 2)
OTHER_THREAD = Sender(1, 5)


def session_of(*senders: Sender | None, tracked: bool = True) -> ProxiedSession:
    """A session on which these have asked something, one after the other; the first one has opened it."""
    session = ProxiedSession(1, transport="tcp", client_name="here:1", client_socket=None, opened_at=0.0)
    tracker = Tracker({"user": "u"}, senders[0]) if tracked else None
    session.connect(FakeSocket(1), FakeSocket(2), tracker, sender=senders[0], client_tls=Peer(server_side=False).tls)
    if tracker is not None:
        follow(tracker.backend(LOGGED_IN, 0, len(LOGGED_IN)))
        for sender in senders:
            data = query("select 1")
            at = tracker.frontend(data, 0, len(data), sender, 0.0)
            if tracker.verdict is not None:
                tracker.overrule()
                tracker.frontend(data, at, len(data), sender, 0.0)
            follow(tracker.backend(ANSWER, 0, len(ANSWER)))
    return session


def follow(_: int) -> None:
    """What has been followed needn't be looked at."""


def words_of(session: ProxiedSession, failure: Failure) -> list[Verdict]:
    tls = session.client.tls
    assert tls is not None
    tls.failure = failure
    return last_words(session, tls)


def broken(sender: Sender | None, begun_by: Sender | None = None, *, told: str = "") -> Failure:
    reason = f"sslv3 alert {told}" if told else "decryption failed or bad record mac"
    return Failure(reason, bool(told), 40, sender, begun_by)


@pytest.mark.parametrize(
    ("before", "failure", "intruder", "requesters"),
    [
        pytest.param([PARENT], broken(CHILD), CHILD, (PARENT,), id="the other's record"),
        pytest.param([PARENT, CHILD], broken(PARENT), PARENT, (CHILD,), id="the opener's own, after the other's"),
        pytest.param([PARENT], broken(CHILD, PARENT), CHILD, (PARENT,), id="one of both"),
        pytest.param([PARENT], broken(PARENT), PARENT, (), id="of one alone"),
        pytest.param([PARENT], broken(OTHER_THREAD), OTHER_THREAD, (PARENT,), id="of another thread"),
        pytest.param([None], broken(None), None, (), id="nobody is named"),
        pytest.param([PARENT], broken(CHILD, told="bad record mac"), PARENT, (CHILD,), id="who has found it is not it"),
        pytest.param([PARENT], broken(PARENT, told="bad record mac"), None, (PARENT,), id="who else is not known"),
    ],
)
def test_who_has_used_one_tls_session(
    before: list[Sender | None], failure: Failure, intruder: Sender | None, requesters: tuple[Sender, ...]
) -> None:
    [verdict] = words_of(session_of(*before), failure)
    assert verdict.kind is Kind.TLS_CORRUPTION
    assert (verdict.intruder, verdict.requesters) == (intruder, requesters)
    assert verdict.ends
    assert verdict.message is not None
    assert verdict.message.size == 40


@pytest.mark.parametrize("told", ["", "bad record mac"])
def test_what_libpq_prints_depends_on_the_version_of_tls(told: str) -> None:
    """And not on who has found it: whoever is told by an alert can't read that either."""
    [verdict] = words_of(session_of(PARENT), broken(CHILD, told=told))
    assert verdict.libpq == "SSL error: decryption failed or bad record mac"
    session = session_of(PARENT)
    session.client.tls = Peer(server_side=False, guards=server_context(ssl.TLSVersion.TLSv1_2)).tls
    [verdict] = words_of(session, broken(CHILD, told=told))
    assert verdict.libpq == "SSL error: cipher operation failed"


@pytest.mark.parametrize("told", ["unknown ca", "certificate expired", "internal error"])
def test_other_alerts_say_nothing_of_who_uses_it(told: str) -> None:
    assert words_of(session_of(PARENT), broken(CHILD, told=told)) == []


def test_what_is_no_record_takes_nobody_else() -> None:
    unreadable = Failure("wrong version number", False, 40, PARENT, None)
    [verdict] = words_of(session_of(PARENT), unreadable)
    assert (verdict.kind, verdict.intruder, verdict.libpq) == (Kind.PROTOCOL_VIOLATION, PARENT, None)
    [verdict] = words_of(session_of(PARENT), unreadable._replace(sender=None))
    assert verdict.kind is Kind.PROTOCOL_VIOLATION
    [verdict] = words_of(session_of(PARENT), unreadable._replace(sender=CHILD))
    assert (verdict.kind, verdict.requesters) == (Kind.TLS_CORRUPTION, (PARENT,))


@pytest.mark.parametrize(
    ("told", "size", "parting"),
    [
        pytest.param("", 5 + len(TERMINATE) + 17, True, id="no longer than a Terminate"),
        pytest.param("", 5 + len(TERMINATE) + 18, False, id="longer"),
        pytest.param("bad record mac", 24, False, id="an alert"),
    ],
)
def test_a_short_record_may_be_a_goodbye(told: str, size: int, parting: bool) -> None:
    """By what TLS 1.3 adds to a message."""
    [verdict] = words_of(session_of(PARENT), broken(CHILD, told=told)._replace(size=size))
    assert verdict.parting is parting


def test_of_a_session_that_is_not_followed_it_is_said_as_well() -> None:
    [verdict] = words_of(session_of(PARENT, tracked=False), broken(CHILD, PARENT))
    assert (verdict.intruder, verdict.requesters) == (CHILD, (PARENT,))
    assert mixture(session_of(PARENT, tracked=False), PARENT, CHILD).requesters == (PARENT,)


@pytest.mark.parametrize(
    ("by", "terminated", "foreign"),
    [
        pytest.param(CHILD, False, True, id="another one ends TLS"),
        pytest.param(PARENT, False, False, id="who has opened it does"),
        pytest.param(None, False, False, id="nobody knows who"),
        pytest.param(CHILD, True, False, id="it is over, and that was judged"),
    ],
)
def test_who_ends_tls_ends_the_session(by: Sender | None, terminated: bool, foreign: bool) -> None:
    session = session_of(PARENT)
    tls, tracker = session.client.tls, session.tracker
    assert isinstance(tls, Tls)
    assert tracker is not None
    if terminated:
        tracker.frontend(TERMINATE, 0, len(TERMINATE), PARENT, 0.0)
    tls.is_closed, tls.closed_by = True, by
    verdicts = last_words(session, tls)
    assert [verdict.kind for verdict in verdicts] == [Kind.FOREIGN_TERMINATE] * foreign
    assert all(verdict.intruder == by and verdict.ends for verdict in verdicts)


def test_what_comes_late_and_can_not_be_read_is_judged_by_who_has_sent_it() -> None:
    session = session_of(PARENT)
    tracker = session.tracker
    assert tracker is not None
    tracker.frontend(TERMINATE, 0, len(TERMINATE), PARENT, 0.0)
    request = broken(CHILD)._replace(size=400)
    assert words_of(session, request._replace(sender=PARENT)) == []
    assert words_of(session, request._replace(sender=None)) == []
    [verdict] = words_of(session, request)
    assert (verdict.kind, verdict.intruder, verdict.requesters) == (Kind.SHARED_BY_PROCESSES, CHILD, (PARENT,))
    assert verdict.ends
    assert words_of(session, request) == [], "once is enough"


@pytest.mark.parametrize("failure", [broken(PARENT)._replace(size=27), broken(PARENT, told="bad record mac")])
def test_who_closes_what_another_one_has_ended_does_no_harm(failure: Failure) -> None:
    """As when a heir, which uses it alone, and who has opened it are told to exit: both say Terminate."""
    session = session_of(PARENT, CHILD)
    tracker = session.tracker
    assert tracker is not None
    tracker.frontend(TERMINATE, 0, len(TERMINATE), CHILD, 0.0)
    if tracker.verdict is not None:
        tracker.overrule()
        tracker.frontend(TERMINATE, 0, len(TERMINATE), CHILD, 0.0)
    assert words_of(session, failure) == []
