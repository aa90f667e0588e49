"""The guard's settings, checked: what the command line, the environment and the configuration file have said."""

from __future__ import annotations

import os
import pwd
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, ValidationInfo, field_validator

from pgguard.attribution.evidence import Attribution
from pgguard.attribution.privileges import Account
from pgguard.attribution.trust import TRUST_REMEDY, UntrustedError, open_trusted
from pgguard.faults.catalogue import kind_hint
from pgguard.faults.policy import KindAction, Mode, Policy, PolicyError
from pgguard.faults.sql import SqlMode
from pgguard.faults.text import nearest, shorten
from pgguard.proxy.addresses import Address, TcpAddress, Upstream, parse_listen, parse_upstream
from pgguard.proxy.errors import ConfigurationError
from pgguard.secrets.text import may_hold_a_password, redact
from pgguard.session.verdicts import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pgguard.proxy.offer import Offer

DEFAULT_CONFIG: Final = Path("pgguard.toml")
DEFAULT_LISTEN: Final = "127.0.0.1:6544"
_CONFIG_LIMIT: Final = 1 << 20
"""Bytes of a configuration file, at most: a device may have no end."""
_SHOWN: Final = 60
"""Characters of a value, or of a key, that are shown, at most."""
_ACTIONS: Final = re.sub(", (?=[^,]*$)", " or ", ", ".join(f"'{action}'" for action in KindAction))
_EXPECTED: Final = {
    "list_type": "should be an address, or a list of them",
    "too_short": "should be an address, or a list of them, not an empty one",
    "string_type": "should be text in quotation marks",
    "path_type": "should be text in quotation marks",
    "dict_type": "should be a table, as in [kinds]",
    "model_type": f"should be an action: {_ACTIONS}",
    "missing": f"is missing: name an action, {_ACTIONS}",
}
"""What a setting has to be, by the type of pydantic's error, where its own words are a programmer's."""

Seconds = Annotated[float, Field(ge=0, le=3600)]


class KindSettings(BaseModel):
    """What the configuration file says about one kind of fault."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    action: KindAction


class Settings(BaseModel):
    """Everything that can be set, by the names that it has in the configuration file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    upstream: str = ""
    """A libpq connection string; empty: what libpq's own variables say."""
    listen: Annotated[list[str], Field(min_length=1)] = [DEFAULT_LISTEN]
    tls_cert: str = ""
    """The certificate that clients are shown, or ``self-signed``; empty: they are offered no TLS."""
    tls_key: Path | None = None
    tls_ca: Path | None = None
    """The CAs that clients' certificates are to be from; ``None``: they are asked for none."""
    mode: Mode = Mode.LOG
    faults: Path | None = None
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
    kinds: dict[Kind, KindSettings] = {}
    _source: Path | None = PrivateAttr(default=None)
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

    @field_validator("listen", mode="before")
    @classmethod
    def _one_alone(cls, listen: Any) -> Any:
        """Let ``listen = "ADDR"`` stand for a list of one."""
        return [listen] if isinstance(listen, str) else listen

    @field_validator("kinds", mode="before")
    @classmethod
    def _actions_alone(cls, kinds: Any) -> Any:
        """Let ``KIND = "ACTION"`` stand for a table with nothing but an action."""
        if not isinstance(kinds, dict):
            return kinds
        return {kind: {"action": value} if isinstance(value, str) else value for kind, value in kinds.items()}

    def addresses(self) -> list[Address]:
        """Where to listen."""
        return [parse_listen(text) for text in self.listen]

    def server(self) -> Upstream:
        """Where PostgreSQL is."""
        return parse_upstream(self.upstream)

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
        if not self.tls_cert or any(isinstance(address, TcpAddress) for address in self.addresses()):
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

    def policy(self) -> Policy:
        """What is done about which fault."""
        try:
            return Policy(self.mode, {kind: settings.action for kind, settings in self.kinds.items()})
        except PolicyError as error:
            raise ConfigurationError(f"[kinds]: {error}") from error


IN_FILE_ALONE: Final = frozenset({"kinds", "startup_timeout", "shutdown_timeout"})
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
    asked.policy()
    differing = [name for name in Settings.model_fields if getattr(asked, name) != getattr(current, name)]
    if "listen" in differing:
        asked.addresses()
    if "upstream" in differing:
        asked.server()
    changed: dict[str, Any] = {}
    remarks = [] if asked.remark in {None, current.remark} else [str(asked.remark)]
    if asked.source not in {None, current.source}:
        remarks.append(f"settings are now read from {asked.source}")
    for name in differing:
        before, now = getattr(current, name), getattr(asked, name)
        if name in _AT_RUN_TIME or (name == "faults" and None not in (before, now)):
            changed[name] = now
            remarks += (
                _changes(before, now) if name == "kinds" else [f"{name} is now {_shown(now)} (was {_shown(before)})"]
            )
        else:
            remarks.append(f"{name} stays as it is: restart pgguard to change it")
    settings = current.model_copy(update=changed)
    settings._source, settings._remark = asked.source, asked.remark  # noqa: SLF001 - nobody else sets them
    return Reloaded(settings, remarks)


def _changes(before: Mapping[Kind, KindSettings], now: Mapping[Kind, KindSettings]) -> list[str]:
    """What has changed in what is said about kinds."""
    actions = {kind: (before.get(kind), now.get(kind)) for kind in Kind}
    return [
        f"kinds.{kind} is now {_action(new)} (was {_action(old)})" for kind, (old, new) in actions.items() if old != new
    ]


def _action(settings: KindSettings | None) -> str:
    return "not set" if settings is None else settings.action


def _shown(value: object) -> str:
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
        if "\0" in "".join(map(str, value if isinstance(value, list) else [value])):
            raise ConfigurationError(f"{config or DEFAULT_CONFIG}: {name} holds a NUL character: remove it")
    try:
        settings = Settings.model_validate(in_file | given, context=given.keys())
    except ValidationError as error:
        raise ConfigurationError(_first_problem(error, given, config or DEFAULT_CONFIG)) from error
    settings._source = None if source is None else source.absolute()  # noqa: SLF001 - nobody else sets it
    settings._remark = remark  # noqa: SLF001 - likewise
    return settings


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


def _first_problem(error: ValidationError, given: dict[str, Any], config: Path | None) -> str:
    """One problem in one line: the place, what is wrong with it, what stands there."""
    problems = error.errors()
    # A misspelt key comes first: it is why another one is missing.
    problem = min(problems, key=lambda one: (not _is_unknown_kind(one["loc"]), one["type"] != "extra_forbidden"))
    name = str(problem["loc"][0])
    if name in given:
        place = f"--{name.replace('_', '-')} or PGGUARD_{name.upper()}"
    else:
        keys = [shorten(redact(str(part)), _SHOWN) for part in problem["loc"] if part != "[key]"]
        place = f"{config}: {'.'.join(keys)}"
    if problem["type"] == "extra_forbidden":
        known = KindSettings.model_fields if problem["loc"][0] == "kinds" else Settings.model_fields
        close = nearest(str(problem["loc"][-1]), known)
        what = f"did you mean {close}?" if close else f"remove it. The settings are {', '.join(sorted(known))}"
        return f"{place}: there is no such setting: {what}"
    if _is_unknown_kind(problem["loc"]):
        return f"{place}: there is no such kind of fault: {kind_hint(str(problem['input']))}"
    text = _in_seconds(name) or _EXPECTED.get(problem["type"]) or problem["msg"].removeprefix("Input ")
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


def _is_unknown_kind(location: tuple[int | str, ...]) -> bool:
    return location[0] == "kinds" and location[-1] == "[key]"


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
