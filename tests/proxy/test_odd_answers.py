"""What a guard asks the server on its own account may be answered by anything: nobody is harmed, and nobody blamed."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

import pytest
import trio

from tests.proxy.conftest import running
from tests.proxy.fake_backend import MARK, BackendConnection, converse
from tests.proxy.messages import SECONDS, SSL_REQUEST, cancel_request

if TYPE_CHECKING:
    from tests.proxy.conftest import House
    from tests.proxy.fake_backend import FakeBackend
    from tests.proxy.messages import Client

_OLD: Final = b"EFATAL:  sorry, too many clients already\n\0"
"""As servers refuse in protocol 2's form, before any protocol has been agreed on."""
_TLS_ALERT: Final = b"\x15\x03\x03\0\x02\x02\x28"
_HTTP: Final = b"HTTP/1.1 400 Bad Request\r\n\r\n"
_UNSUPPORTED: Final = "unsupported frontend protocol 1234.5679: server supports 3.0 to 3.2"

_ANSWERS: Final = {
    "old error": _OLD,
    "encryption": b"S",
    "encryption by GSS": b"G",
    "no such byte": b"?",
    "a TLS alert": _TLS_ALERT,
    "HTTP": _HTTP,
    "nothing, and the end": b"",
    "a reset": None,
}
"""What is said, after which the connection ends; ``None``: it is reset."""


async def _answer(server: BackendConnection, said: bytes | None) -> None:
    if said is None:
        await server.reset()
        return
    with suppress(trio.BrokenResourceError):
        await server.send(said)
    await server.close()


async def _decline_twice(house: House) -> Client:
    """A client that is told that there is no TLS, and asks again: the server says what is to be said to that."""
    client = await house.connect()
    await client.send(SSL_REQUEST)
    await client.expect(b"N")
    await client.send(SSL_REQUEST)
    return client


async def _goes_on(house: House) -> None:
    await house.recorded("protocol-violation")
    assert house.faults[0].reason == "the client sent SSLRequest a second time"
    await converse(*await house.session())


@pytest.mark.parametrize("answer", _ANSWERS)
async def test_an_odd_answer_to_an_sslrequest_is_the_guards_to_make_good(house: House, answer: str) -> None:
    client = await _decline_twice(house)
    server = await house.backend.accept()
    assert await server.packet() == SSL_REQUEST
    await _answer(server, _ANSWERS[answer])
    assert (await client.message()).fields["M"] == _UNSUPPORTED
    assert await client.rest() == b""
    await _goes_on(house)


@pytest.mark.parametrize("answer", _ANSWERS)
async def test_what_comes_behind_no_is_the_servers_word_unless_it_offers_encryption(house: House, answer: str) -> None:
    client = await _decline_twice(house)
    server = await house.backend.accept()
    assert await server.packet() == SSL_REQUEST
    said = _ANSWERS[answer]
    await server.send(b"N" + (said or b""))
    assert await server.packet() == SSL_REQUEST
    await (server.reset() if said is None else server.close())
    if said is None or answer.startswith("encryption"):
        assert (await client.message()).fields["M"] == _UNSUPPORTED
        said = b""
    assert await client.rest() == said
    await _goes_on(house)


@pytest.mark.parametrize("begins", [b"", b"N"])
async def test_a_server_that_says_nothing_to_an_sslrequest_is_not_waited_for(
    house: House, begins: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgguard.proxy.upstream._REFUSAL_TIMEOUT", 0.2)
    client = await _decline_twice(house)
    server = await house.backend.accept()
    await server.send(begins)
    assert (await client.message()).fields["M"] == _UNSUPPORTED
    assert await client.rest() == b""
    await server.rest()
    await _goes_on(house)


async def test_a_server_that_never_ends_what_it_says_to_an_sslrequest_is_cut_short(house: House) -> None:
    client = await _decline_twice(house)
    server = await house.backend.accept()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def talk() -> None:
            with suppress(trio.BrokenResourceError):
                while True:
                    await server.stream.send_all(b"N" * 65536)

        assert 0 < len(await client.rest()) < 100_000
    await _goes_on(house)


@pytest.mark.parametrize("answer", [*_ANSWERS, "silence", "no end"])
async def test_an_odd_answer_to_the_mark_is_no_loop(
    backend: FakeBackend, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgguard.proxy.loops._SECONDS", 0.3)
    async with running(backend) as house, trio.open_nursery() as nursery:

        @nursery.start_soon
        async def talk() -> None:
            sock, _ = await backend._socket.accept()
            server = BackendConnection(trio.SocketStream(sock))
            backend.keep(server)
            assert (await server.packet()).startswith(MARK)
            if answer == "silence":
                await server.rest()
            elif answer == "no end":
                with suppress(trio.BrokenResourceError):
                    while True:
                        await server.stream.send_all(b"E" * 65536)
            else:
                await _answer(server, _ANSWERS[answer])

        with trio.fail_after(SECONDS):
            assert await house.guard.find_loop() is None
        await converse(*await house.session())
        assert house.faults == []


@pytest.mark.parametrize("answer", [answer for answer, said in _ANSWERS.items() if said])
async def test_an_odd_answer_to_a_clients_cancel_request_is_for_nobody(house: House, answer: str) -> None:
    """A server says nothing to it, and clients expect nothing but the end."""
    client = await house.connect()
    await client.send(cancel_request(1, b"key!"))
    server = await house.backend.accept()
    assert await server.packet() == cancel_request(1, b"key!")
    await _answer(server, _ANSWERS[answer])
    assert await client.rest() == b""
    await converse(*await house.session())
    assert house.faults == []
