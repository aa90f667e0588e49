"""Hostile input, without end: conversations mutated at random or guided by coverage, and hostile ends of real sockets.

``python -m tests.fuzz --help`` says how to run each for long; the tests here run each for a few seconds.

``conversations``  the session core is fed recorded conversations, mutated at random, and each in two ways of cutting
``guided``         the same, mutated by what reaches code that nothing has reached before (atheris)
``hostile``        clients and servers that do whatever they like, over real sockets, with a guard in between
``record``         the recorded conversations in ``corpus/`` are recorded anew, of real drivers and a real server
``show``           a file of the corpus, readable
``minimize``       a file that fails, made as small as it still fails

What fails is mended, and its smallest form is kept in ``corpus/``, under a name that says what was wrong.
"""
