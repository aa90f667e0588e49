"""What may go wrong in a conversation, done to one at random."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

from tests.fuzz.script import SENDERS, Do, Rule, Step, cut_anywhere, decode, encode, messages
from tests.session.protocol import BACKEND, DESCRIBE_STATEMENT, FRONTEND, bind, close, describe, error, message, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

_LENGTHS: Final = (
    *(0, 1, 3, 4, 5, 6, 8, 100, 9_999, 10_000, 10_001, 10_004, 30_000, 30_001, 65_535),
    *(0x3FFFFFFE, 0x3FFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFB, 0xFFFFFFFF),
)
"""Of messages: around the limits of PostgreSQL and libpq, and of integers."""
_BYTES: Final = (b"\0", b"\xff", b"S", b"P", b"'", b";", b"(", b"\\", b"$$", b"/*", b" prepare x as ", b"x" * 70)
_CANNED: Final = {
    Do.CLIENT: (
        *FRONTEND.values(),
        *(DESCRIBE_STATEMENT, FRONTEND["S"] * 5, FRONTEND["H"] * 3, FRONTEND["X"] * 2),
        *(parse("SELECT 1", "s"), bind("s"), bind("s", "p"), describe("s"), close("s"), parse("SELECT f()")),
        *(message("Q", b"PREPARE s AS SELECT 1\0"), message("Q", b"COPY t FROM STDIN\0"), message("Q", b"x" * 2000)),
    ),
    Do.SERVER: (
        *BACKEND.values(),
        *(error("ERROR", "42P05"), error("ERROR", "26000"), error("FATAL", "57P01"), error("FATAL", "53300")),
        *(message("Z", b"T"), message("Z", b"E"), message("Z", b"?"), message("S", b"application_name\0x\0")),
        *(message("d", bytes(2000)), BACKEND["D"] * 20, BACKEND["Z"] * 3),
    ),
}
T = TypeVar("T")

_MOST_STEPS: Final = 400
_MOST_BYTES: Final = 20_000


class Mutator:
    """Changes conversations at random.

    Args:
        rng: What is left to chance is left to it.
        others: Conversations of which parts are taken over.
    """

    def __init__(self, rng: Random, others: Sequence[list[Step]]) -> None:
        self._rng = rng
        self._others = others
        self._known: dict[Do, list[bytes]] = {
            do: [*canned, *{m for steps in others for step in steps if step.do is do for m in messages(step.data)}]
            for do, canned in _CANNED.items()
        }
        for known in self._known.values():
            known.sort()
        self._changes: tuple[Callable[[list[Step]], None], ...] = (
            *(self._drop_message, self._double_message, self._insert_message, self._replace_message) * 2,
            *(
                self._swap_messages,
                self._change_length,
                self._change_type,
                self._change_body,
                self._tear,
                self._contradict,
            ),
            self._repeat_message,
            self._send_unnamed,
            *(self._drop_step, self._double_step, self._move_step, self._send_as_another, self._send_rest_as_another),
            *(self._happen, self._happen, self._go_on_as_another_does, self._wait_for_ruling, self._cut),
        )

    def mutate(self, steps: list[Step]) -> list[Step]:
        """A copy with a few changes."""
        changed = list(steps)
        number = 1 + int(self._rng.expovariate(0.5))
        for _ in range(number):
            self._pick(self._changes)(changed)
        del changed[_MOST_STEPS:]
        while sum(len(step.data) for step in changed) > _MOST_BYTES:
            changed.pop()
        return changed

    def mutate_file(self, file: bytes) -> bytes:
        """The same for a file."""
        return encode(self.mutate(decode(file)))

    # Where

    def _pick(self, choices: Sequence[T]) -> T:
        return choices[int(self._rng.random() * len(choices))]

    def _below(self, number: int) -> int:
        return int(self._rng.random() * number)

    def _sent(self, steps: list[Step]) -> int | None:
        """The index of a step in which something is sent."""
        for _ in range(8):
            index = self._below(len(steps)) if steps else 0
            if steps and steps[index].data and steps[index].do in _CANNED:
                return index
        return None

    def _change_messages(self, steps: list[Step], change: Callable[[list[bytes], int, Do], None]) -> None:
        index = self._sent(steps)
        if index is None:
            return
        step = steps[index]
        parts = messages(step.data)
        change(parts, self._below(len(parts)), step.do)
        steps[index] = step._replace(data=b"".join(parts))

    # Messages

    def _drop_message(self, steps: list[Step]) -> None:
        def drop(parts: list[bytes], at: int, _: Do) -> None:
            del parts[at]

        self._change_messages(steps, drop)

    def _double_message(self, steps: list[Step]) -> None:
        self._change_messages(steps, lambda parts, at, _: parts.insert(at, parts[at]))

    def _repeat_message(self, steps: list[Step]) -> None:
        """Perhaps so often that not all of it is kept account of singly."""

        def repeat(parts: list[bytes], at: int, _: Do) -> None:
            times = self._pick((3, 5, 10, 300))
            parts[at] *= min(times, 1 + _MOST_BYTES // (2 * len(parts[at])))

        self._change_messages(steps, repeat)

    def _insert_message(self, steps: list[Step]) -> None:
        self._change_messages(steps, lambda parts, at, do: parts.insert(at, self._pick(self._known[do])))

    def _replace_message(self, steps: list[Step]) -> None:
        def replace(parts: list[bytes], at: int, do: Do) -> None:
            parts[at] = self._pick(self._known[do])

        self._change_messages(steps, replace)

    def _swap_messages(self, steps: list[Step]) -> None:
        def swap(parts: list[bytes], at: int, _: Do) -> None:
            other = self._below(len(parts))
            parts[at], parts[other] = parts[other], parts[at]

        self._change_messages(steps, swap)

    def _change_length(self, steps: list[Step]) -> None:
        def change(parts: list[bytes], at: int, _: Do) -> None:
            part = parts[at]
            length = self._pick(_LENGTHS)
            if self._below(3) == 0:
                length = (len(part) - 2 + self._below(3)) & 0xFFFFFFFF
            parts[at] = part[:1] + length.to_bytes(4, "big") + part[5:]

        self._change_messages(steps, change)

    def _change_type(self, steps: list[Step]) -> None:
        def change(parts: list[bytes], at: int, do: Do) -> None:
            new = self._pick(self._known[do])[:1] if self._below(4) else bytes([self._below(256)])
            parts[at] = new + parts[at][1:]

        self._change_messages(steps, change)

    def _change_body(self, steps: list[Step]) -> None:
        """Bytes are put in, taken out or changed, and the length word fits."""

        def change(parts: list[bytes], at: int, _: Do) -> None:
            part = parts[at]
            body = bytearray(part[5:])
            where = self._below(len(body) + 1)
            how = self._below(4)
            if how == 0:
                body[where:where] = self._pick(_BYTES)
            elif how == 1:
                del body[where : where + 1 + self._below(8)]
            elif how == 2:
                body[where : where + 1] = bytes([self._below(256)])
            else:
                body[where:where] = bytes(self._pick((1, 100, 1100, 1200)))
            parts[at] = part[:1] + (4 + len(body)).to_bytes(4, "big") + body

        self._change_messages(steps, change)

    def _contradict(self, steps: list[Step]) -> None:
        """The server says of a prepared statement that it is there, or that it isn't."""

        def contradict(parts: list[bytes], _: int, do: Do) -> None:
            about = [at for at, part in enumerate(parts) if do is Do.SERVER and part[:1] in b"12t"]
            if about:
                parts[self._pick(about)] = error("ERROR", self._pick(("42P05", "26000")))

        self._change_messages(steps, contradict)

    def _tear(self, steps: list[Step]) -> None:
        """A message ends too early, or too late."""

        def tear(parts: list[bytes], at: int, _: Do) -> None:
            part = parts[at]
            parts[at] = part[: self._below(len(part))] if self._below(2) else part + self._pick(_BYTES)

        self._change_messages(steps, tear)

    # Steps

    def _drop_step(self, steps: list[Step]) -> None:
        if steps:
            del steps[self._below(len(steps))]

    def _double_step(self, steps: list[Step]) -> None:
        if steps:
            at = self._below(len(steps))
            steps.insert(at, steps[at])

    def _move_step(self, steps: list[Step]) -> None:
        """One side is ahead of the other, or behind."""
        if steps:
            step = steps.pop(self._below(len(steps)))
            steps.insert(self._below(len(steps) + 1), step)

    def _send_as_another(self, steps: list[Step]) -> None:
        index = self._sent(steps)
        if index is not None and steps[index].do is Do.CLIENT:
            steps[index] = steps[index]._replace(how=self._below(len(SENDERS)))

    def _send_unnamed(self, steps: list[Step]) -> None:
        """Nobody is named; who has opened the connection is found out, perhaps."""
        steps[:] = [step._replace(how=0) if step.do is Do.CLIENT else step for step in steps]
        if steps and self._below(4):
            steps.insert(1 + self._below(min(4, len(steps))), Step(Do.INTRODUCE, self._pick((1, 9, 9, 13))))

    def _send_rest_as_another(self, steps: list[Step]) -> None:
        """From some byte on another one sends."""
        index = self._sent(steps)
        if index is None or steps[index].do is not Do.CLIENT:
            return
        step, how = steps[index], self._below(len(SENDERS))
        cut = self._below(len(step.data) + 1)
        steps[index : index + 1] = [step._replace(data=step.data[:cut]), step._replace(how=how, data=step.data[cut:])]
        if self._below(2):
            for at in range(index + 2, len(steps)):
                if steps[at].do is Do.CLIENT:
                    steps[at] = steps[at]._replace(how=how)

    def _happen(self, steps: list[Step]) -> None:
        """Something happens that is no message."""
        where = self._below(len(steps) + 1)
        do = self._pick((Do.CLIENT_ENDS, Do.SERVER_ENDS, Do.RULE, Do.RULE, Do.GO_ON, Do.INTRODUCE, Do.ASK, Do.ASK))
        how = self._below(16)
        data = self._pick(self._known[self._pick(tuple(_CANNED))]) if do is Do.ASK else b""
        steps.insert(where, Step(do, how, data))

    def _wait_for_ruling(self, steps: list[Step]) -> None:
        at = self._below(len(steps) + 1)
        steps.insert(at, Step(Do.RULE, self._pick((Rule.WAIT, Rule.WAIT_AND_SWALLOW))))
        for _ in range(1 + self._below(3)):
            steps.insert(at + 1 + self._below(len(steps) - at), Step(Do.GO_ON))

    def _cut(self, steps: list[Step]) -> None:
        steps[:] = cut_anywhere(steps, self._rng)

    def _go_on_as_another_does(self, steps: list[Step]) -> None:
        """The end of one conversation behind the beginning of another."""
        if self._others:
            other = self._pick(self._others)
            steps[self._below(len(steps) + 1) :] = other[self._below(len(other) + 1) :]
