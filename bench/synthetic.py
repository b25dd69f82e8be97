"""The driver's side of a NIC's queues in a process of its own, on memory that it shares with the device.

    python -m bench.synthetic CONFIG MEMFD KICK CALL [KICK CALL]        (see bench/rig.py, which starts it)

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
import socket
import struct
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Final

from bench.work import KEYS, WRITE, Commands, Flows, Hello, Plain, Stream, Work
from nicdev.abi import Direction
from tests.support.fake_driver import FakeQueue

ORDER_LENGTH: Final = 1 << 18  # packets until a random order of flows repeats itself
BURST: Final = 8  # packets of a flow in a row, in the order of that name
PATIENCE: Final = 20.0  # seconds without progress
RX_BUFFER: Final = 4096  # bytes, as the Linux driver posts them
LOOKS: Final = 256  # at the ring between two at standard input
AHEAD: Final = 256  # frames on their way at most
DATAGRAM: Final = 64 - 14 - 20 - 8  # UDP payload of a frame of 64 bytes
SEGMENTS: Final = 64  # UDP_MAX_SEGMENTS of linux/udp.h
UDP_SEGMENT: Final = 103  # option of linux/udp.h


class Stalled(Exception):
    """The device does nothing any more."""


class Queue:
    """A virtqueue of `num` descriptors at `at`; `events` are its eventfds: kick, call."""

    def __init__(self, ram: memoryview, at: int, num: int, events: Sequence[int], sleeping: bool) -> None:
        self.queue = FakeQueue(ram, at, num, event_idx=True)
        self._used = ram[self.queue.used_at : self.queue.end].cast("H")
        self._event = ram[self.queue.avail_at : self.queue.used_at].cast("H")[2 + num : 3 + num]
        self._kick, self._call = events
        self._sleeping = sleeping
        self.kicks = 0  # how often the device had to be woken

    @property
    def layout(self) -> tuple[int, int, int, int]:
        """Number of descriptors, and where its parts are."""
        return self.queue.num, self.queue.desc_at, self.queue.avail_at, self.queue.used_at

    def used(self) -> int:
        """How many chains the device has used that were not yet taken back."""
        return (self._used[1] - self.queue.seen_used) & 0xFFFF

    def post(self, count: int) -> None:
        """Make the next `count` positions of the ring available."""
        self.queue.avail_idx = (self.queue.avail_idx + count) & 0xFFFF
        if self.queue.publish():
            os.eventfd_write(self._kick, 1)
            self.kicks += 1

    def take(self, count: int) -> None:
        """Take back `count` chains."""
        self.queue.seen_used = (self.queue.seen_used + count) & 0xFFFF
        self._event[0] = (self.queue.seen_used + 0x8000) & 0xFFFF  # no signal, as far as this goes

    def wait(self, count: int, *others: int) -> None:
        """Sleep until `count` chains were used, or one of the other file descriptors is readable. Raises Stalled."""
        self._event[0] = (self.queue.seen_used + count - 1) & 0xFFFF
        if self.used() >= count:
            return
        ready = select.select([self._call, *others], [], [], PATIENCE)[0]
        if not ready:
            raise Stalled(f"the device has used {self._used[1]} of {self.queue.avail_idx}")
        if self._call in ready:
            os.eventfd_read(self._call)


class RxQueue(Queue):
    """A receive queue, whose buffers lie at `buffers`. What was used is made available again at once."""

    def __init__(self, ram: memoryview, at: int, num: int, events: Sequence[int], sleeping: bool) -> None:
        super().__init__(ram, at, num, events, sleeping)
        self.buffers = _page(self.queue.end)
        self._heads = ram[self.queue.used_at + 4 : self.queue.used_at + 4 + 8 * num].cast("I")[::2]
        for index in range(num):
            self.queue.poke(index, self.buffers + RX_BUFFER * index, RX_BUFFER, WRITE, 0)
            self.queue.offer(index)
        self.post(0)

    @property
    def end(self) -> int:
        """Behind the buffers."""
        return self.buffers + RX_BUFFER * self.queue.num

    def recycle(self, stop: int) -> None:
        """Until file descriptor `stop` is readable. Raises Stalled, AssertionError."""
        num, idle = self.queue.num, 0
        while True:
            used = self.used()
            if used:
                first = self.queue.seen_used % num
                heads = self._heads[first : first + used].tolist() + self._heads[: max(0, first + used - num)].tolist()
                assert heads == [(first + n) % num for n in range(used)], "buffers came back in disorder"
                self.take(used)
                self.post(used)
                idle = 0
                continue
            idle += 1
            if idle % LOOKS == 0 and select.select([stop], [], [], 0)[0]:
                return
            if self._sleeping:
                self.wait(num // 2, stop)

    def drain(self, count: int, send: Callable[[], int]) -> None:
        """Take `count` frames of one buffer each that `send` sends (it says how many), at most AHEAD at a time.

        Raises Stalled.
        """
        sent = done = 0
        last = time.monotonic()
        while done < count:
            used = self.used()
            if used:
                self.take(used)
                self.post(used)
                done += used
            if sent < count and sent - done <= AHEAD // 2:
                sent += send()
            elif not used and (self._sleeping or time.monotonic() > last + PATIENCE):
                self.wait((sent - done + 1) // 2)
            elif not used:
                continue
            last = time.monotonic()


class TxQueue(Queue):
    """A transmit queue."""

    _work: Work | None = None

    def again(self, work: Work) -> None:
        """The next chain of a work is its first."""
        work.posted = 0
        self._work = None

    def _use(self, work: Work) -> None:
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
        self._returned = memoryview(returned)

    def drive(self, work: Work, count: int, window: int) -> None:
        """Have `count` chains handled, at most `window` at a time. Raises Stalled, AssertionError."""
        self._use(work)
        posted = done = 0
        started, batch = work.posted, max(1, window // 4)
        last = time.monotonic()
        while done < count:
            used = self.used()
            if used:
                self._check(work, started + done, used)
                self.take(used)
                done += used
            room = min(count - posted, window - (posted - done))
            if room >= batch or (room and posted + room == count):
                work.prepare(work.posted, room)
                work.posted += room
                posted += room
                self.post(room)
            elif not used and (self._sleeping or time.monotonic() > last + PATIENCE):
                self.wait((posted - done + 1) // 2)
            else:
                continue
            last = time.monotonic()

    def _check(self, work: Work, first: int, count: int) -> None:
        """`count` chains came back, of which `first` is the first's number, each as it must."""
        queue, num = self.queue, self.queue.num
        at = queue.seen_used % num
        found = min(count, num - at)
        entries = queue.ram[queue.used_at + 4 : queue.used_at + 4 + 8 * num]
        for start, n in ((at, found), (0, count - found)):
            if entries[8 * start : 8 * (start + n)] != self._returned[8 * start : 8 * (start + n)]:
                raise AssertionError(f"chains {first} and following came back in disorder")
        work.returned(first, count)


def orders(flows: int) -> dict[str, list[int]]:
    """Whose packet comes next: a single flow's, each flow's, a random one's, a random one's for BURST packets."""
    rng = random.Random(flows)
    scattered = [rng.randrange(flows) for _ in range(ORDER_LENGTH)]
    return {
        "one": [0],
        "each": list(range(flows)),
        "random": scattered,
        "bursts": [slot for slot in scattered[: ORDER_LENGTH // BURST] for _ in range(BURST)],
    }


def works(ram: memoryview, at: int, num: int, kinds: dict[str, Any]) -> dict[str, Work]:
    """What the configuration names, with more arguments: "plain", "hello", "commands", "stream", "flows"."""
    found: dict[str, Work] = {}

    def add(name: str, work: Work) -> None:
        nonlocal at
        found[name] = work
        at = _page(at + work.size)

    if "commands" in kinds:
        keys = kinds["commands"].get("keys", len(KEYS))
        for name, direction in (("add_tx", Direction.TX), ("add_rx", Direction.RX), ("delete", None)):
            add(name, Commands(ram, at, num, direction, keys))
    if "hello" in kinds:
        add("hello", Hello(ram, at, num))
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


def sender(address: str) -> Callable[[], int]:
    """What sends SEGMENTS frames of 64 bytes to an address, and says so."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, DATAGRAM)
    sock.connect((address, 9))
    data = bytes(DATAGRAM * SEGMENTS)
    return lambda: sock.send(data) // DATAGRAM


def _page(at: int) -> int:
    """The next page border."""
    return -(-at // 4096) * 4096


def main(arguments: list[str]) -> int:
    """Serve orders until standard input ends."""
    config = json.loads(arguments[0])
    memfd, *events = map(int, arguments[1:])
    if config["processor"] is not None:
        os.sched_setaffinity(0, {config["processor"]})
    ram = memoryview(mmap.mmap(memfd, os.fstat(memfd).st_size))
    tx = TxQueue(ram, 0, config["num"], events[:2], config["sleeping"])
    queues: list[Queue] = [tx]
    at = _page(tx.queue.end)
    if config["rx_buffers"]:
        rx = RxQueue(ram, at, config["rx_buffers"], events[2:], config["sleeping"])
        queues.append(rx)
        at = rx.end
    work = works(ram, at, config["num"], config["works"])
    print(json.dumps([queue.layout for queue in queues]), flush=True)
    stdin = open(0, "rb", buffering=0)  # noqa: SIM115  (an order that waits must be seen in the file descriptor)
    for line in stdin:
        order = json.loads(line)
        if "again" in order:
            tx.again(work[order["again"]])
            continue
        before = sum(queue.kicks for queue in queues)
        if "work" in order:
            tx.drive(work[order["work"]], order["count"], order["window"])
        elif "receive" in order:
            rx.recycle(stdin.fileno())
            stdin.readline()  # the order to stop
        elif "take" in order:
            rx.drain(order["count"], sender(order["take"]))
        print(sum(queue.kicks for queue in queues) - before, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
