"""The guard's settings, checked: what the command line, the environment and the configuration file have said."""

from __future__ import annotations

import os
import pwd
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from pgguard.attribution.evidence import Attribution
from pgguard.attribution.privileges import Account
from pgguard.attribution.trust import TRUST_REMEDY, UntrustedError, open_trusted
from pgguard.faults.catalogue import kind_hint
from pgguard.faults.policy import KindAction, Mode, Policy, PolicyError
from pgguard.faults.sql import SqlMode
from pgguard.faults.text import nearest, shorten
from pgguard.proxy.addresses import Address, TcpAddress, Upstream, parse_admin, parse_listen, parse_upstream
from pgguard.proxy.errors import ConfigurationError
from pgguard.secrets.text import may_hold_a_password, redact
from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from pgguard.proxy.offer import Offer

DEFAULT_CONFIG: Final = Path("pgguard.toml")
DEFAULT_LISTEN: Final = "127.0.0.1:6544"
_CONFIG_LIMIT: Final = 1 << 20
"""Bytes of a configuration file, at most: a device may have no end."""
_SHOWN: Final = 60
"""Characters of a value, or of a key, that are shown, at most."""
_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$"
"""What a database may be called."""
_ACTIONS: Final = re.sub(", (?=[^,]*$)", " or ", ", ".join(f"'{action}'" for action in KindAction))
_EXPECTED: Final = {
    "list_type": "should be an address, or a list of them",
    "too_short": "should be an address, or a list of them, not an empty one",
    "string_type": "should be text in quotation marks",
    "bool_type": "should be true or false",
    "path_type": "should be text in quotation marks",
    "dict_type": "should be a table, as in [kinds]",
    "model_type": f"should be an action: {_ACTIONS}",
    "missing": f"is missing: name an action, {_ACTIONS}",
    "string_pattern_mismatch": "should be a name of letters, digits, '_', '.' and '-', 63 at most",
    "string_too_short": "should say where PostgreSQL is, as in 'host=db.example.com'",
}
"""What a setting has to be, by the type of pydantic's error, where its own words are a programmer's."""
_DATABASE: Final = "should be a table for each database, as in [[databases]]"

Seconds = Annotated[float, Field(ge=0, le=3600)]


class KindSettings(BaseModel):
    """What the configuration file says about one kind of fault."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: KindAction


def _listed(listen: Any) -> Any:
    """Let ``listen = "ADDR"`` stand for a list of one."""
    return [listen] if isinstance(listen, str) else listen


def _with_actions(kinds: Any) -> Any:
    """Let ``KIND = "ACTION"`` stand for a table with nothing but an action."""
    if not isinstance(kinds, dict):
        return kinds
    return {kind: {"action": value} if isinstance(value, str) else value for kind, value in kinds.items()}


Listen = Annotated[list[str], Field(min_length=1), BeforeValidator(_listed)]
Kinds = Annotated[dict[Kind, KindSettings], BeforeValidator(_with_actions)]


class DatabaseSettings(BaseModel):
    """What the configuration file says about one of several servers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=_NAME)]
    """What it is called in records, and by the guard: no other one is."""
    upstream: Annotated[str, Field(min_length=1)]
    listen: Listen
    mode: Mode | None = None
    """``None``: as for all."""
    kinds: Kinds = {}
    """Of kinds that aren't in it, what is said for all holds."""


class Front(NamedTuple):
    """One server, and where the guard listens for its clients."""

    name: str | None
    """``None``: it is the only one, and has none."""
    upstream: Upstream
    addresses: tuple[Address, ...]
    """Those that it is told; one with port 0 lets the system choose."""

    @property
    def server(self) -> str:
        """What to call the server, where there may be others."""
        return "the server" if self.name is None else f"the server of {self.name}"

    @property
    def setting(self) -> str:
        """What says where the server is, as one calls it who is to change that."""
        return "--upstream" if self.name is None else f"databases.{self.name}.upstream"


class Settings(BaseModel):
    """Everything that can be set, by the names that it has in the configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    upstream: str = ""
    """A libpq connection string; empty: what libpq's own variables say."""
    listen: Listen = [DEFAULT_LISTEN]
    tls_cert: str = ""
    """The certificate that clients are shown, or ``self-signed``; empty: they are offered no TLS."""
    tls_key: Path | None = None
    tls_ca: Path | None = None
    """The CAs that clients' certificates are to be from; ``None``: they are asked for none."""
    mode: Mode = Mode.LOG
    faults: Path | None = None
    admin: str = ""
    """Where the live page, the API and the metrics are, ``HOST:PORT``; empty for nowhere."""
    admin_token_file: Path | None = None
    """A file with the secret that whoever wants to see them has to know."""
    otel: StrictBool = False
    """Send faults and metrics to an OpenTelemetry collector."""
    attribution: Attribution = "auto"
    sql: SqlMode = SqlMode.NORMALIZED
    idle_in_transaction: Annotated[float, Field(ge=0, le=86400)] = 60.0
    """Seconds for which a transaction may sit idle; 0 for ever."""
    unread_answer: Annotated[float, Field(ge=0, le=86400)] = 5.0
    """Seconds for which a complete answer may lie unread; 0 for ever."""
    evidence_budget: Annotated[float, Field(ge=0, le=5)] = 0.25
    """Seconds for which a session may be held while the first fault of a cause is looked into; 0 for none."""
    user: str = ""
    """An ordinary user to change to once everything is set up; empty for none."""
    startup_timeout: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Seconds for a client to say who it is: as long as PostgreSQL's ``authentication_timeout`` unless that is set."""
    shutdown_timeout: Seconds = 8.0
    """Seconds for sessions to finish when the guard is told to stop."""
    kinds: Kinds = {}
    databases: list[DatabaseSettings] = []
    """Several servers, each with listeners of its own; instead of ``upstream`` and ``listen``."""
    _source: Path | None = PrivateAttr(default=None)
    _given: frozenset[str] = PrivateAttr(default=frozenset())
    _remark: str | None = PrivateAttr(default=None)

    @property
    def source(self) -> Path | None:
        """The file that they are from, as far as they weren't given otherwise; ``None`` if there is none."""
        return self._source

    @property
    def remark(self) -> str | None:
        """Why a file that is there isn't read: a sentence for the log, without its stop."""
        return self._remark

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Take ``true`` for no number, and text for one only of those that were typed: there everything is text."""
        if info.field_name is None or cls.model_fields[info.field_name].annotation is not float:
            return value
        typed = () if info.context is None else info.context
        if isinstance(value, bool) or (isinstance(value, str) and info.field_name not in typed):
            raise ValueError
        return value

    def admin_address(self) -> TcpAddress | None:
        """Where the live page is; ``None`` for nowhere."""
        return parse_admin(self.admin) if self.admin else None

    def server(self) -> Upstream:
        """Where PostgreSQL is, if there are no :attr:`databases`."""
        return parse_upstream(self.upstream)

    def fronts(self) -> list[Front]:
        """The servers, each with where the guard listens for its clients.

        Raises:
            ConfigurationError: it can't be understood, or contradicts itself.
        """
        if not self.databases:
            return [Front(None, self.server(), tuple(map(parse_listen, self.listen)))]
        for name in ("upstream", "listen"):
            if name in self.model_fields_set:
                place = _option(name) if name in self._given else f"{self.source}: {name}"
                raise ConfigurationError(f"{place}: [[databases]] says it for each database: leave it out")
        fronts: list[Front] = []
        for database in self.databases:
            try:
                front = Front(
                    database.name, parse_upstream(database.upstream), tuple(map(parse_listen, database.listen))
                )
            except ConfigurationError as error:
                raise ConfigurationError(f"databases.{database.name}: {str(error).removeprefix('--')}") from error
            for other in fronts:
                _tell_apart(front, other)
            fronts.append(front)
        return fronts

    def policies(self) -> dict[str | None, Policy]:
        """What is done about which fault, by the name of the database.

        Raises:
            ConfigurationError: it can't be done.
        """
        whole = _policy("[kinds]", self.mode, self.kinds)
        if not self.databases:
            return {None: whole}
        return {
            one.name: _policy(f"databases.{one.name}.kinds", one.mode or self.mode, {**self.kinds, **one.kinds})
            for one in self.databases
        }

    def tls(self) -> Offer | None:
        """The TLS that clients are offered, from the files that there are now; ``None`` for none."""
        if not self.tls_cert:
            for option, path in (("--tls-key", self.tls_key), ("--tls-ca", self.tls_ca)):
                if path is not None:
                    raise ConfigurationError(
                        f"{option} is given, and --tls-cert is missing: name the certificate's file, too"
                    )
            return None
        if self.tls_remark is not None:
            return None
        # What it takes to read certificates takes longer to import than all else here.
        from pgguard.proxy.offer import SELF_SIGNED, Files, Offer  # noqa: PLC0415

        if self.tls_cert == SELF_SIGNED:
            if self.tls_key is not None:
                raise ConfigurationError("--tls-key is given, and --tls-cert self-signed makes a key: leave it out")
            return Offer(None, self.tls_ca)
        if self.tls_key is None:
            raise ConfigurationError(
                f"--tls-cert {self.tls_cert}: --tls-key is missing: name the file with the certificate's private key"
            )
        return Offer(Files(Path(self.tls_cert), self.tls_key), self.tls_ca)

    @property
    def tls_remark(self) -> str | None:
        """Why clients are offered no TLS although there is a certificate: a sentence for the log, without its stop."""
        listen = [one for database in self.databases for one in database.listen] if self.databases else self.listen
        if not self.tls_cert or any(isinstance(parse_listen(one), TcpAddress) for one in listen):
            return None
        return "--tls-cert is not used: as in PostgreSQL, TLS is for TCP, and pgguard listens on Unix sockets alone"

    def account(self) -> Account | None:
        """The ordinary user to change to; ``None`` for none."""
        if not self.user:
            return None
        if os.geteuid() != 0:
            raise ConfigurationError(
                f"--user {self.user}: only root can become another user: start pgguard as root, or leave --user out"
            )
        try:
            entry = pwd.getpwnam(self.user)
        except (KeyError, ValueError):
            raise ConfigurationError(
                f"--user {self.user}: there is no such user: create it (useradd --system), or name another"
            ) from None
        if entry.pw_uid == 0:
            raise ConfigurationError(
                f"--user {self.user}: that is root: name an ordinary user, preferably one just for pgguard"
            )
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def _policy(where: str, mode: Mode, kinds: Mapping[Kind, KindSettings]) -> Policy:
    try:
        return Policy(mode, {kind: settings.action for kind, settings in kinds.items()})
    except PolicyError as error:
        raise ConfigurationError(f"{where}: {error}") from error


def _tell_apart(front: Front, other: Front) -> None:
    """See to it that nobody takes one database for another."""
    if front.name == other.name:
        raise ConfigurationError(f"databases.{front.name}: there are two of this name: give each its own")
    for address in front.addresses:
        if address in other.addresses and address.port:
            raise ConfigurationError(
                f"databases.{front.name}: listen {address}: {other.name} listens there too: give each an address of "
                "its own"
            )


def _option(name: str) -> str:
    """What a setting may have been given by, beside the file."""
    return f"--{name.replace('_', '-')} or PGGUARD_{name.upper()}"


IN_FILE_ALONE: Final = frozenset({"kinds", "databases", "startup_timeout", "shutdown_timeout"})
"""What no option and no variable says."""


def mistyped_variables() -> list[str]:
    """What to say of variables that look like the guard's, and aren't: sentences for the log.

    Others than the guard may have such variables, Kubernetes for one for a service of that name. So nothing is said of
    those that are like none of the guard's.
    """
    known = {name.upper() for name in ("config", *Settings.model_fields) if name not in IN_FILE_ALONE}
    said = []
    for variable in os.environ:
        _, prefix, name = variable.partition("PGGUARD_")
        if prefix and variable.startswith(prefix) and name not in known:
            close = nearest(name, known)
            if name.lower() in IN_FILE_ALONE:
                said.append(f"{variable} is not used: {name.lower()} can only be set in the configuration file")
            elif close is not None:
                said.append(f"{variable} is not used: did you mean PGGUARD_{close}?")
    return said


_AT_RUN_TIME: Final = (
    "mode",
    "kinds",
    "sql",
    "idle_in_transaction",
    "unread_answer",
    "evidence_budget",
    "startup_timeout",
    "shutdown_timeout",
)
"""What can be changed while the guard runs; and ``faults``, from one file to another."""


class Reloaded(NamedTuple):
    """What has become of settings that were read again."""

    settings: Settings
    """Those that hold from now on."""
    remarks: list[str]
    """One for each setting that differs: what has been changed, and what can't be; no value of a connection string."""


def reload_settings(current: Settings, given: dict[str, Any], config: Path | None) -> Reloaded:
    """Read the settings again, and change those that can be changed at run time.

    Args:
        current: those that hold.
        given: as for :func:`load_settings`: what comes before the file did so at the start, and does now.
        config: likewise.

    Raises:
        ConfigurationError: as there, or they contradict themselves: nothing is to be changed.
    """
    if config is None and os.path.lexists(DEFAULT_CONFIG):
        config = DEFAULT_CONFIG  # if it isn't trusted any more, nothing changes
    asked = load_settings(given, config)
    asked.policies()
    differing = [name for name in Settings.model_fields if getattr(asked, name) != getattr(current, name)]
    if {"listen", "upstream", "databases"} & set(differing):
        asked.fronts()
    if "admin" in differing:
        asked.admin_address()
    changed: dict[str, Any] = {}
    remarks = [] if asked.remark in {None, current.remark} else [str(asked.remark)]
    if asked.source not in {None, current.source}:
        remarks.append(f"settings are now read from {asked.source}")
    for name in differing:
        before, now = getattr(current, name), getattr(asked, name)
        if name == "databases":
            changed[name], said = _reloaded_databases(before, now)
            remarks += said
        elif name in _AT_RUN_TIME or (name == "faults" and None not in (before, now)):
            changed[name] = now
            remarks += _changes(name, before, now)
        else:
            remarks.append(_stays(name))
    settings = current.model_copy(update=changed)
    settings._source, settings._remark = asked.source, asked.remark  # noqa: SLF001 - nobody else sets them
    return Reloaded(settings, remarks)


def _reloaded_databases(
    before: Sequence[DatabaseSettings], now: Sequence[DatabaseSettings]
) -> tuple[list[DatabaseSettings], list[str]]:
    """What becomes of the databases, and a remark for each setting that differs.

    What is done about faults changes; which there are, and where they are, doesn't.
    """
    asked = {one.name: one for one in now}
    kept, remarks = [], []
    for one in before:
        other = asked.pop(one.name, None)
        if other is None:
            kept.append(one)
            remarks.append(f"databases.{one.name} stays: restart pgguard to close it")
            continue
        kept.append(one.model_copy(update={"mode": other.mode, "kinds": other.kinds}))
        for name in ("mode", "kinds"):
            remarks += _changes(f"databases.{one.name}.{name}", getattr(one, name), getattr(other, name))
        remarks += [
            _stays(f"databases.{one.name}.{name}")
            for name in ("upstream", "listen")
            if getattr(one, name) != getattr(other, name)
        ]
    remarks += [f"databases.{name} is new: restart pgguard to open it" for name in asked]
    return kept, remarks


def _stays(name: str) -> str:
    return f"{name} stays as it is: restart pgguard to change it"


def _changes(name: str, before: Any, now: Any) -> list[str]:
    """What has changed in a setting: a remark, or of what is said about kinds one for each; none if nothing has."""
    if isinstance(now, dict):
        kinds = ((f"{name}.{kind}", before.get(kind), now.get(kind)) for kind in Kind)
        return [f"{one} is now {_shown(new)} (was {_shown(old)})" for one, old, new in kinds if old != new]
    return [f"{name} is now {_shown(now)} (was {_shown(before)})"] if before != now else []


def _shown(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, KindSettings):
        return value.action
    return f"{value:g}" if isinstance(value, float) else str(value)


def load_settings(given: dict[str, Any], config: Path | None) -> Settings:
    """Put together what was given by option or environment, and behind that the configuration file.

    Args:
        given: by the names of :class:`Settings`; what is ``None`` or empty was not given.
        config: the file; ``None``: :data:`DEFAULT_CONFIG` if there is one, and it is the user's own or root's. Whoever
            may write to the directory that the guard happens to be started in must not decide what it does.

    Raises:
        ConfigurationError: the file can't be read, somebody else may have written it, or a setting isn't one.
    """
    given = {name: value for name, value in given.items() if value not in (None, [], "")}
    source, in_file, remark = _read_default() if config is None else (config, _read_named(config), None)
    for name, value in in_file.items():
        # What a kind's action may be is a choice of a few words.
        if name != "kinds" and any("\0" in text for text in _texts(value)):
            raise ConfigurationError(f"{config or DEFAULT_CONFIG}: {name} holds a NUL character: remove it")
    try:
        settings = Settings.model_validate(in_file | given, context=given.keys())
    except ValidationError as error:
        raise ConfigurationError(_first_problem(error, given, in_file, config or DEFAULT_CONFIG)) from error
    settings._source = None if source is None else source.absolute()  # noqa: SLF001 - nobody else sets it
    settings._remark = remark  # noqa: SLF001 - likewise
    settings._given = frozenset(given)  # noqa: SLF001 - likewise
    return settings


def _texts(value: object) -> Iterator[str]:
    """All text in a value of the file."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def _read_default() -> tuple[Path | None, dict[str, Any], str | None]:
    """:data:`DEFAULT_CONFIG` and what it says, nothing if there is none or it isn't trusted; and why it isn't."""
    # A link is no more followed, to where it may take any time, than a file is read, before it is known whose it is.
    if not os.path.lexists(DEFAULT_CONFIG):
        return None, {}, None
    try:
        return DEFAULT_CONFIG, _read(DEFAULT_CONFIG), None
    except FileNotFoundError:
        return None, {}, None  # a link that leads nowhere
    except UntrustedError as error:
        return None, {}, f"{DEFAULT_CONFIG.absolute()} is ignored, because {error}: {TRUST_REMEDY}, or remove it"
    except OSError as error:
        raise _unreadable(DEFAULT_CONFIG, error) from error


def _read_named(path: Path) -> dict[str, Any]:
    try:
        return _read(path)
    except UntrustedError as error:
        raise ConfigurationError(f"--config {path}: {error}: {TRUST_REMEDY}") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(f"--config {path}: {error.strerror}")


def _read(path: Path) -> dict[str, Any]:
    """Raises OSError; UntrustedError if somebody else may have written it; ConfigurationError if it isn't TOML."""
    with open_trusted(path) as file:
        content = file.read(_CONFIG_LIMIT + 1)
        if len(content) > _CONFIG_LIMIT:
            raise ConfigurationError(f"--config {path}: it is larger than {_CONFIG_LIMIT >> 20} MiB: name another file")
        try:
            return tomllib.loads(content.decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"--config {path}: it is not valid TOML: {error}") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise ConfigurationError(
                f"--config {path}: a number in it is too long, or its brackets are nested too deeply"
            ) from error


def _first_problem(error: ValidationError, given: dict[str, Any], in_file: dict[str, Any], config: Path | None) -> str:
    """One problem in one line: the place, what is wrong with it, what stands there."""
    problems = error.errors()
    # A misspelt key comes first: it is why another one is missing.
    problem = min(problems, key=lambda one: (not _is_unknown_kind(one["loc"]), one["type"] != "extra_forbidden"))
    name = str(problem["loc"][0])
    if name in given:
        place = _option(name)
    else:
        keys = [shorten(redact(str(part)), _SHOWN) for part in _keys(problem["loc"], in_file) if part != "[key]"]
        place = f"{config}: {'.'.join(keys)}"
    if problem["type"] == "extra_forbidden":
        known = _settings_at(problem["loc"])
        close = nearest(str(problem["loc"][-1]), known)
        what = f"did you mean {close}?" if close else f"remove it. The settings are {', '.join(sorted(known))}"
        return f"{place}: there is no such setting: {what}"
    if _is_unknown_kind(problem["loc"]):
        return f"{place}: there is no such kind of fault: {kind_hint(str(problem['input']))}"
    text = _in_seconds(name) or _expected(problem["loc"], problem["type"]) or problem["msg"].removeprefix("Input ")
    stands = problem["input"]
    hint = None
    if isinstance(stands, str):
        # Where there is a choice, it is listed in quotation marks.
        choice = nearest(stands, re.findall(r"'([^']*)'", text))
        hint = f"did you mean {choice}?" if choice else None
        if name not in given and _in_seconds(name) and re.fullmatch(r"[\d.]+", stands):
            hint = "leave out the quotation marks"
    shown = _as_written(stands)
    return f"{place} {text}" + (f", not {shown}" if shown else "") + (f": {hint}" if hint else "")


def _keys(location: tuple[int | str, ...], in_file: dict[str, Any]) -> tuple[int | str, ...]:
    """Where something stands in the file: of a database by its name, or by its number, counted from 1."""
    if location[0] != "databases" or len(location) == 1 or not isinstance(location[1], int):
        return location
    entry = in_file["databases"][location[1]]
    name = entry.get("name") if isinstance(entry, dict) else None
    if isinstance(name, str) and re.search(_NAME, name) is not None:
        return ("databases", name, *location[2:])
    return ("databases", location[1] + 1, *location[2:])


def _settings_at(location: tuple[int | str, ...]) -> Collection[str]:
    """The settings that there are where one stands."""
    if "kinds" in location[:-1]:
        return KindSettings.model_fields
    return DatabaseSettings.model_fields if location[0] == "databases" else Settings.model_fields


def _expected(location: tuple[int | str, ...], problem: str) -> str | None:
    """What a setting has to be, if pydantic doesn't say it well enough."""
    if location[0] == "databases" and len(location) < 3:
        return _DATABASE
    if location[0] == "databases" and problem == "missing" and location[-1] in DatabaseSettings.model_fields:
        return "is missing: each of [[databases]] has a name, an upstream and a listen"
    return _EXPECTED.get(problem)


def _is_unknown_kind(location: tuple[int | str, ...]) -> bool:
    return "kinds" in location[:-1] and location[-1] == "[key]"


def _as_written(value: object) -> str | None:
    """A value as it is written in TOML, or the beginning of it; ``None`` for one that is too much to show."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and may_hold_a_password(value):
        return '"…"'
    return shorten(repr(value), _SHOWN) if isinstance(value, str | int | float) else None


def _in_seconds(name: str) -> str | None:
    """What a setting that is a time has to be; ``None`` for any other."""
    field = Settings.model_fields[name]
    if field.annotation is not float:
        return None
    limits = {
        sign: getattr(limit, sign) for limit in field.metadata for sign in ("ge", "gt", "le") if hasattr(limit, sign)
    }
    if "gt" in limits:
        return f"should be a number of seconds, more than {limits['gt']} and at most {limits['le']}"
    return f"should be a number of seconds, from {limits['ge']} to {limits['le']}"
