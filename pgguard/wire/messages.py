"""The message catalogue: every message that carries a type byte, by its name in the documentation.

Sources: "Message Formats" (protocol-message-formats) in the PostgreSQL documentation, ``libpq/protocol.h``, and for
what each side refuses ``SocketBackend()`` in ``postgres.c`` and ``pqParseInput3()`` in ``fe-protocol3.c``.

A message is a type byte, a length word (big-endian, counting itself but not the type byte) and a body. A message
is *judged* when its first :attr:`Message.look` bytes are there; nothing behind them is ever looked at, so that a
DataRow of a gigabyte costs as much as one of a byte.
"""

from __future__ import annotations

from struct import Struct
from types import FunctionType
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    # What is annotated so is a number of the processor's when it is compiled. Uncompiled, nobody looks at annotations.
    from mypy_extensions import i64

HEADER_SIZE: Final = 5
"""Bytes of the type byte and the length word."""

READY_SIZE: Final = HEADER_SIZE + 1
"""Bytes of a ReadyForQuery."""

NAME_LENGTH: Final = 63
"""Bytes of an identifier that PostgreSQL tells from another: NAMEDATALEN - 1."""

TEXT_LIMIT: Final = 1024
"""Bytes of an SQL text that are kept for records."""

_NAME_LIMIT: Final = (
    1 + 64
)  # what it is of, and an identifier of at most NAMEDATALEN - 1 = 63 bytes with its terminator
_NAMES_LIMIT: Final = 128  # two identifiers of at most NAMEDATALEN - 1 = 63 bytes, each with its terminator
_FIELDS_LIMIT: Final = 128  # severity, its non-localized twin and SQLSTATE stand at the front of an ErrorResponse
_PARAMETER_LIMIT: Final = 128  # "application_name" and its value, which is an identifier too

SMALL: Final = 10_000
"""What the server takes for a message that should not be long: ``PQ_SMALL_MESSAGE_LIMIT``, ``libpq/libpq.h``."""
LARGE: Final = 0x3FFFFFFE
"""And for one that may be: ``PQ_LARGE_MESSAGE_LIMIT``, which is ``MaxAllocSize - 1``."""
SHORT: Final = 30_000
"""What libpq takes for most messages: ``pqParseInput3()``."""
LONG: Final = 0x7FFFFFFF
"""And for the types of ``VALID_LONG_MESSAGE_TYPE``."""

_TOKEN: Final = 65_535  # PG_MAX_AUTH_TOKEN_LENGTH, libpq/auth.h
_CANCEL_KEY: Final = 256  # the longest secret of protocol 3.2


def parse_header(chunk: bytes, pos: i64) -> tuple[i64, i64]:
    """The type byte and the length word of the message at a position."""
    code: i64 = chunk[pos]
    length: i64 = chunk[pos + 1]
    length = length << 8 | chunk[pos + 2]
    length = length << 8 | chunk[pos + 3]
    length = length << 8 | chunk[pos + 4]
    return code, length


if isinstance(parse_header, FunctionType):
    # Byte by byte it takes 3 ns compiled, where a Struct takes 70; uncompiled 130, where a Struct takes 45.
    globals()["parse_header"] = Struct("!BI").unpack_from


def find_end(chunk: bytes, start: i64, stop: i64) -> i64:
    """The position of the NUL at which a name ends that begins at one; -1 if there is none in front of ``stop``."""
    last = min(stop, len(chunk))
    for pos in range(start, last):
        if not chunk[pos]:
            return pos
    return -1


def _find_end(chunk: bytes, start: int, stop: int) -> int:
    return chunk.find(0, start, stop)


if isinstance(find_end, FunctionType):
    # Names are short, and it takes longer to call bytes.find() than to look at each byte; uncompiled a quarter as long.
    globals()["find_end"] = _find_end


def part(chunk: bytes, start: int, stop: int) -> bytes:
    """``chunk[start:stop]``: of positions that are i64, mypyc makes a slice object first."""
    return chunk[start:stop] if start < stop else b""  # compiled, one that ends in front of its beginning raises


class Message(NamedTuple):
    """One type of message in one direction."""

    type: str
    name: str
    least: int
    """The smallest length word that the message can have."""
    most: int
    """The largest that its receiver takes."""
    look: int = HEADER_SIZE
    """How many of its bytes, type byte included, are looked at."""


FRONTEND: Final = (
    Message("B", "Bind", 12, LARGE, HEADER_SIZE + _NAMES_LIMIT),
    Message("C", "Close", 6, SMALL, HEADER_SIZE + _NAME_LIMIT),
    Message("d", "CopyData", 4, LARGE),
    Message("c", "CopyDone", 4, SMALL),
    Message("f", "CopyFail", 5, SMALL),
    Message("D", "Describe", 6, SMALL, HEADER_SIZE + _NAME_LIMIT),
    Message("E", "Execute", 9, SMALL),
    Message("H", "Flush", 4, 4),
    Message("F", "FunctionCall", 14, LARGE),
    Message("P", "Parse", 8, LARGE, HEADER_SIZE + _NAMES_LIMIT + TEXT_LIMIT),
    Message("p", "PasswordMessage", 4, _TOKEN),  # SASLInitialResponse, SASLResponse and GSSResponse too
    Message("Q", "Query", 5, LARGE, HEADER_SIZE + TEXT_LIMIT),
    Message("S", "Sync", 4, 4),
    Message("X", "Terminate", 4, SMALL),
)

BACKEND: Final = (
    Message("R", "Authentication", 8, _TOKEN),
    Message("K", "BackendKeyData", 12, 8 + _CANCEL_KEY, 9 + _CANCEL_KEY),
    Message("2", "BindComplete", 4, 4),
    Message("3", "CloseComplete", 4, 4),
    Message("C", "CommandComplete", 5, SHORT),
    Message("d", "CopyData", 4, LONG),
    Message("c", "CopyDone", 4, 4),
    Message("G", "CopyInResponse", 7, SHORT),
    Message("H", "CopyOutResponse", 7, SHORT),
    Message("W", "CopyBothResponse", 7, SHORT),
    Message("D", "DataRow", 6, LONG),
    Message("I", "EmptyQueryResponse", 4, 4),
    Message("E", "ErrorResponse", 5, LONG, HEADER_SIZE + _FIELDS_LIMIT),
    Message("V", "FunctionCallResponse", 8, LONG),
    Message("v", "NegotiateProtocolVersion", 12, SHORT),
    Message("n", "NoData", 4, 4),
    Message("N", "NoticeResponse", 5, LONG),
    Message("A", "NotificationResponse", 10, LONG),
    # Two bytes a parameter type and 65,535 parameters at most, which is more than libpq's limit for short messages.
    Message("t", "ParameterDescription", 6, 4 + 2 + 4 * 65_535),
    Message("S", "ParameterStatus", 6, SHORT, HEADER_SIZE + _PARAMETER_LIMIT),
    Message("1", "ParseComplete", 4, 4),
    Message("s", "PortalSuspended", 4, 4),
    Message("Z", "ReadyForQuery", 5, 5, 6),
    Message("T", "RowDescription", 6, LONG),
)

LOOK_LIMIT: Final = max(message.look for message in FRONTEND + BACKEND)
"""The most bytes of a message that are ever held back before it is judged."""


UNKNOWN: Final = Message("", "a message of unknown type", 1, 0)
"""Stands for all other types; no length word fits it."""


def by_code(catalogue: tuple[Message, ...]) -> list[Message]:
    """Index a catalogue by type byte, 0 to 255."""
    index = [UNKNOWN] * 256
    for message in catalogue:
        index[ord(message.type)] = message
    return index
