"""Clients and servers that do whatever they like, over real sockets, with a guard between them and the other side.

Beside each of them a bystander is served. What comes through the guard is compared to what came directly, or to what
was sent. In the end the guard has to be as it was in the beginning.
"""

from __future__ import annotations

import itertools
import select
import socket
import struct
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Final

from pgguard.faults.policy import Mode
from pgguard.proxy.losses import Loss
from pgguard.wire.messages import HEADER_SIZE, LOOK_LIMIT
from tests.fuzz.corpus import conversations, files
from tests.fuzz.mutations import Mutator
from tests.fuzz.script import Do, Step, decode, messages
from tests.guard_process import running_guard
from tests.integration.bare import Bare, connect, words
from tests.proxy.messages import ANSWER, LOGGED_IN, SSL_REQUEST, TERMINATE, cancel_request, message, query, startup
from tests.servers import Address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.guard_process import GuardProcess
    from tests.servers import Server

_AT_ONCE: Final = 4
"""How many are hostile at one time."""
_ROUND: Final = 24
"""How many are hostile until it is looked how the guard is."""
QUIET: Final = 0.25
"""Seconds in which nothing comes where nothing is to come."""
_SECONDS: Final = 20.0
"""How long anything that has to come may take."""
_GROWTH: Final = 24.0
"""Megabytes by which the guard may have grown since its first rounds."""
_WARM: Final = 2
"""Rounds until it has to have come to rest."""
_GIANT: Final = 0x3FFFFFFE
_VARYING: Final = ("large-object", "replication", "notified", "cancelled", "deferred")
"""Recorded conversations in which the server says something else each time."""


@dataclass
class Report:
    """What has come of it."""

    attacks: int = 0
    compared: int = 0
    """Those of which the answers had to be the same."""
    longest: float = 0.0
    """Seconds for which a bystander has waited."""
    grown: float = 0.0
    """Megabytes, since the first rounds."""
    faults: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def close(sock: socket.socket, *, reset: bool) -> None:
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def cut(data: bytes, rng: Random) -> Iterator[bytes]:
    """The same bytes, cut anywhere."""
    marks = sorted({0, len(data), *(rng.randrange(len(data) + 1) for _ in range(rng.choice((0, 1, 3, 10))))})
    for start, stop in itertools.pairwise(marks):
        yield data[start:stop]


# Hostile clients


class _Clients:
    """Attacks of clients, on a guard in front of a real server, each by its number.

    Args:
        seed: Of all that is left to chance.
        directly: The server.
        compares: Whether what is answered through the guard is what the server answers.
    """

    def __init__(self, seed: int, directly: Address, *, compares: bool) -> None:
        self._seed = seed
        self._directly = directly
        self._compares = compares
        self._originals = conversations()
        self._steady = [decode(file.read_bytes()) for file in files() if not any(v in file.name for v in _VARYING)]
        self._start = startup(user="postgres", database="postgres")
        self._attacks: tuple[Callable[[Address, Random], None], ...] = (
            *(self._mutated, self._mutated, self._mutated, self._unread, self._endless, self._dripping),
            *(self._early, self._gone, self._half_closed),
        )

    def attack(self, address: Address, number: int, report: Report) -> None:
        """Do what this number stands for."""
        rng = Random(self._seed << 32 | number)
        if self._compares and rng.random() < 0.4:
            self._compare(address, rng, number, report)
            return
        with suppress(OSError):
            rng.choice(self._attacks)(address, rng)

    def _client_bytes(self, rng: Random, originals: Sequence[list[Step]]) -> bytes:
        steps = Mutator(rng, originals).mutate(rng.choice(originals))
        return b"".join(step.data for step in steps if step.do is Do.CLIENT)

    def _compare(self, address: Address, rng: Random, number: int, report: Report) -> None:
        """All bytes are sent, and it is said that these are all: whatever they are, the answers have to be the same."""
        data = self._client_bytes(rng, self._steady)
        pieces = list(cut(data, rng))
        directly, guarded = (_answers(to, pieces) for to in (self._directly, address))
        report.compared += 1
        shorter, longer = sorted((directly[0], guarded[0]), key=len)
        torn = "reset" in (directly[1], guarded[1])
        if not (longer.startswith(shorter) if torn else longer == shorter):
            report.wrong.append(f"client {number}: {data!r} is answered {directly} directly, and {guarded} guarded")

    def _mutated(self, address: Address, rng: Random) -> None:
        """Mutated messages, cut anywhere, in their own time, and then an end of some kind."""
        data = self._client_bytes(rng, self._originals)
        with connect(address) as sock:
            sock.settimeout(QUIET)
            for piece in cut(data, rng):
                with suppress(TimeoutError):
                    sock.sendall(piece)
                if rng.random() < 0.5 and select.select([sock], [], [], rng.random() * 0.01)[0]:
                    sock.recv(65536)
            close(sock, reset=rng.random() < 0.5)

    def _unread(self, address: Address, rng: Random) -> None:
        """It asks for much, and reads none of it."""
        client = Bare.logged_in(address)
        client.socket.settimeout(QUIET)
        with suppress(TimeoutError):
            client.send(query(f"SELECT repeat('x', {rng.choice((10, 10_000, 1_000_000))})") * rng.choice((1, 50, 2000)))
        time.sleep(rng.random() * 0.1)
        close(client.socket, reset=rng.random() < 0.7)

    def _endless(self, address: Address, rng: Random) -> None:
        """A message that never comes to its end."""
        client = Bare.logged_in(address)
        client.socket.settimeout(QUIET)
        with suppress(TimeoutError):
            client.send(rng.choice((b"Q", b"d", b"B", b"P")) + struct.pack("!I", rng.choice((100_000, _GIANT))))
            for _ in range(rng.randrange(20)):
                client.send(bytes(rng.choice((1, 1000, 40_000))))
        close(client.socket, reset=rng.random() < 0.5)

    def _dripping(self, address: Address, rng: Random) -> None:
        """Byte by byte."""
        with connect(address) as sock:
            for byte in self._start + query("SELECT 1")[: rng.randrange(14)]:
                sock.sendall(bytes([byte]))
                time.sleep(0.001)
            close(sock, reset=rng.random() < 0.5)

    def _early(self, address: Address, rng: Random) -> None:
        """It doesn't wait for its login to be answered."""
        with connect(address) as sock:
            sock.settimeout(QUIET)
            with suppress(TimeoutError):
                sock.sendall(self._start + query("SELECT 1") * rng.choice((1, 3, 3000)) + TERMINATE * rng.randrange(3))
                while sock.recv(65536):
                    pass

    def _gone(self, address: Address, rng: Random) -> None:
        """It has gone as soon as it is there."""
        with connect(address) as sock:
            said = (b"", self._start[:3], self._start, cancel_request(rng.randrange(1 << 31), rng.randbytes(4)))
            sock.sendall(rng.choice(said))
            close(sock, reset=rng.random() < 0.7)

    def _half_closed(self, address: Address, rng: Random) -> None:
        """It says that it has no more to send, and stays."""
        with connect(address) as sock:
            sock.settimeout(2 * QUIET)
            sock.sendall(self._start + query("SELECT pg_sleep(0.1)") * rng.randrange(3))
            sock.shutdown(socket.SHUT_WR)
            with suppress(TimeoutError):
                while sock.recv(65536):
                    pass


def _answers(address: Address, pieces: Sequence[bytes]) -> tuple[bytes, str]:
    """All that is answered, and how it ends; what is different each time is made the same."""
    received = bytearray()
    end = "fin"
    with connect(address) as sock:
        try:
            for piece in pieces:
                sock.sendall(piece)
                while select.select([sock], [], [], 0)[0] and (data := sock.recv(65536)):
                    received += data
            sock.shutdown(socket.SHUT_WR)
            while data := sock.recv(65536):
                received += data
        except (ConnectionResetError, BrokenPipeError):
            end = "reset"
            with suppress(OSError):
                while data := sock.recv(65536):
                    received += data
        except TimeoutError:
            end = "none"
    return b"".join(part if part[:1] != b"K" else b"K" for part in messages(bytes(received))), end


def attack_server(server: Server, seed: int, seconds: float, mode: Mode) -> Report:
    """Have hostile clients attack a guard in front of a real server."""
    clients = _Clients(seed, server.unix, compares=mode is Mode.LOG)
    with running_guard(server.unix, "--mode", mode) as guard:
        addresses = (guard.tcp, guard.unix)

        def attack(number: int, report: Report) -> None:
            clients.attack(addresses[number % 2], number, report)

        return attack_in_rounds(guard, attack, seconds, user="postgres")


# Hostile servers


class _Servers:
    """A server that does to each of its clients what the number in its user's name stands for."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._originals = conversations()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.address = Address("127.0.0.1", self._listener.getsockname()[1])
        self._sent: dict[str, tuple[bytes, str, threading.Event]] = {}
        self._over = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._over.set()
        self._listener.close()

    def sent(self, user: str) -> tuple[bytes, str]:
        """What it has sent to somebody, once that is all, and how it ended: ``fin``, ``reset``, or not: ``none``."""
        deadline = time.monotonic() + _SECONDS
        while user not in self._sent and time.monotonic() < deadline:
            time.sleep(0.005)
        sent, end, _ = self._sent[user]
        return sent, end

    def let_go(self, user: str) -> None:
        """Its client has seen enough."""
        self._sent[user][2].set()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                sock.settimeout(_SECONDS)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, suppress(OSError):
            packet = sock.recv(65536)
            if packet == SSL_REQUEST:
                sock.sendall(b"N")
                packet = sock.recv(65536)
            if packet[4:8] == cancel_request(0, b"")[4:8]:
                return
            fields = packet[8:].split(b"\0")
            user = fields[fields.index(b"user") + 1].decode()
            if user.isdecimal():
                self._misbehave(sock, user)
                return
            sock.sendall(LOGGED_IN)
            while (data := sock.recv(65536)) and data != TERMINATE:
                sock.sendall(ANSWER)

    def _misbehave(self, sock: socket.socket, user: str) -> None:
        rng = Random(self._seed << 32 | int(user))
        sent = bytearray()
        end = rng.choice(("fin", "reset", "none"))
        sock.settimeout(QUIET)
        reads = rng.random() < 0.8
        with suppress(OSError):
            for piece in self._program(rng):
                if reads and rng.random() < 0.5 and select.select([sock], [], [], rng.random() * 0.02)[0]:
                    sock.recv(rng.choice((1, 10, 65536)))
                taken = sock.send(piece)
                sent += piece[:taken]
                if taken < len(piece):
                    break
                if rng.random() < 0.2:
                    time.sleep(rng.random() * 0.01)
        enough = threading.Event()
        if end == "reset":
            close(sock, reset=True)
        elif end == "fin":  # it stays, as what it hasn't read when it closes would make a reset of it
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        self._sent[user] = bytes(sent), end, enough
        enough.wait(_SECONDS)

    def _program(self, rng: Random) -> Iterator[bytes]:
        """What it sends, in pieces."""
        if rng.random() < 0.8:
            yield LOGGED_IN
        if rng.random() < 0.1:
            yield rng.randbytes(rng.randrange(1, 300))
        steps = Mutator(rng, self._originals).mutate(rng.choice(self._originals))
        data = b"".join(step.data for step in steps if step.do is Do.SERVER)
        yield from cut(data, rng)
        if rng.random() < 0.2:
            yield message("D", bytes(2))[:1] + struct.pack("!I", rng.choice((5_000_000, 0x7FFFFFFF)))
            for _ in range(rng.randrange(60)):
                yield bytes(60_000)


def _is_words(data: bytes) -> bool:
    """Whether it is what a guard says when a server has gone without a word."""
    said = words(data)
    return len(said) == 1 and said[0].text.startswith("pgguard: the server at ")


def _suffer(servers: _Servers, address: Address, number: int, report: Report, *, compares: bool) -> None:
    """Be a client of a hostile server, and compare what comes to what was sent."""
    user = str(number)
    rng = Random(number)
    received = bytearray()
    with suppress(OSError), connect(address) as sock:
        sock.sendall(startup(user=user, database="postgres"))
        for _ in range(rng.randrange(4)):
            if select.select([sock], [], [], rng.random() * 0.02)[0]:
                received += sock.recv(65536)
            sock.sendall(query("SELECT 1") * rng.choice((1, 1, 5)))
        sent, end = servers.sent(user)
        sock.settimeout(_SECONDS if compares else QUIET)
        try:
            while len(received) < len(sent) - LOOK_LIMIT or end != "none":
                data = sock.recv(262144)
                if not data:
                    break
                received += data
            sock.settimeout(QUIET)
            while end == "none" and (data := sock.recv(262144)):
                received += data
        except (TimeoutError, ConnectionResetError):
            pass
        servers.let_go(user)
    if not compares:
        return
    sent, end = servers.sent(user)
    report.compared += 1
    got = bytes(received)
    same = next((n for n, (a, b) in enumerate(zip(sent, got, strict=False)) if a != b), min(len(sent), len(got)))
    # Of what a reset overtakes nothing is known, and what may be the beginning of a message waits for the rest.
    lacking = len(sent) - same
    fine = not lacking or end == "reset" or (end == "none" and same == len(got) and lacking < LOOK_LIMIT)
    # The guard's words may begin like what would have come.
    said = any(_is_words(got[begin:]) for begin in range(max(0, same - HEADER_SIZE), same + 1))
    if not fine or (same < len(got) and not said):
        report.wrong.append(
            f"server {number}: of {len(sent)} bytes, {end}, {len(got)} came, and from {same} on it was "
            f"{got[same : same + 100]!r} for {sent[same : same + 100]!r}"
        )


def attack_clients(seed: int, seconds: float, mode: Mode) -> Report:
    """Have a hostile server misuse clients of a guard in front of it."""
    servers = _Servers(seed)
    try:
        with running_guard(servers.address, "--mode", mode) as guard:
            addresses = (guard.tcp, guard.unix)

            def attack(number: int, report: Report) -> None:
                _suffer(servers, addresses[number % 2], number, report, compares=mode is Mode.LOG)

            return attack_in_rounds(guard, attack, seconds, user="bystander")
    finally:
        servers.close()


# What has to hold


def _megabytes(guard: GuardProcess) -> float:
    status = Path(f"/proc/{guard.pid}/status").read_text()
    return int(status.split("VmRSS:", 1)[1].split()[0]) * 1024 / 1_000_000


@contextmanager
def _bystander(address: Address, user: str) -> Iterator[Callable[[], float]]:
    """Somebody with a connection of its own, who asks, and says how long the answer has taken."""
    client = Bare.logged_in(address, user=user)

    def ask() -> float:
        began = time.monotonic()
        client.ask("SELECT 1")
        return time.monotonic() - began

    try:
        yield ask
    finally:
        client.send(TERMINATE)
        client.close()


def attack_in_rounds(
    guard: GuardProcess, attack: Callable[[int, Report], None], seconds: float, *, user: str
) -> Report:
    """Attack for so many seconds, in rounds, with a bystander."""
    report = Report()
    with _bystander(guard.tcp, user) as ask, ThreadPoolExecutor(_AT_ONCE) as pool:
        ask()
        descriptors = guard.descriptors
        began = time.monotonic()
        at_rest = 0.0
        rounds = 0
        while rounds <= _WARM or time.monotonic() - began < seconds:
            futures = [pool.submit(attack, report.attacks + n, report) for n in range(_ROUND)]
            while wait(futures, timeout=0.01).not_done:
                report.longest = max(report.longest, ask())
            for future in futures:
                future.result()
            report.attacks += _ROUND
            rounds += 1
            if rounds == _WARM:
                at_rest = _megabytes(guard)
        _wait_for(lambda: guard.descriptors <= descriptors, report, "descriptors are left")
        report.grown = _megabytes(guard) - at_rest
        report.longest = max(report.longest, ask())
        # Somebody new is served, too.
        with _bystander(guard.unix, user) as ask_too:
            ask_too()
    guard.stop(failures=True)
    if report.grown > _GROWTH:
        report.wrong.append(f"the guard has grown by {report.grown:.0f} MB")
    log = guard.stderr
    report.wrong += [line for line in log.splitlines() if any(loss.value in line for loss in Loss)]
    if "Traceback" in log:
        report.wrong.append(log[log.index("Traceback") :][:4000])
    for fault in guard.faults():
        report.faults[fault["kind"]] += 1 + fault["suppressed"]
    return report


def _wait_for(condition: Callable[[], bool], report: Report, what: str) -> None:
    deadline = time.monotonic() + _SECONDS
    while not condition():
        if time.monotonic() > deadline:
            report.wrong.append(what)
            return
        time.sleep(0.01)
