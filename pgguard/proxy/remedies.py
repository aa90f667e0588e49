"""What to change where a socket can't be opened or connected, by what the system says: one table for all of it.

The numbers and what they mean: connect(2), socket(2), accept(2), ip(7), unix(7), getaddrinfo(3).
"""

from __future__ import annotations

import errno
import os
import socket
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, TypeGuard

from pgguard.proxy.errors import LeadsBackError, Problem, UnfitServerError

if TYPE_CHECKING:
    from collections.abc import Mapping

HOW_TO_RAISE: Final = (
    "Raise the limit of open files for pgguard: ulimit -n before it starts, LimitNOFILE= in a systemd unit, "
    "--ulimit nofile= with docker."
)
_SYSTEM: Final = "The whole system has too many open files: raise fs.file-max with sysctl, or end what holds them."
_MEMORY: Final = "The system has no memory left for another socket."
_EXHAUSTION: Final[Mapping[int, str]] = MappingProxyType(
    {
        errno.EMFILE: HOW_TO_RAISE,
        errno.ENFILE: _SYSTEM,
        errno.ENOBUFS: _MEMORY,
        errno.ENOMEM: _MEMORY,
    }
)
"""When there are no descriptors, or nothing to make one of."""

_UPSTREAM: Final = "--upstream or PGGUARD_UPSTREAM"
"""What says where the server is, if there is only one; it stands in what is to be changed, and nowhere else."""
_WHERE: Final = f"that {_UPSTREAM} names the right place"
_CHECK: Final = f"Check that PostgreSQL is running there, and {_WHERE}."
_NO_ROUTE: Final = f"This host has no route to that address: check the network and the routes, and {_WHERE}."
_NO_ANSWER: Final = (
    "Nothing answers there: maybe the host is down, a firewall drops the packets, or PostgreSQL's backlog is full. "
    f"Check for these, and {_WHERE}."
)
_FORBIDDEN: Final = "This host doesn't allow it: check its firewall and routes, and SELinux or AppArmor."
_NO_PORT: Final = (
    "This host has no local port left for another connection to that address. Widen net.ipv4.ip_local_port_range with "
    "sysctl, or keep connections open, as a pool does: a closed one keeps its port for another minute."
)
_NO_FAMILY: Final = f"This host has no address of that kind (usually IPv6). Check {_WHERE}."
_NO_ADDRESS: Final = (
    f"That address can't be connected to. One with fe80: needs its interface, as in fe80::1%eth0. Check {_WHERE}."
)
_PATH: Final = (
    f"Check the socket's path: {_UPSTREAM} must name a directory in PostgreSQL's unix_socket_directories, and its port."
)

_TCP: Final[Mapping[int, str]] = MappingProxyType(
    {
        errno.ECONNREFUSED: _CHECK,
        errno.EADDRNOTAVAIL: f"{_NO_FAMILY} Or: {_NO_PORT}",
        errno.ENETUNREACH: _NO_ROUTE,
        errno.EHOSTUNREACH: _NO_ROUTE,
        errno.ENETDOWN: _NO_ROUTE,
        errno.EHOSTDOWN: _NO_ROUTE,
        errno.ETIMEDOUT: _NO_ANSWER,
        errno.ECONNRESET: f"Something on the way closes connections to that address. {_CHECK}",
        errno.EACCES: _FORBIDDEN,
        errno.EPERM: _FORBIDDEN,
        errno.EAFNOSUPPORT: _NO_FAMILY,
        errno.EINVAL: _NO_ADDRESS,
    }
)
_UNIX: Final[Mapping[int, str]] = MappingProxyType(
    {
        errno.ENOENT: f"There is no such socket. Check that PostgreSQL is running. {_PATH}",
        errno.ECONNREFUSED: "No server listens on that socket: check that PostgreSQL is running.",
        errno.EACCES: (
            "pgguard's user can't connect to that socket: check the modes of the directories above it, and "
            "PostgreSQL's unix_socket_permissions and unix_socket_group."
        ),
        errno.EPERM: _FORBIDDEN,
        errno.ENOTDIR: _PATH,
        errno.ELOOP: _PATH,
        errno.ENAMETOOLONG: _PATH,
        errno.EPROTOTYPE: f"That socket isn't PostgreSQL's: it is of another type. {_PATH}",
        errno.ETIMEDOUT: "PostgreSQL's backlog is full: check that it isn't stopped or stuck.",
    }
)
_NO_NAME: Final = f"There is no host of that name: check the DNS, and {_WHERE}."
_NAME_UNKNOWN_NOW: Final = "The DNS server doesn't answer: check it, and the network."
_OWN_ADDRESS: Final = f"Name PostgreSQL's own address in {_UPSTREAM}."
_NOT_NOW: Final = "The server itself refuses connections just now: try again in a moment."

_IN_UPSTREAM: Final = f"in {_UPSTREAM}"
_UNFIT: Final[Mapping[Problem, str]] = MappingProxyType(
    {
        Problem.NO_TLS: (
            "Set ssl = on in postgresql.conf, with ssl_cert_file and ssl_key_file, and reload the server. Or, over a "
            f"network that you trust, set sslmode=prefer or sslmode=disable {_IN_UPSTREAM}."
        ),
        Problem.NO_ANSWER: f"What answers there may not be PostgreSQL. {_CHECK}",
        Problem.HUNG_UP: (
            "Look into the server's log at this time. sslnegotiation=direct needs PostgreSQL 17 or a proxy that knows "
            f"it: leave it out {_IN_UPSTREAM} otherwise."
        ),
        Problem.VERSION: (
            f"Set ssl_min_protocol_version and ssl_max_protocol_version {_IN_UPSTREAM} so that they include one of the "
            "server's (the settings of the same names in postgresql.conf); this host's OpenSSL may forbid old ones."
        ),
        Problem.HANDSHAKE: "Look into the server's log at this time: it may say more.",
        Problem.NO_ALPN: f"Leave sslnegotiation=direct out {_IN_UPSTREAM}: it needs PostgreSQL 17 or newer.",
        Problem.UNKNOWN_CA: (
            f"Name the file with the certificate of the CA that has signed it: sslrootcert=PATH {_IN_UPSTREAM}; or "
            "sslrootcert=system, if it is a public CA. The server has to send the certificates in between, too: append "
            "them to its ssl_cert_file."
        ),
        Problem.EXPIRED: (
            "Renew the server's certificate (ssl_cert_file and ssl_key_file) and reload the server; or correct this "
            "host's clock."
        ),
        Problem.NOT_YET_VALID: "Correct this host's clock, or the server's certificate (ssl_cert_file).",
        Problem.REVOKED: (
            f"Have the server's certificate renewed; or name a newer list of revoked certificates: sslcrl=PATH "
            f"{_IN_UPSTREAM}."
        ),
        Problem.NO_REVOCATIONS: (
            "Each CA between the server's certificate and the root needs a current list: put all of them into sslcrl "
            f"or sslcrldir {_IN_UPSTREAM} (libpq's default is ~/.postgresql/root.crl), or name none."
        ),
        Problem.BAD_CERTIFICATE: "Have another certificate made for the server (ssl_cert_file).",
        Problem.WRONG_NAME: (
            f"Connect by a name that is in the certificate: host=NAME {_IN_UPSTREAM}, with hostaddr=ADDRESS beside it "
            "if the name leads elsewhere; or have a certificate made for this name (subjectAltName). sslmode=verify-ca "
            "checks no name."
        ),
        Problem.CERTIFICATE_DEMANDED: (
            f"Name a certificate that the server accepts, and its key: sslcert=PATH and sslkey=PATH {_IN_UPSTREAM}. "
            "The clients' own can't be passed on."
        ),
        Problem.CERTIFICATE_REFUSED: (
            f"Check the certificate in sslcert {_IN_UPSTREAM} (libpq's default is ~/.postgresql/postgresql.crt): the "
            "CA that has signed it must be in the server's ssl_ca_file, and it must be valid now."
        ),
        Problem.CERTIFICATE_NOT_ASKED: (
            "Set ssl_ca_file in postgresql.conf, so that the server asks for certificates; or leave "
            f"sslcertmode=require out {_IN_UPSTREAM}."
        ),
        Problem.REFUSED: (
            "Look into the server's pg_hba.conf: hostssl lines are for connections with TLS, hostnossl lines for those "
            f"without. sslmode {_IN_UPSTREAM} decides which there are."
        ),
        Problem.WRONG_USER: (
            f"Check that PostgreSQL is what listens there, and as which user it runs: requirepeer {_IN_UPSTREAM}."
        ),
    }
)
"""When a server is connected to, but isn't used: mostly for its TLS."""

_ENDED: Final = (
    "It sent no error first. That happens when a server crashes or is shut down at once (pg_ctl stop -m immediate); if "
    "it can, it sends a warning that says which. A failover or a network device in between can have the same effect."
)
"""``quickdie()`` in ``postgres.c``: it sends a warning, 57P01 or 57P02, and ends."""
_LOST_TOUCH: Final = "The server's host or the network in between is down; the server itself may not have noticed."
_LOST: Final = frozenset({errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN})
"""What the system says of a connection when nobody answers on it any more: tcp(7), keepalive."""

_OF_A_FAMILY: Final = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.ENETUNREACH})
"""What is wrong with one of the addresses of a name, mostly the IPv6 one, where something else is with another one."""


def remedy(number: int) -> str:
    """What to change, by what the system says when there are no descriptors left."""
    return _EXHAUSTION[number]


def is_exhaustion(number: int | None) -> TypeGuard[int]:
    """Whether a system call failed as there was no descriptor left, or no memory for one: socket(2), accept(2)."""
    return number in _EXHAUSTION


def is_want(error: BaseException, *, ipv4: bool) -> bool:
    """Whether a connection failed because this host had run out of something; arguments as of :func:`hints`."""
    if isinstance(error.__cause__, BaseExceptionGroup):
        return any(is_want(cause, ipv4=ipv4) for cause in error.__cause__.exceptions)
    number = error.errno if isinstance(error, OSError) else None
    return number in _EXHAUSTION or (ipv4 and number == errno.EADDRNOTAVAIL)


def hints(error: BaseException, *, through: str | None, unix: bool, ipv4: bool) -> list[str]:
    """What may be the matter where a connection could not be made: sentences.

    Args:
        error: what went wrong; trio's, of all that a name resolves to, is taken apart.
        through: the name of the database; ``None``: there is only one.
        unix: it was to be made to a Unix socket.
        ipv4: it was to be made to an address that is certainly IPv4.
    """
    found = _hints(error, unix=unix, ipv4=ipv4)
    return found if through is None else [one.replace(_UPSTREAM, f"databases.{through}.upstream") for one in found]


def _hints(error: BaseException, *, unix: bool, ipv4: bool) -> list[str]:
    if isinstance(error.__cause__, BaseExceptionGroup):
        causes = [cause for cause in error.__cause__.exceptions if not _is_of_a_family(cause)]
        found = [hint for cause in causes or error.__cause__.exceptions for hint in _hints(cause, unix=unix, ipv4=ipv4)]
        return list(dict.fromkeys(found))
    if isinstance(error, socket.gaierror):
        return [_NAME_UNKNOWN_NOW if error.errno == socket.EAI_AGAIN else _NO_NAME]
    if isinstance(error, UnicodeError):
        return [_NO_NAME]
    if isinstance(error, UnfitServerError | LeadsBackError):
        return [_UNFIT[error.problem] if isinstance(error, UnfitServerError) else _OWN_ADDRESS]
    number = error.errno if isinstance(error, OSError) else None
    if number is None and isinstance(error, TimeoutError):
        number = errno.ETIMEDOUT
    if number is None:
        return [_NOT_NOW if isinstance(error, ConnectionRefusedError) else _CHECK]
    if number in _EXHAUSTION:
        return [_EXHAUSTION[number]]
    if number == errno.EADDRNOTAVAIL and ipv4:
        return [_NO_PORT]
    return [(_UNIX if unix else _TCP).get(number, _CHECK)]


def why_it_ended(number: int | None) -> str:
    """What may be the matter with a server that has ended a session without an error: sentences.

    Args:
        number: what the system says of the connection; ``None``: it has come to its end.
    """
    if number is None or number not in _LOST:
        return _ENDED
    return f"About the connection the system says: {os.strerror(number)}. {_LOST_TOUCH}"


def _is_of_a_family(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _OF_A_FAMILY
