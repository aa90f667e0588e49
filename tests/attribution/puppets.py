"""Real processes that open, inherit and close connections when a test tells them to."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from typing import Any, Self

_SCRIPT = """
import ctypes, json, os, socket, subprocess, sys

def set_dumpable(value):  # PR_SET_DUMPABLE, prctl(2): 0 hides /proc/self/fd from every unprivileged process
    ctypes.CDLL(None, use_errno=True).prctl(4, value, 0, 0, 0)

def become_nobody():
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    set_dumpable(1)

def fork(prepare=lambda: None):
    "Forks a child that has done `prepare` when this returns, and lives until release() or the parent's end."
    ready, hold = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(hold[1])
        for other in holds.values():
            os.close(other)
        prepare()
        os.write(ready[1], b"x")
        os.read(hold[0], 1)
        os._exit(0)
    os.close(ready[1])
    assert os.read(ready[0], 1) == b"x"
    os.close(ready[0])
    os.close(hold[0])
    holds[pid] = hold[1]
    return pid

def release(pid):
    os.close(holds.pop(pid))
    os.waitpid(pid, 0)

holds = {}
scope = dict(globals())
for line in sys.stdin:
    result = None
    code = json.loads(line)
    try:
        try:
            result = eval(code, scope)
        except SyntaxError:
            exec(code, scope)
    except BaseException as error:
        print(json.dumps({"error": repr(error)}), flush=True)
    else:
        print(json.dumps({"result": result}), flush=True)
"""


THREADS = """
import ctypes, select, threading, time
libc = ctypes.CDLL(None, use_errno=True)
other, other_end = socket.socketpair()
waker = os.eventfd(0)

def poll(*files, events=select.POLLIN, timeout=None):
    poll = select.poll()
    for each in files:
        poll.register(each, events)
    poll.poll(timeout)

def epoll(*files, events=select.EPOLLIN):
    with select.epoll() as epoll:
        for each in files:
            epoll.register(each, events)
        epoll.poll()

def fill(sock):
    sock.setblocking(False)
    try:
        while sock.send(bytes(65536)):
            pass
    except BlockingIOError:
        sock.setblocking(True)

def spin():
    while True:
        pass

def start(target):
    "Starts a thread that dies with the process, and returns its tid."
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread.native_id

orders = {}

def fork_puppet():
    "Forks a child that starts a thread for each order(); it lives until release() or the parent's end."
    order, answer = socket.socketpair()
    def serve():
        def run():
            while code := order.recv(4096):
                order.send(str(start(lambda code=code: eval(code, globals()))).encode())
        start(run)
    pid = fork(serve)
    orders[pid] = answer
    return pid

def order(pid, code):
    "Has a forked child run an expression in a new thread, and returns its tid."
    orders[pid].send(code.encode())
    return int(orders[pid].recv(64))
"""
"""For :meth:`Puppet.do`: ways to wait, on threads of their own, in the process and in its children."""


class Puppet:
    """A Python process that evaluates expressions and runs statements, one at a time, in one namespace."""

    def __init__(self) -> None:
        # In a group of its own, which is no orphaned one: SIGTSTP does nothing there, setpgid(2).
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        self.pid = self._process.pid
        self.do("None")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def do(self, code: str) -> Any:
        """Evaluate an expression, or run statements, and wait for the result."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(code) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def connect(self, listener: socket.socket, name: str = "c") -> socket.socket:
        """Let the process connect, keep the connection as ``name``, and return the accepted socket."""
        address: object = listener.getsockname()
        family = int(listener.family)
        if listener.family == socket.AF_INET6:
            address = listener.getsockname()[:2]
        self.do(f"{name} = socket.socket({family}); {name}.connect({address!r})")
        return listener.accept()[0]

    def end(self) -> None:
        """Let the process and its forked children end, and reap it."""
        if self._process.stdin is not None and self._process.stdout is not None:
            self._process.stdin.close()
            self._process.wait(30)
            self._process.stdout.close()


def outlive_a_tick() -> None:
    """Wait for as long as the resolution of a process's start time, so that whatever starts now is younger."""
    time.sleep(2 / os.sysconf("SC_CLK_TCK"))
