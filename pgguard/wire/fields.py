"""The bodies of ErrorResponse and ParameterStatus, read and, where needed, built.

Source: "Error and Notice Message Fields" (protocol-error-fields) and "Message Formats" in the PostgreSQL documentation.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Final, NamedTuple

_INT32: Final = Struct("!I")


class Severity(NamedTuple):
    """How bad an ErrorResponse is."""

    severity: str
    """``ERROR``, ``FATAL`` or ``PANIC``, never localized; empty when the message has none."""
    sqlstate: str

    @property
    def ends_session(self) -> bool:
        """Whether the server closes the connection behind this message."""
        return self.severity in {"FATAL", "PANIC"}


def _fields(body: bytes | bytearray) -> Iterator[tuple[str, str]]:
    for field in body.split(b"\0"):
        if not field:
            return
        yield chr(field[0]), field[1:].decode("utf-8", "replace")


def parse_fields(body: bytes | bytearray) -> dict[str, str]:
    """Read an ErrorResponse's fields by their codes; the last may be cut where the body is."""
    return dict(_fields(body))


def parse_severity(body: bytes | bytearray) -> Severity:
    """Read severity and SQLSTATE from an ErrorResponse's body, of which the beginning is enough.

    Field ``V`` is the severity in English since PostgreSQL 9.6; before that, and from servers that imitate it, only
    the possibly localized ``S`` is there.
    """
    fields = parse_fields(body)
    return Severity(fields.get("V") or fields.get("S", ""), fields.get("C", ""))


def build_error_response(
    message: str,
    *,
    sqlstate: str,
    severity: str = "FATAL",
    detail: str | None = None,
    hint: str | None = None,
) -> bytes:
    """Build an ErrorResponse message, type byte and length word included.

    Texts are encoded as UTF-8: the client's encoding is the server's affair, and its errors before authentication
    are sent unconverted as well. What UTF-8 can't express, and NUL, which ends a field, is replaced.
    """
    fields = [("S", severity), ("V", severity), ("C", sqlstate), ("M", message)]
    if detail:
        fields.append(("D", detail))
    if hint:
        fields.append(("H", hint))
    body = b"".join(
        code.encode() + text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace") + b"\0"
        for code, text in fields
    )
    return b"E" + _INT32.pack(len(body) + 5) + body + b"\0"


def build_ready_for_query(status: str) -> bytes:
    """Build a ReadyForQuery message whose transaction status is ``status``: ``I``, ``T`` or ``E``."""
    return b"Z\0\0\0\x05" + status.encode()
