"""Exit statuses for a command that can't be run: "Exit Status for Commands" in POSIX's Shell Command Language."""

from __future__ import annotations

from typing import Final

NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
