"""What TLS tells of a client's stream when it ends that the messages in it don't.

A TLS session is one state in two copies when a process forks that has one: keys, and a counter for each direction. Each
record is encrypted with the next number. So what one process sends is in order for as long as it is the only one that
sends; as soon as the other one does, it repeats a number, and the record fails its integrity check here. Likewise when
one of them has read what the other one takes for the next record: that client's own TLS says so in an alert.

What a failed record said can't be known. Who sent it can, as its bytes are counted as any others.

A child that closes what it has inherited says Terminate, and that TLS is over (``close_notify``), with the numbers that
are its parent's: both are in order, and are judged by who sent them. If others close it as well, as when all of them
are told to exit, that can't be read, and does no harm.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from pgguard.session import libpq
from pgguard.session.verdicts import CLOSE_NOTIFY, TLS_ALERT, TLS_RECORD, Direction, Kind, MessageSeen, Verdict

if TYPE_CHECKING:
    from pgguard.identity import Sender
    from pgguard.proxy.session import ProxiedSession
    from pgguard.proxy.transport import Failure, Tls
    from pgguard.session.tracker import Tracker

_CORRUPT: Final = ("bad record mac", "decryption failed")
"""How the alerts end with which a client says that what it was sent is corrupt: RFC 5246, 7.2.2."""
_CLOSE_NOTIFY_SIZE: Final = 2
"""Bytes of an alert: its level and what it says."""
_TERMINATE_SIZE: Final = 5
"""Bytes of a Terminate."""


def last_words(session: ProxiedSession, tls: Tls) -> list[Verdict]:
    """What is wrong with the end of a client's stream by what TLS tells of it."""
    failure, tracker = tls.failure, session.tracker
    if failure is not None:
        if failure.is_told and not failure.reason.endswith(_CORRUPT):
            return []
        if tracker is not None and tracker.terminated:
            return _after_end(tracker, tls, failure)
        return [_corruption(session, tls, failure)]
    if tls.is_closed and tracker is not None and not tracker.terminated:
        message = MessageSeen(Direction.FRONTEND, None, CLOSE_NOTIFY, _CLOSE_NOTIFY_SIZE)
        verdict = tracker.judge_goodbye(message, tls.closed_by)
        return [] if verdict is None else [replace(verdict, ends=True)]
    return []


def _after_end(tracker: Tracker, tls: Tls, failure: Failure) -> list[Verdict]:
    """What is wrong with a record behind a Terminate, whose numbers that one may have used: who has sent it, if any."""
    if failure.is_told or _is_parting(tls, failure):
        return []
    message = MessageSeen(Direction.FRONTEND, None, TLS_RECORD, failure.size)
    verdict = tracker.judge_late(message, failure.sender)
    return [] if verdict is None else [verdict]


def _is_parting(tls: Tls, failure: Failure) -> bool:
    """Whether a record that can't be read may be a Terminate: of drivers' messages only that is so short."""
    return not failure.is_told and failure.size <= tls.longest_record(_TERMINATE_SIZE)


def mixture(session: ProxiedSession, begun_by: Sender, sender: Sender) -> Verdict:
    """Two processes have sent parts of one record."""
    reason = "in the middle of another process's TLS record"
    tracker = session.protocol
    if tracker is None:
        return Verdict(Kind.SHARED_BY_PROCESSES, reason, None, (), sender, (begun_by,))
    requesters = tracker.senders.others(sender, first=begun_by)
    return tracker.judge(Kind.SHARED_BY_PROCESSES, reason, intruder=sender, requesters=requesters)


def _corruption(session: ProxiedSession, tls: Tls, failure: Failure) -> Verdict:
    """Two, as it seems, use one TLS session: whoever has sent its last record, and who has used it before."""
    name = TLS_ALERT if failure.is_told else TLS_RECORD
    message = MessageSeen(Direction.FRONTEND, None, name, failure.size)
    if failure.is_told:
        reason = f"what the client was sent failed its integrity check, as it says ({failure.reason})"
    elif failure.begun_by is not None:
        reason = f"a TLS record that two had sent parts of failed its integrity check ({failure.reason})"
    elif failure.reason.endswith(_CORRUPT):
        reason = f"a TLS record failed its integrity check ({failure.reason})"
    else:
        reason = f"what the client sent is no TLS record ({failure.reason})"
    intruder, requesters = _users(session, failure)
    is_record = failure.is_told or failure.reason.endswith(_CORRUPT)
    # Two that send whole records of one session send nothing else; whoever sends something else may be alone.
    has_company = intruder is not None and any(one.pid != intruder.pid for one in requesters)
    kind = Kind.TLS_CORRUPTION if is_record or has_company else Kind.PROTOCOL_VIOLATION
    tracker = session.protocol
    if tracker is None:
        verdict = Verdict(kind, reason, message, (), intruder, requesters)
    else:
        verdict = tracker.judge(kind, reason, message, intruder=intruder, requesters=requesters)
    is_before_13 = "GCM" in tls.cipher and not tls.cipher.startswith("TLS_")
    text = libpq.BAD_RECORD_BEFORE_13 if is_before_13 else libpq.BAD_RECORD
    is_parting = is_record and _is_parting(tls, failure)
    return replace(verdict, libpq=text if is_record else None, ends=True, parting=is_parting)


def _users(session: ProxiedSession, failure: Failure) -> tuple[Sender | None, tuple[Sender, ...]]:
    """Who has used a TLS session that somebody else uses too, and who that is, the one who did so last first."""
    tracker, sender = session.protocol, failure.sender
    others: tuple[Sender, ...]
    if tracker is None:
        others = () if failure.begun_by is None else (failure.begun_by,)
    else:
        last = None if tracker.last_request is None else tracker.last_request.sender
        others = tracker.senders.others(sender, first=failure.begun_by or last)
    if failure.is_told and sender is not None:
        # Whoever finds what it was sent corrupt isn't the one who has read the rest of it.
        return (others[0], (sender, *others[1:])) if others else (None, (sender,))
    return sender, others
