"""ErrorResponse and ParameterStatus bodies, read from what may be only their beginning, and built for libpq to read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import pq

from pgguard.wire.fields import Severity, build_error_response, parse_severity


@pytest.mark.parametrize(("body", "severity", "ends"), [
    (b"SERROR\0VERROR\0C42601\0Mno\0\0", Severity("ERROR", "42601"), False),
    (b"SFATAL\0VFATAL\0C57P01\0Mgoing\0\0", Severity("FATAL", "57P01"), True),
    (b"SPANIK\0VPANIC\0CXX000\0Mgone\0\0", Severity("PANIC", "XX000"), True),
    (b"SFEHLER\0VERROR\0C42601\0Mnein\0\0", Severity("ERROR", "42601"), False),
    (b"SFATAL\0C28P01\0Mbefore 9.6\0\0", Severity("FATAL", "28P01"), True),
    (b"SERROR\0VERROR\0C42601\0Mcut of", Severity("ERROR", "42601"), False),
    (b"", Severity("", ""), False),
    (b"\0VFATAL\0", Severity("", ""), False),
])  # fmt: skip
def test_severity(body: bytes, severity: Severity, *, ends: bool) -> None:
    assert parse_severity(body) == severity
    assert parse_severity(bytearray(body)).ends_session is ends


def fields(message: bytes) -> dict[str, str]:
    assert message[:1] == b"E"
    assert int.from_bytes(message[1:5], "big") == len(message) - 1
    assert message.endswith(b"\0\0")
    return {chr(field[0]): field[1:].decode() for field in message[5:-2].split(b"\0")}


def test_error_response_has_what_libpq_prints() -> None:
    message = build_error_response("shared", sqlstate="08P01", detail="by two", hint="don't")
    assert fields(message) == {
        "S": "FATAL",
        "V": "FATAL",
        "C": "08P01",
        "M": "shared",
        "D": "by two",
        "H": "don't",
    }
    assert set(fields(message)) <= {chr(field) for field in pq.DiagnosticField}
    assert parse_severity(message[5:]) == Severity("FATAL", "08P01")


def test_error_response_leaves_out_what_there_is_not() -> None:
    assert set(fields(build_error_response("no", sqlstate="57P03", severity="ERROR", detail="", hint=None))) == set(
        "SVCM"
    )


ANY_TEXT = st.text(st.characters(exclude_categories=()))


@given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
def test_any_text_keeps_the_message_whole(message: str, detail: str, hint: str) -> None:
    """NUL would end the field, and a lone surrogate, as in a process's name that is no UTF-8, can't be encoded."""
    built = build_error_response(message, sqlstate="08P01", detail=detail, hint=hint)
    assert set(fields(built)) - {"D", "H"} == set("SVCM")
    assert built[5:].count(b"\0") == 4 + bool(detail) + bool(hint) + 1
