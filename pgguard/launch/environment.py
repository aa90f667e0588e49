"""The environment of a command that is to reach its PostgreSQL through a guard.

Every variable is rewritten whose value leads to the guard's server, whatever it is called, and no other. Of a value
only what says where the server is changes, and what can't hold on the way to the guard: see
:mod:`pgguard.launch.fields`. What is rewritten:

- URLs, connection strings and JSON objects that lead there, anywhere in a value: :mod:`pgguard.launch.values`. One with
  several servers is left alone if one of them is another's.
- ``PGHOST`` and ``PGPORT`` if libpq's defaults lead there, set or not. ``PGHOSTADDR`` is taken away.
  A URL that says no more than that is left as it is if they name a Unix socket: there is no form of URL for one that
  all drivers know (Active Record takes none from a parameter, and Go none from the place of the host).
- A host and its port in two variables, such as ``DB_HOST`` and ``DB_PORT``: :mod:`pgguard.launch.pairs`. A host alone,
  whose name speaks of a database, if the guard has the server's port.
- Services: in a copy of the service file, which ``PGSERVICEFILE`` then names. libpq takes a service's host before
  ``PGHOST``.
- libpq's defaults that demand TLS (``PGSSLMODE`` and its like), and the password file if it knows the server by its
  address.

If nothing at all leads to the server, and none of libpq's variables says where another one is, ``PGHOST`` and
``PGPORT`` are set, for programs that have no address but libpq's defaults. No other variable is made up.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from pgguard.faults.text import listed, nearest, printable
from pgguard.launch.connection import edited
from pgguard.launch.fields import Field, Style, holding, led, pinned
from pgguard.launch.files import LINE, Login, Services, led_passwords, password_file, passwords
from pgguard.launch.pairs import is_bare, is_host, is_port, led_pair, pairs, port_name, without_tls
from pgguard.launch.places import Resolver, Server
from pgguard.launch.values import connections
from pgguard.proxy.addresses import DEFAULT_PORT, Address, TcpAddress, UnixAddress, addresses_of
from pgguard.proxy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pgguard.launch.connection import Connection, Edit
    from pgguard.proxy.addresses import Upstream

_LIBPQ: Final = {"host": "PGHOST", "hostaddr": "PGHOSTADDR", "port": "PGPORT"}
_SERVICE: Final = "PGSERVICE"
_SERVICE_FILE: Final = "PGSERVICEFILE"
_PASSWORD_FILE: Final = "PGPASSFILE"  # noqa: S105 - a variable's name
_PLACES: Final = frozenset(_LIBPQ.values())
_APART: Final = frozenset({*_PLACES, _SERVICE, _SERVICE_FILE, _PASSWORD_FILE, "PGPASSWORD"})
"""Variables that aren't read like any other."""
_DEFAULTS: Final = {
    "PGSSLMODE": "sslmode",
    "PGREQUIRESSL": "requiressl",
    "PGSSLNEGOTIATION": "sslnegotiation",
    "PGSSLCERTMODE": "sslcertmode",
    "PGCHANNELBINDING": "channel_binding",
    "PGGSSENCMODE": "gssencmode",
    "PGREQUIREPEER": "requirepeer",
}
"""What is to hold for every connection that doesn't say otherwise, by libpq's name for it: "Environment Variables"."""
_ROOT: Final = "PGSSLROOTCERT"
_STYLE: Final = Style("", str, {})
_ANY_ADDRESS: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared
"""Where a client finds a listener that takes connections on all addresses."""
_SOUNDS_LIKE_IT: Final = re.compile(r"pg|postgres|(?<![A-Za-z])db|database", re.IGNORECASE)
"""What makes it worth a word that a host's variable is left alone."""
_FORMS: Final = (
    "a PostgreSQL URL, a connection string (host=HOST port=PORT, Host=HOST;Port=PORT), HOST:PORT, or a host whose port "
    "is in a variable beside it"
)


class Rewritten(NamedTuple):
    """An environment, and what has been done to it."""

    environment: dict[str, str]
    names: tuple[str, ...]
    """The variables that differ: rewritten, set or taken away; sorted."""
    line: str
    """What has been done, in one line without its stop; no value of a variable is in it."""
    remarks: tuple[str, ...]
    """What leads to the server and had to be left alone, or affects others: sentences without their stop."""
    files: Mapping[Path, bytes]
    """Files that the variables name, and that are still to be written: :func:`write_files`."""


def rewrite(
    environment: Mapping[str, str],
    upstream: Upstream,
    guard: Sequence[Address],
    *,
    directory: Path,
    add: Sequence[str] = (),
    keep: Sequence[str] = (),
    resolve: Callable[[str], frozenset[str]] | None = None,
) -> Rewritten:
    """Make the environment for a command whose connections to the server are to go through the guard.

    Waits for two seconds at most if a name has to be resolved, reads libpq's service and password file, and does
    nothing else but compute.

    Args:
        environment: What the command would have without a guard.
        upstream: The server.
        guard: Where the guard listens, with the ports that it has. A value that leads to a Unix socket is led to one,
            and any other to TCP, as far as the guard has both.
        directory: Where the files are going to be.
        add: Variables that are rewritten even if they don't lead to the server, as far as is known.
        keep: Variables that are left as they are.
        resolve: Gives the addresses of a name; by default the system is asked.

    Raises:
        ConfigurationError: A variable that is to be rewritten can't be; the message holds no value.
    """
    work = _Work(environment, upstream, guard, directory, frozenset(add), frozenset(keep), resolve or Resolver())
    work.check()
    for name, value in environment.items():
        if name not in _APART:
            work.value(name, value)
    work.pairs()
    work.hosts()
    work.libpq()
    work.services()
    work.pin()
    work.defaults()
    work.passwords()
    return work.result()


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write files that nobody but their user can read, in a directory that is there; raises OSError."""
    for path, content in files.items():
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:  # noqa: PTH123
            file.write(content)


def named_servers(environment: Mapping[str, str]) -> list[tuple[str, tuple[Address, ...]]]:
    """The variables that say where a PostgreSQL is, each with that: for whoever doesn't know which is meant."""
    libpq = _Defaults(environment)
    return [
        (name, addresses)
        for name, value in environment.items()
        if name not in _APART
        for connection in connections(value, name)
        if connection.what != "HOST:PORT" and (addresses := libpq.addresses(connection))
    ]


class _Defaults:
    """What libpq fills in where a connection doesn't say it: a service's settings, and its variables.

    Args:
        environment: The variables.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._variables = {key: environment[name] for key, name in _LIBPQ.items() if environment.get(name)}
        self._service = environment.get(_SERVICE)
        self.services = Services(environment)

    def addresses(self, connection: Connection) -> tuple[Address, ...]:
        """Where a connection leads, in order; nowhere if that can't be known."""
        return _addresses(self.settled(connection.said, own=connection.own_defaults))

    def settled(self, said: Mapping[str, str], *, own: bool = False, own_service: bool = True) -> dict[str, str] | None:
        """Settings with what isn't said filled in; ``None`` if a service is said that there isn't.

        Args:
            said: What a connection says.
            own: Its driver has defaults of its own, and only knows services.
            own_service: The service that the variables name is one that is filled in.
        """
        name = said.get("service") or ("" if own or not own_service else self._service)
        service = self.services.settings(name) if name else {}
        if service is None:
            return None
        behind = {"host": "localhost", "port": "5432"} if own else self._variables
        return {**behind, **service, **said}

    def by_variables(self) -> dict[str, str]:
        """What the variables alone say."""
        return dict(self._variables)


def _addresses(settings: Mapping[str, str] | None) -> tuple[Address, ...]:
    if settings is None:
        return ()
    try:
        return tuple(addresses_of(settings, may_be_shown=False))
    except ConfigurationError:
        return ()


def _logins(settings: Mapping[str, str]) -> set[Login]:
    """By what a password file knows the servers that settings name."""
    hosts = (settings.get("host") or settings.get("hostaddr") or "").split(",")
    ports = (settings.get("port") or "").split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    return {Login(host, port or str(DEFAULT_PORT)) for host, port in zip(hosts, ports, strict=False)}


def _reachable(address: Address) -> Address:
    """Where a client on this host finds a listener."""
    if isinstance(address, TcpAddress) and address.host in _ANY_ADDRESS:
        return TcpAddress(_ANY_ADDRESS[address.host], address.port)
    return address


class _Work:
    """An environment that is being rewritten; arguments as of :func:`rewrite`."""

    def __init__(
        self,
        environment: Mapping[str, str],
        upstream: Upstream,
        guard: Sequence[Address],
        directory: Path,
        add: frozenset[str],
        keep: frozenset[str],
        resolve: Callable[[str], frozenset[str]],
    ) -> None:
        self._before = environment
        self._now = dict(environment)
        self._upstream = upstream
        self._server = Server(upstream, resolve)
        self._guard = [_reachable(address) for address in guard]
        self._directory = directory
        self._add = add
        self._keep = keep
        self._libpq = _Defaults(environment)
        self._used: dict[Address, set[Login]] = {}
        """The guard's addresses that something leads to now, and by what a password file knows where it led before."""
        self._found = False
        """Something led to the server, whether or not it was to be kept."""
        self._others: list[str] = []
        """Variables that lead to other PostgreSQL servers."""
        self._edits: dict[str, list[Edit]] = {}
        """What changes in which variable's value."""
        self._left: list[tuple[str, Connection, tuple[Address, ...]]] = []
        """What leads elsewhere: in which variable, and to where."""
        self._pinned: list[str] = []
        """Variables in which that has to be said in full."""
        self._remarks: list[str] = []
        self._files: dict[Path, bytes] = {}
        self._is_made_up = False

    def check(self) -> None:
        """Refuse what can't be done."""
        for option, names in (("--env", self._add), ("--keep-env", self._keep)):
            for name in sorted(names):
                if "=" in name or not name:
                    plain = name.partition("=")[0]
                    raise ConfigurationError(f"{option} {plain}: give the name of a variable alone, without a value")
        for name in sorted(self._add & self._keep):
            raise ConfigurationError(f"--env {name} and --keep-env {name} contradict each other: leave one of them out")
        for name in sorted(self._add - self._before.keys() - {"PGHOST", "PGPORT"}):
            close = nearest(name, self._before)
            raise ConfigurationError(
                f"--env {name}: {name} is not set: "
                + (f"did you mean {close}?" if close else "set it as for a run without pgguard, which then rewrites it")
            )

    def _add_file(self, variable: str, name: str, content: str) -> None:
        path = self._directory / name
        self._files[path] = os.fsencode(content)
        self._now[variable] = str(path)

    def _to(
        self, addresses: Sequence[Address], said: Mapping[str, str] | None, *, tcp_only: bool = False
    ) -> Address | None:
        """Where to lead what led to these addresses; ``None`` if the guard has no such address."""
        kind = UnixAddress if addresses and isinstance(addresses[0], UnixAddress) and not tcp_only else TcpAddress
        alike = [address for address in self._guard if isinstance(address, kind)]
        to = next(iter(alike or ([] if tcp_only else self._guard)), None)
        if to is not None:
            self._used.setdefault(to, set()).update(_logins(said or {}))
        return to

    def _also(self, said: Mapping[str, str] | None, to: Address) -> dict[str, str]:
        """Other settings of a connection that change as it is led to an address: its own password file."""
        own = None if said is None else said.get("passfile")
        content = None if said is None or own is None else led_passwords(passwords(own), _logins(said), to)
        if content is None:
            return {}
        written = os.fsencode(content)
        new = self._directory / f"pgpass-{len(self._files)}"
        path = next((path for path, other in self._files.items() if other == written), new)
        self._files[path] = written
        return {"passfile": str(path)}

    def value(self, name: str, value: str) -> None:
        """A variable by its value."""
        forced = name in self._add
        for connection in connections(value, name, sure=forced):
            addresses = self._libpq.addresses(connection)
            leads = self._server.is_at(addresses)
            if name in self._keep:
                self._found = self._found or leads
            elif leads or forced:
                self._lead(name, connection, addresses)
            else:
                self._leave(name, connection, addresses)

    def _lead(self, name: str, connection: Connection, addresses: Sequence[Address]) -> None:
        said = self._libpq.settled(connection.said, own=connection.own_defaults)
        to = self._to(addresses, said, tcp_only=connection.tcp_only)
        if to is not None:
            self._found = True
            follows = connection.follows_libpq and isinstance(to, UnixAddress) and not self._keep & _PLACES
            if name in self._add or not follows:
                self._edits.setdefault(name, []).extend(connection.lead(to, self._also(said, to)))
            if connection.what == "HOST:PORT" and (port := port_name(name)) is not None:
                self._change(without_tls(self._before, port))
            return
        problem = f"{name} is a {connection.what}, which can't lead to a Unix socket: add --listen 127.0.0.1:0"
        if name in self._add:
            raise ConfigurationError(f"--env {name}: {problem}")
        self._remarks.append(problem)

    def _leave(self, name: str, connection: Connection, addresses: tuple[Address, ...]) -> None:
        self._left.append((name, connection, addresses))
        own = [address for address in addresses if self._server.has(address)]
        if own and len(own) < len(addresses):
            self._remarks.append(
                f"{name} isn't led to the guard: it names other servers besides {self._upstream}; add --env {name} to "
                "lead it to the guard all the same"
            )
        elif any(self._server.may_be_at(address) for address in addresses):
            self._remarks.append(
                f"{name} isn't led to the guard: it leads to {', '.join(map(str, addresses))}, and it isn't known "
                f"whether that is the server at {self._upstream}; add --env {name} if it is"
            )
        elif addresses and connection.what != "HOST:PORT":
            self._others.append(name)

    def pairs(self) -> None:
        """Hosts and ports in two variables."""
        for pair in pairs(self._before):
            if {pair.host, pair.port} & (self._keep | _APART):
                continue
            said = {"host": self._before[pair.host].strip("[]"), "port": self._before[pair.port]}
            addresses = _addresses(said)
            forced = bool({pair.host, pair.port} & self._add)
            if self._server.is_at(addresses) and is_bare(pair) and not forced:
                self._remarks.append(
                    f"{pair.host} and {pair.port} aren't led to the guard, as a program may listen there itself: add "
                    f"--env {pair.host} if it connects there"
                )
            elif self._server.is_at(addresses) or forced:
                to = self._to(addresses, said)
                if to is not None:
                    self._change(led_pair(self._before, pair, to))
                    self._found = True

    def _change(self, values: Mapping[str, str]) -> None:
        """Give variables other values, but for those that are to be kept."""
        self._now |= {name: value for name, value in values.items() if name not in self._keep}

    def hosts(self) -> None:
        """Hosts and ports alone: what is to be rewritten all the same, and what can be as the port is the server's."""
        for name in sorted(self._add - _PLACES - {_SERVICE} - self._edits.keys()):
            if self._now[name] == self._before[name]:
                self._force(name, self._before[name])
        for name, value in self._before.items():
            port = port_name(name)
            if port is None or name in self._add | self._keep | _APART or not _SOUNDS_LIKE_IT.search(name):
                continue
            if not is_port(self._before.get(port, "")) and is_host(value):
                there = self._server.on(value.strip("[]"))
                if there is not None:
                    self._lead_alone(name, port, value, there)

    def _lead_alone(self, name: str, port: str, value: str, there: Address) -> None:
        """A variable that names a host of the server without its port, which the application knows then."""
        to = next((one for one in self._guard if type(one) is type(there) and one.port == there.port), None)
        if to is not None:
            self._used.setdefault(to, set()).add(Login(value.strip("[]"), str(there.port)))
            self._now[name] = to.directory if isinstance(to, UnixAddress) else to.host
            self._found = True
            return
        keeping = f", or --listen 127.0.0.2:{there.port} to keep the port" if isinstance(there, TcpAddress) else ""
        self._remarks.append(
            f"{name} isn't led to the guard: it names the server, but {port}, which would name its port, is not set; "
            f"add --env {name} to set both, if the application reads {port}{keeping}"
        )

    def _force(self, name: str, value: str) -> None:
        to = self._to((), None)
        port = port_name(name)
        others = [other for other in self._add if other != name and is_port(self._before.get(other, ""))]
        if to is not None and is_port(value):
            self._now[name] = str(to.port)
        elif to is not None and is_host(value) and (port is not None or others):
            self._now[name] = to.directory if isinstance(to, UnixAddress) else to.host
            if not others and port is not None:
                self._now[port] = str(to.port)
        elif is_host(value):
            raise ConfigurationError(
                f"--env {name}: it holds a host, but it isn't known which variable holds its port: add --env for that "
                "one too"
            )
        else:
            raise ConfigurationError(f"--env {name}: its value is not understood: it may be {_FORMS}")
        self._found = True

    def libpq(self) -> None:
        """Where libpq's variables and defaults lead."""
        if self._keep & _PLACES:
            return
        said = self._libpq.by_variables()
        addresses = _addresses(said)
        leads = self._server.is_at(addresses) or bool(self._add & _PLACES)
        is_set = bool(said) or bool(self._before.get(_SERVICE))
        if is_set and self._server.is_at(_addresses(self._libpq.settled({}))):
            self._found = True
        if leads or not (self._found or is_set):
            to = self._to(addresses, said)
            if to is not None:
                self._now["PGHOST"] = to.directory if isinstance(to, UnixAddress) else to.host
                self._now["PGPORT"] = str(to.port)
                self._now.pop("PGHOSTADDR", None)
                self._is_made_up = not leads
        elif said:
            named = [name for name in _LIBPQ.values() if self._before.get(name)]
            self._others += named
            if not self._found:
                self._remarks.append(
                    f"{listed(named)} {'leads' if len(named) == 1 else 'lead'} to another server than "
                    f"{self._upstream}: add --env PGHOST to have programs that use libpq's variables reach the guard"
                )

    def services(self) -> None:
        """Services, if anything in the environment speaks of them."""
        values = self._before.values()
        asked = {_SERVICE, _SERVICE_FILE} & self._before.keys() or any("service=" in value for value in values)
        if not asked or _SERVICE_FILE in self._keep:
            return
        now = _Defaults(self._now)

        def change(name: str, settings: Mapping[str, str]) -> Callable[[list[Field]], list[Field]] | None:
            is_named = name == self._before.get(_SERVICE)
            if is_named and _SERVICE in self._keep:
                return None
            said = self._libpq.settled(settings, own_service=False) or {}
            addresses = _addresses(said)
            to = None
            if self._server.is_at(addresses) or (is_named and _SERVICE in self._add):
                to = self._to(addresses, said)
            if to is not None:
                return partial(led, style=LINE, to=to, also=self._also(said, to))
            if addresses == _addresses(now.settled(settings, own_service=False)):
                return None
            return partial(pinned, style=LINE, addresses=addresses, said=settings.keys() & said.keys())

        content = self._libpq.services.changed(change)
        if content is not None:
            self._add_file(_SERVICE_FILE, "pg_service.conf", content)

    def pin(self) -> None:
        """Have what leads elsewhere do so still, though libpq's variables that it relied on have changed."""
        now = _Defaults(self._now)
        for name, connection, addresses in self._left:
            if now.addresses(connection) != addresses:
                self._edits.setdefault(name, []).extend(connection.pin(addresses))
                self._pinned.append(name)
        for name, edits in self._edits.items():
            self._now[name] = edited(self._before[name], edits)

    def defaults(self) -> None:
        """What libpq's variables demand of every connection, if any leads to the guard now."""
        if not self._used:
            return
        to = next((address for address in self._used if isinstance(address, UnixAddress)), next(iter(self._used)))
        for variable, key in _DEFAULTS.items():
            value = self._before.get(variable)
            if value is None or variable in self._keep:
                continue
            field = holding(Field("", f"{variable}=", value, key, value), _STYLE, to)
            self._set(variable, None if field is None else field.value)
        root = self._before.get(_ROOT)
        if root is not None and _ROOT not in self._keep and (root == "system" or not self._others):
            self._set(_ROOT, None)
        if self._others and self._now.get("PGSSLMODE") != self._before.get("PGSSLMODE"):
            self._remarks.append(
                f"PGSSLMODE is disable for the command, and so for {listed(list(dict.fromkeys(self._others)))}, which "
                "leads to another server, too, unless it has an sslmode of its own"
            )

    def _set(self, name: str, value: str | None) -> None:
        if value is None:
            self._now.pop(name, None)
        else:
            self._now[name] = value

    def passwords(self) -> None:
        """The password file, if it knows the server by its address."""
        if _PASSWORD_FILE in self._keep or not self._used:
            return
        before = content = passwords(password_file(self._before))
        for to, logins in self._used.items():
            content = led_passwords(content, logins, to) or content
        if content != before:
            self._add_file(_PASSWORD_FILE, "pgpass", content)

    def result(self) -> Rewritten:
        """What has come of it."""
        names = sorted(name for name in {*self._before, *self._now} if self._before.get(name) != self._now.get(name))
        return Rewritten(
            self._now,
            tuple(names),
            printable(self._line(names)),
            tuple(map(printable, dict.fromkeys(self._remarks))),
            self._files,
        )

    def _line(self, names: Sequence[str]) -> str:
        if not names:
            return "no variable of the command is rewritten"
        written = [name for name in names if name in self._now and name not in self._pinned]
        removed = [name for name in names if name not in self._now]
        said = [f"rewritten for the command: {', '.join(written)}"] if written else []
        said += [f"removed: {', '.join(removed)}"] if removed else []
        if self._pinned:
            pinned_names = ", ".join(dict.fromkeys(self._pinned))
            said.append(f"made to lead where it did, although PGPORT has changed: {pinned_names}")
        if self._is_made_up:
            said.insert(0, f"nothing in the environment leads to {self._upstream}, so libpq's defaults are set")
        return "; ".join(said)
