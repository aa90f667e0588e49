"""The bytes of PostgreSQL's frontend/backend protocol, versions 3.0 to 3.2, sans I/O."""
