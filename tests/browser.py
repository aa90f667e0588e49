"""A real browser without a window, driven over the pipes of its debugging protocol."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tests.servers import not_installed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SECONDS = 60.0
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"),
    *("--disable-background-networking", "--no-first-run", "--disable-extensions", "--mute-audio"),
)


class Browser:
    """One page of a browser; what it says on its console is kept.

    Args:
        requests: Where its commands are written to.
        answers: Where its answers are read from.
    """

    def __init__(self, requests: int, answers: int) -> None:
        self._requests = requests
        self._answers = answers
        self._read = b""
        self._number = 0
        self._session: str | None = None
        self.said: list[str] = []
        """What the page has said on its console, and what has gone wrong in it, a line each."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Have something done, and wait until it is."""
        self._number += 1
        order: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            order["sessionId"] = self._session
        os.write(self._requests, json.dumps(order).encode() + b"\0")
        deadline = time.monotonic() + _SECONDS
        while True:
            message = self._next(deadline)
            if message.get("id") == self._number:
                assert "error" not in message, message["error"]
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def look_like(self, *, width: int, height: int, scheme: str) -> None:
        """Be as wide and as high as this, and in a light or a dark room."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def evaluate(self, expression: str) -> Any:
        """What an expression of JavaScript comes to."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, expression: str, seconds: float = _SECONDS) -> Any:
        """Wait until an expression is true, and return what it is."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"{expression}: {self.text()}"
            time.sleep(0.05)
        return value

    def text(self) -> str:
        """The text of the page, as it is shown."""
        return str(self.evaluate("document.body === null ? '' : document.body.innerText"))

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """Write what is to be seen to a PNG file; with ``whole`` all of the page."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(taken["data"]))

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._read:
            left = deadline - time.monotonic()
            assert left > 0, "the browser doesn't answer"
            if select.select([self._answers], [], [], left)[0]:
                more = os.read(self._answers, 1 << 20)
                assert more, "the browser has ended"
                self._read += more
        line, _, self._read = self._read.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        parameters = message.get("params", {})
        if message.get("method") == "Runtime.consoleAPICalled":
            self.said.append(str([one.get("value") for one in parameters["args"]]))
        elif message.get("method") == "Runtime.exceptionThrown":
            self.said.append(str(parameters["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded":
            self.said.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")


@contextmanager
def browser(directory: Path) -> Iterator[Browser]:
    """Run a browser, whose profile is in a directory; skip the test if there is none."""
    command = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if command is None:
        not_installed("chromium")
    their_requests, requests = os.pipe()
    answers, their_answers = os.pipe()

    # It reads from 3 and writes to 4.
    places = f'exec "$0" "$@" 3</proc/self/fd/{their_requests} 4>/proc/self/fd/{their_answers}'
    process = subprocess.Popen(
        ["sh", "-c", places, command, *_OPTIONS, f"--user-data-dir={directory}/profile", "about:blank"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(their_requests, their_answers),
    )
    try:
        os.close(their_requests)
        os.close(their_answers)
        yield Browser(requests, answers)
    finally:
        process.kill()
        process.wait(_SECONDS)
        os.close(requests)
        os.close(answers)
