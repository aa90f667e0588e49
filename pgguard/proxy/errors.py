"""What goes wrong before the guard stands."""

from __future__ import annotations

from enum import Enum


class ConfigurationError(ValueError):
    """The guard can't start as it is told to; the message is one line that says what to change."""


class LeadsBackError(ConnectionError):
    """Connections to where the server is said to be come back to the guard; the message is a clause that says how."""


class NotPostgresError(ConfigurationError):
    """What is said to be a PostgreSQL's URL is another database's."""


class Problem(Enum):
    """Why a server that can be connected to isn't used: what to do about each stands in proxy/remedies.py."""

    NO_TLS = "it has no TLS"
    NO_ANSWER = "it doesn't say whether it has TLS"
    HUNG_UP = "it closes the connection in the middle of the handshake"
    VERSION = "it has no version of TLS that is allowed here"
    HANDSHAKE = "the handshake fails otherwise"
    NO_ALPN = "it doesn't agree that PostgreSQL's protocol follows"
    UNKNOWN_CA = "nobody who is trusted has signed its certificate"
    EXPIRED = "its certificate isn't valid any more"
    NOT_YET_VALID = "its certificate isn't valid yet"
    REVOKED = "its certificate is revoked"
    NO_REVOCATIONS = "there is no valid list of what is revoked"
    BAD_CERTIFICATE = "its certificate is of no use otherwise"
    WRONG_NAME = "its certificate is another host's"
    CERTIFICATE_DEMANDED = "it demands a certificate"
    CERTIFICATE_REFUSED = "it doesn't accept the certificate that it is shown"
    CERTIFICATE_NOT_ASKED = "it doesn't ask for a certificate"
    REFUSED = "it refuses the client, with TLS or without"
    WRONG_USER = "its socket is another user's"


class SilentServerError(TimeoutError):
    """A server has accepted a connection, and says nothing."""


class UnfitServerError(ConnectionError):
    """A server can be connected to, and isn't used; the message is a clause that says why.

    Args:
        problem: Of what kind that is.
        told: The message.
    """

    def __init__(self, problem: Problem, told: str) -> None:
        super().__init__(told)
        self.problem = problem
