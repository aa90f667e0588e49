"""Connection strings as users have them: libpq's two forms, and the URLs that other libraries have made of one.

A URL is taken apart here. Of user, password and database nothing is kept, so that nothing can quote them; and where
libpq complains of a string, what it quotes of it is shown only if no password can be in it.

Sources: "Connection Strings" in the chapter on libpq and ``conninfo_uri_parse_options()`` in ``fe-connect.c``;
"Connecting to the Database" of pgjdbc; "Database URLs" of SQLAlchemy; dj-database-url and Prisma for schemes and
parameters.
"""

from __future__ import annotations

import difflib
import os
import re
from typing import Final, NamedTuple
from urllib.parse import unquote

import psycopg
from psycopg import pq

from pgguard.faults.text import listed
from pgguard.proxy.errors import ConfigurationError, NotPostgresError
from pgguard.proxy.server_tls import SslMode

_NATIVE: Final = frozenset({"postgresql", "postgres"})
SCHEMES: Final = _NATIVE | {"ecto", "pg", "postgis", "pgsql", "psql", "timescale", "timescaledb", "timescalegis"}
"""What names PostgreSQL in a URL."""
_URL: Final = re.compile(
    r"(?P<jdbc>jdbc:)?(?P<scheme>[a-z][a-z0-9.-]*)(?:\+(?P<driver>[a-z0-9_.-]+))?:(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)

_TRANSLATED: Final = {
    "connectTimeout": "connect_timeout",
    "gssEncMode": "gssencmode",
    "targetServerType": "target_session_attrs",
}
"""What pgjdbc calls what libpq has another name for."""
_SERVER_TYPES: Final = {
    "master": "primary",
    "slave": "standby",
    "secondary": "standby",
    "preferSecondary": "prefer-standby",
}
_TRANSLATED_VALUES: Final = {"target_session_attrs": _SERVER_TYPES, "sslmode": {"no-verify": "require"}}
"""Values of other libraries', pgjdbc's and node-postgres's, by libpq's keywords."""
_MODES: Final = {mode: str(mode) for mode in SslMode} | dict.fromkeys(("false", "0", "off", "no"), "prefer")
"""Values of ``ssl`` by the ``sslmode`` that they are; any other insists: pgjdbc's, asyncpg's, node-postgres's."""
_OWN: Final = frozenset(
    {
        "user",
        "password",
        "dbname",
        "passfile",
        "oauth_client_secret",
        "scram_client_key",
        "scram_server_key",
    }
)
"""What is each client's own, or its secret."""
_NAME: Final = re.compile(r"[A-Za-z][\w.-]{0,40}")
_MAY_HOLD_SECRETS: Final = re.compile(r"pass|pwd|pw=|secret|key|token|@|://", re.IGNORECASE)
_ENCODED_WRONG: Final = re.compile(r"%(?![0-9A-Fa-f]{2})|%00")
"""What libpq refuses, in parts of a URL too that aren't used here: ``conninfo_uri_decode()`` in ``fe-connect.c``."""
_CLOSE: Final = 0.85
"""How alike a parameter has to be to one that there is to be taken for a slip of the pen."""
_HELP: Final = "write postgresql://HOST:PORT, or host=HOST port=PORT"


class ConnectionString(NamedTuple):
    """What a connection string says, without user, password and database if it was a URL."""

    settings: dict[str, str]
    """By libpq's keywords."""
    may_hold_secrets: bool
    """Parts of it must not be shown: if it is mistyped, any of them may be a password."""
    remark: str | None
    """What was made of it, where it isn't libpq's own."""


def read_connection_string(text: str) -> ConnectionString:
    """Read what ``--upstream`` was given.

    Raises:
        ConfigurationError: it can't be read, or is another database's (NotPostgresError); the message holds no
            password.
    """
    match = _URL.fullmatch(text.strip())
    if match is None or not (match["jdbc"] or match["rest"].startswith("//")):
        return ConnectionString(_parse(text), bool(_MAY_HOLD_SECRETS.search(text)), None)
    return _read_url(match)


def _parse(text: str) -> dict[str, str]:
    try:
        options = pq.Conninfo.parse(os.fsencode(text))
    except psycopg.OperationalError as error:
        said = str(error).strip()
        if _MAY_HOLD_SECRETS.search(text):
            said = f"{_without_quotations(said)}: {_HELP}"
        raise ConfigurationError(f"--upstream: {said}") from None  # whoever shows its context shows the whole string
    return {option.keyword.decode(): os.fsdecode(option.val) for option in options if option.val is not None}


def _without_quotations(said: str) -> str:
    """What libpq says of a string, without what it quotes of it, which may have quotation marks in it itself."""
    if said.startswith('missing "="'):
        return 'a "=" is missing'
    if said.startswith(("end of string reached", "IPv6 host address")):
        return said.partition(" in URI")[0]
    return said.partition('"')[0].rstrip(": ")


def _read_url(match: re.Match[str]) -> ConnectionString:
    jdbc, scheme, driver = match["jdbc"], match["scheme"].lower(), match["driver"]
    if scheme not in SCHEMES:
        raise NotPostgresError(f"--upstream: {jdbc or ''}{scheme}: is not a PostgreSQL URL: {_HELP}")
    if _ENCODED_WRONG.search(match["rest"]) and not (jdbc or driver):
        raise ConfigurationError(
            "--upstream: a % in the URL isn't followed by two hexadecimal digits: write % itself as %25"
        )
    hosts, query = _split(match["rest"])
    parameters, unknown = _parameters(query)
    if jdbc and not hosts and not parameters.keys() & {"host", "hostaddr"}:
        hosts = "localhost"
    settings = _parse(f"postgresql://{hosts}/?{'&'.join(f'{name}={value}' for name, value in parameters.items())}")
    remark = f"--upstream: pgguard ignores {listed(unknown)}" if unknown else None
    return ConnectionString(settings, may_hold_secrets=True, remark=remark)


def _split(rest: str) -> tuple[str, str]:
    """Find the hosts and the query in what stands behind the scheme, beside credentials and a database.

    As in libpq credentials may hold a ``?``; and since a password may have been written as it is, they reach to the
    last ``@`` that can end them. One behind the hosts leaves in doubt what are hosts and what is a password.
    """
    if not rest.startswith("//"):
        return "", rest.partition("?")[2]
    rest = rest[2:]
    before = rest.partition("/")[0]
    at = before.partition("?")[0].rfind("@")
    if at < 0:
        at = before.rfind("@")
    end = next((n for n in range(at + 1, len(rest)) if rest[n] in "/?"), len(rest))
    if "@" in rest[end:]:
        raise ConfigurationError(
            "--upstream: it isn't clear where the password ends: write @ in it as %40 and / as %2F, or leave out user "
            "and password, which pgguard doesn't use"
        )
    return rest[at + 1 : end], rest[end:].partition("?")[2]


def _parameters(query: str) -> tuple[dict[str, str], list[str]]:
    """A URL's parameters: those about the server as they stand there, and which libpq hasn't."""
    known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    kept: dict[str, str] = {}
    implied: dict[str, str] = {}
    unknown: list[str] = []
    for pair in filter(None, query.split("&")):
        name, equals, value = pair.partition("=")
        name = _TRANSLATED.get(unquote(name), unquote(name))
        if not equals or not _NAME.fullmatch(name):
            raise ConfigurationError("--upstream: the URL's parameters must be NAME=VALUE, separated by &")
        if name in _OWN:
            continue
        if name == "ssl":
            implied = {"sslmode": _MODES.get(unquote(value).lower(), "require")}
        elif name not in known:
            unknown.append(name)
        elif name in kept:
            raise ConfigurationError(f"--upstream: {name} is given twice: give several values separated by commas")
        else:
            kept[name] = _TRANSLATED_VALUES.get(name, {}).get(value, value)
    kept = implied | kept
    if unknown and _MAY_HOLD_SECRETS.search(query):
        # A & in a password makes a parameter of what is behind it.
        return kept, ["parameters that libpq doesn't know"]
    for name in unknown:
        if close := difflib.get_close_matches(name, known, n=1, cutoff=_CLOSE):
            raise ConfigurationError(f"--upstream: there is no parameter {name}: did you mean {close[0]}?")
    return kept, unknown
