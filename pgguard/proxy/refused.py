"""Clients that a server refuses for how the guard has connected to it: what to set is said in the guard's log.

They are told what the server says, as it says it; what they would set themselves changes nothing about it. PostgreSQL
says so before it asks for a password, ``ClientAuthentication()`` in ``auth.c``: ``pg_hba.conf`` has no line for
connections with TLS or without, or one that rejects them, or one that demands a certificate.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Final

from pgguard.faults.text import printable, shorten
from pgguard.proxy.addresses import TcpAddress
from pgguard.proxy.errors import Problem, UnfitServerError
from pgguard.proxy.remedies import hints
from pgguard.wire.fields import parse_fields
from pgguard.wire.messages import HEADER_SIZE

if TYPE_CHECKING:
    from pgguard.proxy.session import ProxiedSession

_REFUSED: Final = "28000"
"""``invalid_authorization_specification``: "PostgreSQL Error Codes", appendix A."""
_LOOK: Final = 2048
"""Bytes of the answer that are looked at."""
_SHOWN: Final = 200
"""Characters of the server's words that are shown, at most."""
_MEANINGS: Final = (
    (re.compile("connection requires a valid client certificate"), Problem.CERTIFICATE_DEMANDED),
    (re.compile("certificate authentication failed for user .*"), Problem.CERTIFICATE_REFUSED),
    (re.compile("(?:no )?pg_hba.conf (?:entry|rejects) .*, (?:no|SSL) encryption"), Problem.REFUSED),
)
"""By PostgreSQL's words; of those in other languages nothing is said."""

logger = logging.getLogger(__name__)


def tell_refusal(session: ProxiedSession, answer: bytes) -> None:
    """Say what to set, if that is why a server has refused a client: ``answer`` is an ErrorResponse, its first."""
    if not isinstance(session.upstream, TcpAddress):
        return
    fields = parse_fields(answer[HEADER_SIZE:_LOOK])
    text = fields.get("M", "")
    problem = next((problem for words, problem in _MEANINGS if words.fullmatch(text)), None)
    if fields.get("C") != _REFUSED or problem is None:
        return
    said = shorten(printable(text), _SHOWN)
    [remedy] = hints(UnfitServerError(problem, text), through=session.through, unix=False, ipv4=False)
    logger.warning("%s: the server at %s refused the client: %s. %s", session, session.upstream, said, remedy)
