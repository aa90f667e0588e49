"""The relay: every byte, every way for a connection to end, and everything that may go wrong beside it."""
