"""What the page says to somebody who has never heard of the wire protocol: plain words for everything on it."""

from __future__ import annotations

from typing import Final

from pgguard.attribution.evidence import Evidence
from pgguard.session.verdicts import Kind

CONSEQUENCES: Final = {
    Kind.MESSAGE_WHILE_IDLE: (
        "The application will take this message for the beginning of its next answer, so what it reads from now on may "
        "belong to somebody else."
    ),
    Kind.UNEXPECTED_RESPONSE: (
        "From here on the answers no longer fit the questions, and the application may be shown another query's rows."
    ),
    Kind.SHARED_BY_PROCESSES: (
        "Whichever of them reads first gets the answer, so one user can be shown another user's data, and the other "
        "one waits for an answer that never comes."
    ),
    Kind.SHARED_BY_THREADS: (
        "Whichever thread reads first gets the answer, so rows that are meant for one can end up in the other."
    ),
    Kind.REQUEST_WHILE_BUSY: (
        "The application will take the answer to its first question for the answer to the second, and so on."
    ),
    Kind.UNREAD_ANSWER: (
        "Whoever uses this connection next may take the old answer for its own, so that every later answer is off by "
        "one."
    ),
    Kind.INHERITED_CONNECTION: (
        "Nothing has gone wrong yet, but as soon as two processes use the connection, answers reach the wrong one."
    ),
    Kind.FOREIGN_TERMINATE: (
        "The server has closed the session: the process whose connection it is loses its transaction, and finds out "
        "with its next query."
    ),
    Kind.UNCLEAN_CLOSE: (
        "Whatever was still being done is rolled back or goes on without anybody to tell, and nobody learns how it "
        "ended."
    ),
    Kind.IDLE_IN_TRANSACTION: (
        "Its locks keep others waiting, and keep the database from cleaning up what has been deleted."
    ),
    Kind.LEAKED_CONNECTION: (
        "The session takes one of the server's connections, and its locks if it has any, and nobody uses it."
    ),
    Kind.CONNECTION_EXHAUSTION: "More are refused until one of those is closed that count toward the limit.",
    Kind.SESSION_STATE_LOST: (
        "Prepared statements, settings, locks and temporary tables of this session can be gone at any moment."
    ),
    Kind.PROTOCOL_VIOLATION: (
        "Whoever reads this can't tell where the next message begins, so the connection can't be used any more."
    ),
    Kind.TLS_CORRUPTION: (
        "Each of them loses the session, with whatever it was doing in it, and until then one can be given the other's "
        "answers."
    ),
    Kind.UNTRACKED: "The session works as it did, but pgguard doesn't see what goes wrong in it.",
}
"""What each kind leads to, in one sentence."""

EVIDENCE: Final = {
    Evidence.KERNEL_SENDER: (
        "The Linux kernel itself said which process sent exactly these bytes. That is proof; no process can fake it "
        "over TCP."
    ),
    Evidence.SOLE_HOLDER: (
        "When pgguard looked, this was the only process on the machine that had this connection open, so nobody else "
        "can have used it."
    ),
    Evidence.THREAD_SAMPLE: (
        "At that very moment this thread was asleep in a system call that waits for an answer on this connection."
    ),
    Evidence.ONLY_THREAD: "The process has no other thread that could have done it.",
    Evidence.SOCKET_HOLDER: (
        "It is one of several processes that had the connection open. It can have used it; that it did is not proven."
    ),
    Evidence.DECLARED: (
        "The client said so about itself, in its application_name or in a comment of its SQL. pgguard can't see the "
        "process, because it runs on another machine or in another container."
    ),
    Evidence.UNKNOWN: "There is no evidence that ties this process to what happened. It may be somebody else.",
}
"""How strong each piece of evidence is."""

OPENERS_EVIDENCE: Final = {
    **EVIDENCE,
    Evidence.KERNEL_SENDER: (
        "The Linux kernel itself said which process opened this connection. That is proof; no process can fake it."
    ),
}
"""The same of who has opened the connection."""

MESSAGES: Final = {
    "Query": "asks for one text of SQL to be run",
    "Parse": "begins a request: prepares a text of SQL",
    "Bind": "goes on with a request: fills in its values",
    "Describe": "goes on with a request: asks for the form of its result",
    "Execute": "goes on with a request: runs it",
    "Sync": "ends a request",
    "Close": "forgets a prepared text of SQL",
    "FunctionCall": "asks for a function to be run",
    "Terminate": "says that the program is done with the connection",
    "CopyData": "carries rows of a COPY",
    "CopyDone": "ends a COPY",
    "CopyFail": "gives up a COPY",
    "DataRow": "carries a row of an answer",
    "RowDescription": "begins an answer: says which columns it has",
    "CommandComplete": "ends the answer to one statement",
    "ReadyForQuery": "says that the answer is complete, and that the server is ready for the next request",
    "ErrorResponse": "says that something has failed, and why",
}
"""What a message is for, by its name in PostgreSQL's documentation: a clause."""

GLOSSARY: Final = (
    (
        "Cause, fault",
        (
            "A fault is one moment in which something went wrong. A cause is the mistake behind it: the same kind of "
            "fault by the same programs, however often it comes."
        ),
    ),
    (
        "Connection, session",
        (
            "The line between one program and the database. The program sends a request, the server sends the answer; "
            "on one connection the answers always come in the order of the requests, and nothing in them says whose "
            "they are."
        ),
    ),
    (
        "Process, pid, thread",
        (
            "A running program has a number, its pid. Within it, several threads can run at the same time, each with a "
            "number of its own."
        ),
    ),
    (
        "Fork",
        (
            "How a program makes a copy of itself. The copy (the child) gets everything that the original has open, "
            "its database connections too: from then on both write into, and read from, the same line."
        ),
    ),
    (
        "Socket",
        ("The end of a connection as the operating system knows it. Several processes can have the same one open."),
    ),
    (
        "Backend",
        (
            "The process on the database server that answers one connection. Its pid is the one in pg_stat_activity "
            "and in the server's log."
        ),
    ),
    ("Query", "A request in one message: a text of SQL."),
    (
        "Parse, Bind, Describe, Execute, Sync",
        (
            "A request in several messages: prepare a text of SQL, fill in its values, ask for the form of the result, "
            "run it, and end the request."
        ),
    ),
    (
        "Terminate",
        ("The message with which a program says that it is done with a connection. The server then closes it."),
    ),
    (
        "Transaction",
        (
            "Several statements that take effect together or not at all. Until it ends it keeps locks on what it has "
            "changed."
        ),
    ),
    (
        "pgguard",
        (
            "A program that stands between the application and PostgreSQL, passes everything on, and asks the "
            "operating system who sent what."
        ),
    ),
)
"""Words that stand on the page, in the order in which a reader needs them."""
