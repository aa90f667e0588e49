"""What goes wrong before the guard stands."""

from __future__ import annotations


class ConfigurationError(ValueError):
    """The guard can't start as it is told to; the message is one line that says what to change."""


class LeadsBackError(ConnectionError):
    """Connections to where the server is said to be come back to the guard; the message is a clause that says how."""


class NotPostgresError(ConfigurationError):
    """What is said to be a PostgreSQL's URL is another database's."""
