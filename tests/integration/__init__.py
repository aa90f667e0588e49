"""Real drivers and PostgreSQL's own programs, through a running guard, to real servers."""
