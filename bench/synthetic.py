"""The driver's side of a NIC's queues in a process of its own, on memory that it shares with the device.

    python -m bench.synthetic MEMFD KICK CALL CONFIG        (see bench/rig.py, which starts it)

It must never be what limits the device. So the rings' contents are constant (see bench/work.py): what is left to do is
to move avail.idx on as used.idx advances. Orders come as JSON lines on standard input, each is answered by one.

A driver with a processor of its own polls and never wants a signal; one that has to share sleeps until the device has
used half of what is posted. The device is kicked when it asks for it. Everything that it returns is checked: each
descriptor, in order, with the right length.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import struct
import sys
import time
from array import array
from typing import Any, Final

from bench.work import Commands, Flows, Plain, Stream, Work
from nicdev.abi import Direction, Opcode
from tests.support.fake_driver import FakeQueue

ORDER_LENGTH: Final = 1 << 18  # packets until a random order of flows repeats itself
BURST: Final = 8  # packets of a flow in a row, in the order of that name
PATIENCE: Final = 20.0  # seconds without progress


class Stalled(Exception):
    """The device does nothing any more."""


class TxQueue:
    """A transmit queue at the start of `ram`; `num` descriptors."""

    def __init__(self, ram: memoryview, num: int, kick: int, call: int, sleeping: bool) -> None:
        self.queue = FakeQueue(ram, 0, num, event_idx=True)
        self._used = ram[self.queue.used_at : self.queue.end].cast("H")
        self._event = ram[self.queue.avail_at : self.queue.used_at].cast("H")[2 + num : 3 + num]
        self._kick = kick
        self._call = call
        self._sleeping = sleeping
        self._work: Work | None = None

    def use(self, work: Work) -> None:
        """Fill the ring with a work's chains, and go on in it where it stopped."""
        if work is self._work:
            return
        self._work = work
        queue, num = self.queue, self.queue.num
        for index in range(num):
            queue.poke(index, *work.descriptor(index), 0)
        shift = queue.avail_idx - work.posted
        entries = [(position - shift) % num for position in range(num)]
        struct.pack_into(f"<{num}H", queue.ram, queue.avail_at + 4, *entries)
        returned = struct.pack(f"<{2 * num}I", *(part for entry in entries for part in (entry, work.written)))
        self._returned = memoryview(returned * 2)

    def drive(self, work: Work, count: int, piece: int, window: int) -> list[tuple[int, int]]:
        """Have `count` chains handled, at most `window` at a time.

        Returns (chains handled, time in ns) whenever another `piece` was. Raises Stalled, AssertionError.
        """
        self.use(work)
        marks: list[tuple[int, int]] = []
        posted = done = 0
        started, batch = work.posted, max(1, window // 4)
        last = time.monotonic()
        while done < count:
            used = (self._used[1] - self.queue.seen_used) & 0xFFFF
            if used:
                self._take(work, started + done, used)
                done += used
                if done >= piece * (len(marks) + 1):
                    marks.append((done, time.perf_counter_ns()))
            room = min(count - posted, window - (posted - done))
            if room >= batch or (room and posted + room == count):
                work.prepare(work.posted, room)
                work.posted += room
                posted += room
                self.queue.avail_idx = (self.queue.avail_idx + room) & 0xFFFF
                if self.queue.publish():
                    os.eventfd_write(self._kick, 1)
            elif not used and (self._sleeping or time.monotonic() > last + PATIENCE):
                self._wait((posted - done + 1) // 2)
            else:
                continue
            last = time.monotonic()
        return marks

    def _take(self, work: Work, first: int, count: int) -> None:
        """Check and take back `count` chains, of which `first` is the first's number."""
        queue, num = self.queue, self.queue.num
        at = queue.seen_used % num
        found = min(count, num - at)
        entries = queue.ram[queue.used_at + 4 : queue.used_at + 4 + 8 * num]
        for start, n in ((at, found), (0, count - found)):
            if entries[8 * start : 8 * (start + n)] != self._returned[8 * start : 8 * (start + n)]:
                raise AssertionError(f"chains {first} and following came back in disorder")
        work.returned(first, count)
        queue.seen_used = (queue.seen_used + count) & 0xFFFF
        self._event[0] = (queue.seen_used + 0x8000) & 0xFFFF  # never, as far as this goes

    def _wait(self, count: int) -> None:
        """Sleep until `count` chains more were used, or most of them."""
        queue = self.queue
        self._event[0] = (queue.seen_used + count - 1) & 0xFFFF
        if (self._used[1] - queue.seen_used) & 0xFFFF < count:
            if not select.select([self._call], [], [], PATIENCE)[0]:
                raise Stalled(f"the device has used {self._used[1]} of {queue.avail_idx}")
            os.eventfd_read(self._call)


def orders(flows: int) -> dict[str, list[int]]:
    """Whose packet comes next: of a single flow, a random one each time, a random one for BURST packets."""
    rng = random.Random(flows)
    scattered = [rng.randrange(flows) for _ in range(ORDER_LENGTH)]
    return {
        "one": [0],
        "random": scattered,
        "bursts": [slot for slot in scattered[: ORDER_LENGTH // BURST] for _ in range(BURST)],
    }


def works(ram: memoryview, at: int, num: int, kinds: dict[str, Any]) -> dict[str, Work]:
    """What the configuration names: {"plain": {}, "stream": {"payload": n}, "flows": {"flows": n}, "commands": {}}."""
    found: dict[str, Work] = {}

    def add(name: str, work: Work) -> None:
        nonlocal at
        found[name] = work
        at = -(-(at + work.size) // 4096) * 4096

    if "commands" in kinds:
        for direction in Direction:
            add(f"add_{direction.name.lower()}", Commands(ram, at, num, Opcode.CTX_ADD, direction))
        add("delete", Commands(ram, at, num, Opcode.CTX_DEL, Direction.TX))
    if "plain" in kinds:
        add("plain", Plain(ram, at, num))
    if "stream" in kinds:
        add("stream", Stream(ram, at, num, **kinds["stream"]))
    if "flows" in kinds:
        flows = kinds["flows"]["flows"]
        records = array("I", bytes(4 * flows))
        for name, order in orders(flows).items():
            add(name, Flows(ram, at, num, order, records))
    return found


def main(arguments: list[str]) -> int:
    """Serve orders until standard input ends."""
    memfd, kick, call = map(int, arguments[:3])
    config = json.loads(arguments[3])
    if config["processor"] is not None:
        os.sched_setaffinity(0, {config["processor"]})
    ram = memoryview(mmap.mmap(memfd, os.fstat(memfd).st_size))
    tx = TxQueue(ram, config["num"], kick, call, config["sleeping"])
    work = works(ram, -(-tx.queue.end // 4096) * 4096, config["num"], config["works"])
    queue = tx.queue
    print(json.dumps([queue.num, queue.desc_at, queue.avail_at, queue.used_at]), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if order.get("restart"):
            work[order["work"]].posted = 0
        marks = tx.drive(work[order["work"]], order["count"], order["piece"], order["window"])
        print(json.dumps(marks), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
