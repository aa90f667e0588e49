"""The way to a collector, which remembers what has become of the last attempt.

OpenTelemetry's exporters return no more than that they have failed, and log why, as often as they do.
"""

from __future__ import annotations

import logging
import math
import os
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final

import requests

from pgguard.faults.text import printable, shorten
from pgguard.secrets.text import redact

if TYPE_CHECKING:
    from collections.abc import Iterator

_LENGTH: Final = 200
_SOURCE: Final = "opentelemetry"
_NOWHERE: Final = logging.NullHandler()
_REFUSALS: Final = frozenset({400, 413})
"""What is sent can't be taken, by whomever and however often: "Failures" in the specification of OTLP over HTTP."""
_LONGEST: Final = 300.0
"""Seconds for which a collector is left alone at most, whatever it asks for."""
_PROTOBUF: Final = "application/x-protobuf"


class Wire(requests.Session):
    """What an exporter sends with."""

    def __init__(self) -> None:
        super().__init__()
        self.why = "no answer"
        """Why the last attempt has failed, if it has."""
        self.refuses = False
        """The collector was there, and has refused what it was sent."""
        self.rest = 0.0
        """Seconds for which it asks to be left alone ("Throttling", likewise)."""
        self.answer = b""
        """What it has answered, in protobuf."""

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        """As :meth:`requests.Session.request`."""
        self.refuses, self.rest, self.answer = False, 0.0, b""
        try:
            response = super().request(*args, **kwargs)
        except Exception as error:
            self.why = _reason(error)
            raise
        self.why = line(f"it answers {response.status_code} {response.reason}")
        self.refuses = response.status_code in _REFUSALS
        self.rest = _rest(response.headers.get("retry-after", ""))
        if response.headers.get("content-type", "") == _PROTOBUF:
            self.answer = response.content
        return response


def keep_quiet() -> None:
    """Have OpenTelemetry log nothing from now on: what is to be said is said by whoever sends."""
    source = logging.getLogger(_SOURCE)
    source.propagate = False
    source.addHandler(_NOWHERE)


def _rest(asked: str) -> float:
    """The seconds of a ``Retry-After``: their number, or a date (RFC 9110, 10.2.3); 0 if it is none."""
    try:
        seconds = float(asked) if asked[:1].isdigit() else parsedate_to_datetime(asked).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), _LONGEST) if math.isfinite(seconds) else 0.0


def _reason(error: BaseException) -> str:
    """What is wrong, in the system's words if they are in it."""
    found = next((one for one in _causes(error) if isinstance(one, OSError) and one.errno), None)
    if found is not None:
        return found.strerror or os.strerror(found.errno or 0)
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    return line(f"{type(error).__name__}: {error}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        reason = getattr(error.args[0], "reason", None) if error.args else None  # urllib3's MaxRetryError
        error = reason if isinstance(reason, BaseException) else error.__cause__ or error.__context__


def line(text: str) -> str:
    """What somebody else has said, in a line that may be shown."""
    return shorten(printable(redact(" ".join(text.split()))), _LENGTH)
