"""The NIC's program with a liar between device and driver: `python -m tests.support.lying_nic`, options as ever.

The device in it is the real one and honest. Its rings are replaced by ones that tell the driver something else, when
the control socket says so: {"cmd": "lie", "lies": [names of lies.py], "share": of the occasions, "seed": any}. The
answer, {"told": {name: times}}, is about the lies up to then. Without names the NIC is honest, as it is at first.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection
from random import Random
from typing import Any
from unittest import mock

from nicdev import abi, cli
from nicdev.vhost import vring
from nicdev.virtio.ring import Chain, SplitRing, Taken
from tests.support.deliveries import Answer, Delivery, Handles
from tests.support.lies import DELIVERY_LIES, TX_RING_LIES
from tests.support.lies_commands import ANSWER_LIES, POSTED_LIES


class Liar:
    """What is lied about, how often, and what was."""

    def __init__(self) -> None:
        self.handles = Handles()
        self._lies: list[str] = []
        self._share = 0.0
        self._rng = Random()
        self._told: Counter[str] = Counter()

    def command(self, request: dict[str, Any]) -> dict[str, Any]:
        """A request to the control socket."""
        told, self._told = self._told, Counter()
        self._lies = list(request["lies"])
        self._share = float(request.get("share", 1))
        self._rng = Random(request.get("seed"))
        self.handles.asked.clear()
        return {"told": told}

    def _occasion(self, among: Collection[str]) -> list[str]:
        """The lies of which one is to be told now, in the order to try them in."""
        lies = [name for name in self._lies if name in among]
        return self._rng.sample(lies, len(lies)) if lies and self._rng.random() < self._share else []

    def deliver(self, delivery: Delivery) -> None:
        """An occasion: something is about to be delivered."""
        for name in self._occasion(DELIVERY_LIES):
            if DELIVERY_LIES[name](delivery, self._rng):
                self._told[name] += 1
                return

    def answer(self, answer: Answer) -> int:
        """An occasion: a command was carried out. Returns the bytes written, allegedly."""
        for name in self._occasion(ANSWER_LIES):
            if ANSWER_LIES[name](answer, self._rng):
                self._told[name] += 1
                break
        return answer.written

    def posted(self, chain: bytearray) -> None:
        """An occasion: a context comes that nobody waits for."""
        for name in self._occasion(POSTED_LIES):
            if POSTED_LIES[name](chain, self._rng):
                self._told[name] += 1
                return

    def returned(self, head: int, size: int) -> list[int]:
        """An occasion: a tx chain goes home. As whose, in a ring of `size`?"""
        names = self._occasion(TX_RING_LIES)
        if not names:
            return [head]
        self._told[names[0]] += 1
        return [head, head] if names[0] == "tx id twice" else [self._rng.choice((size, 0xFFFF_FFFF))]


LIAR = Liar()


class LyingRing(SplitRing):
    """A virtqueue of which the driver is told what LIAR says. Only rx queues `take`, only tx queues `pop`."""

    __slots__ = ("_answers", "_taken")

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._taken: list[memoryview] = []  # rx: buffers of the packet under way
        self._answers: dict[int, Answer] = {}  # tx: to commands of the burst under way, by head

    def take(self, need: int, most: int) -> Taken:
        """As ever; remembers the buffers."""
        taken = super().take(need, most)
        self._taken = list(taken[1])
        return taken

    def push_used(self, used: list[int]) -> None:
        """All of it is written by now: a packet, or replies to commands."""
        if not self._taken:
            super().push_used([lie for entry in used for lie in self._sent(entry & 0xFFFF_FFFF, entry >> 32)])
            return
        delivery = Delivery(self._taken[0], list(used), self.num, LIAR.handles, self._inject)
        LIAR.deliver(delivery)
        super().push_used(delivery.used)

    def _inject(self, message: bytes) -> bool:
        used, views, room = super().take(len(message), 1)
        if room < len(message):
            return False
        views[0][: len(message)] = message
        super().push_used(used)
        return True

    def pop(self) -> Chain | None:
        """As ever; listens to the driver's commands."""
        chain = super().pop()
        if chain is None:
            return None
        head, readable, writable = chain
        self._answers.pop(head, None)  # of a chain that went home unsent
        opcode = LIAR.handles.hear(b"".join(bytes(view[:64]) for view in readable[:1]))
        if opcode and writable:
            self._answers[head] = Answer(opcode, writable[0], 0)
        elif opcode == abi.Opcode.CTX_ADD:
            posted = bytearray(b"".join(readable))
            LIAR.posted(posted)
            return head, [memoryview(posted)], writable
        return chain

    def _sent(self, head: int, written: int) -> list[int]:
        """Used entries instead of the right one of a tx chain."""
        answer = self._answers.pop(head, None)
        if answer is not None:
            answer.written = written
            written = LIAR.answer(answer)
        return [allegedly | written << 32 for allegedly in LIAR.returned(head, self.num)]


def main() -> int:
    """As nicdev.cli.main."""
    handlers = cli._control_handlers

    def with_lies(*arguments: Any) -> dict[str, Any]:
        return {**handlers(*arguments), "lie": LIAR.command}

    with mock.patch.object(vring, "SplitRing", LyingRing), mock.patch.object(cli, "_control_handlers", with_lies):
        return cli.main()


if __name__ == "__main__":
    sys.exit(main())
