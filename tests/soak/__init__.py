"""A soak: programs of all kinds use PostgreSQL directly and through a guard, for as long as they are told.

``python -m tests.soak --help`` says how. What they get has to be the same, row by row; the guard may say nothing but
what a program has brought upon itself, and must not grow.
"""
