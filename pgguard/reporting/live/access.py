"""Who may see the live page: the token, and which hosts a browser may believe that it asks.

*The token* is compared in constant time. Programs send it as ``Authorization: Bearer``. People type it once, into a
form: it is sent in a request's body, and what the browser keeps is a cookie that says nothing of it, which scripts
can't read and which is sent from this page alone. So it stands in no address, and in no history.

*DNS rebinding.* Another page's script may ask an address of this host, if its own name comes to lead there: RFC 9110,
17.1. Where there is no token, only names are answered to that can't be made to lead elsewhere: those of the loopback,
and addresses as they are. Where there is one, the cookie is of one name alone, and the other page doesn't have it.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from typing import TYPE_CHECKING, Final

from pgguard.attribution.trust import TRUST_REMEDY, UntrustedError, open_trusted
from pgguard.proxy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from pgguard.proxy.addresses import TcpAddress

COOKIE: Final = "pgguard"
_LEAST: Final = 16
_LONGEST: Final = 4096
"""Characters of a token."""
_BEARER: Final = "bearer "
_LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")


class Access:
    """Knows the token, if there is one.

    Args:
        token: It; ``None``: everybody may see everything who can connect.
    """

    def __init__(self, token: str | None) -> None:
        self._token = None if token is None else token.encode()
        self._key = secrets.token_bytes(32)
        """Cookies of another run of the guard mean nothing."""

    @property
    def is_open(self) -> bool:
        """Whether no token is needed."""
        return self._token is None

    def knows(self, given: str) -> bool:
        """Whether somebody has given the token."""
        return self._token is not None and hmac.compare_digest(given.encode("utf-8", "replace"), self._token)

    @property
    def cookie(self) -> str:
        """What a browser keeps that has given it."""
        return hmac.new(self._key, self._token, hashlib.sha256).hexdigest() if self._token is not None else ""

    def admits(self, authorization: str | None, cookies: Mapping[str, str]) -> bool:
        """Whether whoever asks may see what it asks for, by these headers of its request."""
        if self.is_open:
            return True
        if authorization is not None and authorization[: len(_BEARER)].lower() == _BEARER:
            return self.knows(authorization[len(_BEARER) :].strip())
        return hmac.compare_digest(cookies.get(COOKIE, "").encode("utf-8", "replace"), self.cookie.encode())

    def hosts(self, addresses: Sequence[TcpAddress]) -> list[str]:
        """What the ``Host`` of a request may be, without its port.

        Args:
            addresses: Where the page is.
        """
        if not self.is_open:
            return ["*"]
        return [*_LOOPBACK, *(f"[{one.host}]" if ":" in one.host else one.host for one in addresses)]


def read_token(path: Path) -> str:
    """Read the token that a file holds: its first line.

    Raises:
        ConfigurationError: It can't be read, somebody else may have written it, or it holds no token.
    """
    try:
        with open_trusted(path) as file:
            line = file.readline(_LONGEST + 1)
    except UntrustedError as error:
        raise ConfigurationError(f"--admin-token-file: {path} is not read, as {error}: {TRUST_REMEDY}") from error
    except OSError as error:
        raise ConfigurationError(f"--admin-token-file: {path} can't be read: {error.strerror}") from error
    try:
        token = line.decode("ascii").strip()
    except UnicodeDecodeError:
        token = ""
    if not token.isprintable() or " " in token or not _LEAST <= len(token) <= _LONGEST:
        raise ConfigurationError(
            f"--admin-token-file: the first line of {path} should be {_LEAST} letters, digits or signs at least, as "
            "openssl rand -hex 32 prints them"
        )
    return token


def access_to(addresses: Sequence[TcpAddress], token: str | None) -> Access:
    """Who may see a page that is at these addresses.

    Raises:
        ConfigurationError: Other hosts can reach them, and there is no token.
    """
    for address in addresses:
        if token is None and not ipaddress.ip_address(address.host.partition("%")[0]).is_loopback:
            raise ConfigurationError(
                f"--admin {address}: other hosts can reach this address: name a file with a token in "
                "--admin-token-file, or use 127.0.0.1"
            )
    return Access(token)
