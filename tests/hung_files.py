"""A file system that answers nothing but what its root is: FUSE, whose daemon has been asked and says nothing more."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_PYTHON = sys.executable

_DAEMON = """
import ctypes, os, struct, sys
device = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
libc = ctypes.CDLL(None, use_errno=True)
if libc.mount(b"hung", sys.argv[1].encode(), b"fuse", 6, options):
    raise OSError(ctypes.get_errno(), "mount")

def answer(unique, error=0, body=b""):
    os.write(device, struct.pack("=IiQ", 16 + len(body), error, unique) + body)

while True:
    _, code, unique = struct.unpack_from("=IIQ", os.read(device, 1 << 20))
    if code == 26:  # FUSE_INIT
        answer(unique, 0, struct.pack("=IIIIHHIIHHI7I", 7, 31, 0, 0, 12, 9, 4096, 1, 1, 0, 0, *[0] * 7))
        print("ready", flush=True)
    elif code == 3:  # FUSE_GETATTR
        attributes = struct.pack("=6Q10I", 1, *[0] * 8, 0o40755, 2, 0, 0, 0, 4096, 0)
        answer(unique, 0, struct.pack("=QII", 3600, 0, 0) + attributes)
    elif code == 34:  # FUSE_ACCESS: ENOSYS
        answer(unique, -38)
    elif code not in (2, 36, 42):  # those that want no answer
        print("asked", flush=True)
"""


class HungFiles:
    """Where it is mounted."""

    def __init__(self, directory: Path, daemon: subprocess.Popen[bytes]) -> None:
        self.directory = directory
        self._daemon = daemon

    def wait_until_asked(self) -> None:
        """Wait until somebody has asked for something that is not answered."""
        assert self._daemon.stdout is not None
        assert self._daemon.stdout.readline() == b"asked\n"


@contextmanager
def hung_files(directory: Path) -> Iterator[HungFiles]:
    """Mount one; whoever hangs in it goes on when the context is left. Skips the test where that can't be done."""
    if os.geteuid() != 0 or not Path("/dev/fuse").exists():
        pytest.skip("it takes root and FUSE")
    with subprocess.Popen([_PYTHON, "-c", _DAEMON, directory], stdout=subprocess.PIPE) as daemon:
        try:
            assert daemon.stdout is not None
            if daemon.stdout.readline() != b"ready\n":
                pytest.skip("FUSE can't be mounted here")
            yield HungFiles(directory, daemon)
        finally:
            daemon.kill()  # which breaks the connection, and lets everybody go
            daemon.wait(30)
            ctypes.CDLL(None).umount2(os.fsencode(directory), 2)  # MNT_DETACH: whoever is in it may stay
