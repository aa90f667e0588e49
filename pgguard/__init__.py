"""pgguard: a transparent guard in front of PostgreSQL that names who misused a connection."""
