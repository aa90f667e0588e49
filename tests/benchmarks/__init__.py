"""What pgguard costs, beside Debian's pgbouncer (session mode) and HAProxy (TCP mode).

``python -m tests.benchmarks --help`` says how. Everything is measured in turn, in short rounds, so that a busy machine
is as busy for each; the first guard is there twice, and what its two columns differ by is noise. Costs are read from
the kernel's clock of the proxy's processor time, which other programs hardly disturb.

Most of the load is PostgreSQL's own pgbench against a real server. Where those two would hide what a proxy costs, or
can't hold as many sessions, small programs in C stand in for them (``load/``, compiled as they are needed): Python
would take more processor time than what is measured.
"""
