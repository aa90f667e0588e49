"""The live page, the API and the metrics of a guard that runs: what ``--admin`` shows.

It reads what the guard tells of itself (:mod:`pgguard.proxy.overview`, :mod:`pgguard.proxy.figures`) and the faults
that are recorded, and never the relay's own objects. All of it is done on trio's thread in short steps, and one client
is heard in each round of its loop: however many ask, the relay has its turn in between. What takes longer (a cause's
drawing, a whole report) is done in a thread of its own.

*Who may see it.* On a loopback address whoever can connect to it: every user of this host. On any other, whoever knows
the token (:mod:`.access`). Nothing can be changed by it.

*How much it may take.* Connections, followers and what is kept for them are bounded, as is the time for a client to
take what it is sent (:mod:`.server`, :mod:`.feed`): whoever is slow is dropped, and costs nobody else anything.
"""
