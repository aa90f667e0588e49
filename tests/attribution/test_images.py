"""What a process runs, where it does its best to make that hard to read."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from pgguard.attribution.drivers import driver_of
from pgguard.attribution.evidence import Driver
from pgguard.attribution.images import read_image
from tests.attribution.puppets import Puppet

Puppets = Callable[[], Puppet]

_MANY = """
import mmap
paths = []
def map_files(directory, count, length):
    "Map different files with long names, with a gap each so that they stay apart"
    for n in range(count):
        path = os.path.join(directory, f"{n:06d}" + "x" * length)
        with open(path, "wb+") as file:
            file.write(bytes(mmap.PAGESIZE))
            file.flush()
            paths.append(mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ))
        os.unlink(path)
"""


def test_a_process_that_maps_a_few_files_is_read(puppet: Puppets, tmp_path: Path) -> None:
    process = puppet()
    process.do(_MANY)
    process.do(f"map_files({str(tmp_path)!r}, 100, 100)")
    image = read_image(process.pid)
    assert image is not None
    assert image.mapped.count("x" * 100) == 100
    assert "(deleted)" not in image.mapped
    assert driver_of(process.pid) is Driver.PYTHON


def test_one_that_maps_more_names_than_a_program_has_is_not(puppet: Puppets, tmp_path: Path) -> None:
    """Nothing is concluded then, as what isn't seen may be what matters; and it doesn't take the guard's time."""
    process = puppet()
    process.do(_MANY)
    process.do(f"map_files({str(tmp_path)!r}, 1200, 240)")
    began = time.thread_time()
    assert read_image(process.pid) is None
    assert driver_of(process.pid) is Driver.UNKNOWN
    assert time.thread_time() - began < 1


def test_one_that_maps_one_file_again_and_again_takes_little_memory(puppet: Puppets, tmp_path: Path) -> None:
    """With a name as long as names can be: what the kernel says of it is ten thousand times the name."""
    process = puppet()
    process.do("import mmap")
    process.do(
        f"os.chdir({str(tmp_path)!r})\n"
        f"for _ in range(14): os.mkdir('d' * 240); os.chdir('d' * 240)\n"
        "file = open('f', 'wb+'); file.write(bytes(mmap.PAGESIZE)); file.flush()\n"
        "maps = [mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ) for _ in range(8000)]\n"
        "os.chdir('/')"
    )
    began = time.thread_time()
    assert read_image(process.pid) is None
    assert time.thread_time() - began < 2
