"""Conversations that are mutated by what of the code they reach: ``python -m tests.fuzz.guided``, libFuzzer's options.

Apart from the rest, since what is to be guided by has to be imported here first.
"""

from __future__ import annotations

import random
import sys
import zlib
from typing import Final

import atheris

with atheris.instrument_imports(include=["pgguard.wire", "pgguard.session"]):
    from tests.fuzz.player import APART, BOTH, SLICED, WHOLE, check_once

from tests.fuzz.corpus import conversations
from tests.fuzz.mutations import Mutator
from tests.fuzz.script import decode

_WAYS: Final = (WHOLE, SLICED, APART, BOTH)
_OF_ITS_OWN: Final = 0.2
"""How much of what is mutated is left to libFuzzer, which doesn't know what a message is."""


def _play(file: bytes) -> None:
    check_once(decode(file), _WAYS[zlib.crc32(file) % len(_WAYS)])


def main() -> None:
    """Run until libFuzzer has enough."""
    rng = random.Random()
    mutator = Mutator(rng, conversations())

    def mutate(file: bytes, most: int, seed: int) -> bytes:
        rng.seed(seed)
        if rng.random() < _OF_ITS_OWN:
            mutated: bytes = atheris.Mutate(file, most)
            return mutated
        return mutator.mutate_file(file)[:most]

    atheris.Setup(sys.argv, _play, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
