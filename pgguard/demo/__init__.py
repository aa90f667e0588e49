"""``pgguard demo``: the fault that pgguard exists for, happening before one's eyes.

An embedded PostgreSQL, a guard in front of it, and a small preforking application that shares one connection
between its workers: everything real, everything gone again when it ends.
"""
