"""The message catalogue against PostgreSQL's: names, lengths, and how little of a message is ever looked at."""

from __future__ import annotations

import pytest

from pgguard.wire.messages import (
    BACKEND,
    FRONTEND,
    HEADER_SIZE,
    LOOK_LIMIT,
    SHORT,
    SMALL,
    UNKNOWN,
    Message,
    by_code,
    parse_header,
)
from tests.session import protocol

BY_NAME = {("F", message.type): message for message in FRONTEND} | {("B", message.type): message for message in BACKEND}


@pytest.mark.parametrize("catalogue", [FRONTEND, BACKEND], ids=["frontend", "backend"])
def test_types_and_names_are_unique(catalogue: tuple[Message, ...]) -> None:
    assert (
        len({message.type for message in catalogue}) == len({message.name for message in catalogue}) == len(catalogue)
    )


def test_every_type_of_the_protocol_is_there() -> None:
    """``libpq/protocol.h``, less the letters that share a type byte in the other direction."""
    assert "".join(sorted(message.type for message in FRONTEND)) == "BCDEFHPQSXcdfp"
    assert "".join(sorted(message.type for message in BACKEND)) == "123ACDEGHIKNRSTVWZcdnstv"


@pytest.mark.parametrize(
    ("message", "sample"),
    [(BY_NAME["F", letter], sample) for letter, sample in protocol.FRONTEND.items()]
    + [(BY_NAME["B", letter], sample) for letter, sample in protocol.BACKEND.items()],
    ids=lambda value: value.name if isinstance(value, Message) else "",
)
def test_well_formed_messages_have_a_length_that_fits(message: Message, sample: bytes) -> None:
    code, length = parse_header(sample, 0)
    assert chr(code) == message.type
    assert length == len(sample) - 1
    assert message.least <= length <= message.most


@pytest.mark.parametrize("message", [*FRONTEND, *BACKEND], ids=lambda message: message.name)
def test_limits_make_sense(message: Message) -> None:
    assert HEADER_SIZE - 1 <= message.least <= message.most <= 0x7FFFFFFF
    assert HEADER_SIZE <= message.look <= LOOK_LIMIT


def test_servers_limits_are_never_undercut() -> None:
    """A message that PostgreSQL would take must not be refused; those of a fixed length are judged by that."""
    for message in FRONTEND:
        assert message.most >= SMALL or message.least == message.most


@pytest.mark.parametrize("letter", "DdTENAV")
def test_long_messages_of_libpq(letter: str) -> None:
    """``VALID_LONG_MESSAGE_TYPE`` in ``fe-protocol3.c``."""
    assert BY_NAME["B", letter].most > SHORT


def test_parameters_in_the_greatest_number() -> None:
    assert BY_NAME["B", "t"].most >= 4 + 2 + 4 * 65535


def test_copied_and_row_data_are_not_looked_at() -> None:
    for direction, letter in (("B", "D"), ("B", "d"), ("F", "d"), ("B", "T"), ("F", "p"), ("B", "R")):
        assert BY_NAME[direction, letter].look == HEADER_SIZE


def test_index_has_all_types_and_no_others() -> None:
    index = by_code(BACKEND)
    assert len(index) == 256
    assert [message for message in index if message is not UNKNOWN] == sorted(BACKEND, key=lambda message: message.type)
    assert not any(UNKNOWN.least <= length <= UNKNOWN.most for length in (0, 1, 4, 5, 0xFFFFFFFF))


def test_header_is_read_where_it_stands() -> None:
    assert parse_header(b"??Z\xff\0\0\5", 2) == (ord("Z"), 0xFF000005)
