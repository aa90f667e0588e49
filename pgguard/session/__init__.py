"""The protocol state of one session, sans I/O: bytes and who sent them in, verdicts out."""
