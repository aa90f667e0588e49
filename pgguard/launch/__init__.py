"""A command run behind a guard of its own: ``pgguard run``."""
