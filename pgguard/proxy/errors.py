"""What goes wrong before the guard stands."""

from __future__ import annotations


class ConfigurationError(ValueError):
    """The guard can't start as it is told to; the message is one line that says what to change."""
