"""What uWSGI loads."""

from app import application  # noqa: F401

# here goes the advice
