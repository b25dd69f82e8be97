"""A driver that breaks the rules: every malformation is a RingError, found in bounded steps, with nothing else touched.

The table is that of split rings in section 2.7: walk, indirect tables, memory, order, indexes. What is odd but legal is
tested beside the lawful driver, in test_virtio_ring.py.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from nicdev.errors import GuestMemoryError, RingError
from nicdev.virtio import ring as module
from nicdev.virtio.memory import GuestMemory, Region
from nicdev.virtio.ring import RingLayout, SplitRing
from tests.support.fake_driver import INDIRECT, NEXT, WRITE, FakeQueue

NUM = 8
RAM = 1 << 16
DATA = 1 << 15
TABLE = DATA + 4096
HOLE = RAM + 4096  # the guest has no memory there
U64 = 1 << 64

Desc = tuple[int, int, int, int]


def make(start: int = 0, *, indirect: bool = True) -> tuple[FakeQueue, SplitRing]:
    ram = memoryview(bytearray(RAM))
    queue = FakeQueue(ram, 0, NUM, start=start)
    layout = RingLayout(NUM, queue.desc_at, queue.avail_at, queue.used_at)
    return queue, SplitRing(GuestMemory([Region(0, 0, RAM, ram)]), layout, base=start, indirect=indirect)


def inner(queue: FakeQueue, entries: list[Desc]) -> None:
    """Write an indirect table at TABLE."""
    table = FakeQueue.__new__(FakeQueue)
    table.ram, table.desc_at = queue.ram, TABLE
    for i, entry in enumerate(entries):
        table.poke(i, *entry)


def ring_of(length: int) -> list[Desc]:
    """A cycle of `length` descriptors."""
    return [(DATA, 16, NEXT, (i + 1) % length) for i in range(length)]


OK: Desc = (DATA, 16, 0, 0)
# name -> (descriptors from 0 on, indirect table, head)
CHAINS: dict[str, tuple[list[Desc], list[Desc], int]] = {
    "head is the queue size": ([OK], [], NUM),
    "head 65535": ([OK], [], 65535),
    "self-loop": ([(DATA, 16, NEXT, 0)], [], 0),
    "2-cycle": (ring_of(2), [], 0),
    "cycle of the whole queue": (ring_of(NUM), [], 0),
    "next is the queue size": ([(DATA, 16, NEXT, NUM)], [], 0),
    "next 65535": ([(DATA, 16, NEXT, 65535)], [], 0),
    "zero length": ([(DATA, 0, 0, 0)], [], 0),
    "zero length, bad address": ([(HOLE, 0, 0, 0)], [], 0),
    "zero length in the middle": ([(DATA, 4, NEXT, 1), (DATA, 0, NEXT, 2), OK], [], 0),
    "zero length, writable": ([(DATA, 0, WRITE, 0)], [], 0),
    "address in a hole": ([(HOLE, 1, 0, 0)], [], 0),
    "last byte in a hole": ([(RAM - 15, 16, 0, 0)], [], 0),
    "ends beyond memory": ([(DATA, RAM, WRITE, 0)], [], 0),
    "length 2^32 - 1": ([(DATA, 0xFFFFFFFF, WRITE, 0)], [], 0),
    "end passes 2^64": ([(U64 - 8, 16, 0, 0)], [], 0),
    "address 2^64 - 1": ([(U64 - 1, 1, WRITE, 0)], [], 0),
    "second descriptor in a hole": ([(DATA, 16, NEXT, 1), (HOLE, 16, 0, 0)], [], 0),
    "readable after writable": ([(DATA, 16, WRITE | NEXT, 1), OK], [], 0),
    "readable between writable": ([(DATA, 1, WRITE | NEXT, 1), (DATA, 1, NEXT, 2), (DATA, 1, WRITE, 0)], [], 0),
    "table of 0 bytes": ([(TABLE, 0, INDIRECT, 0)], [OK], 0),
    "table of 15 bytes": ([(TABLE, 15, INDIRECT, 0)], [OK], 0),
    "table of 17 bytes": ([(TABLE, 17, INDIRECT, 0)], [OK], 0),
    "table longer than the queue": ([(TABLE, 16 * (NUM + 1), INDIRECT, 0)], [OK], 0),
    "table of 4 GiB": ([(TABLE, 0xFFFFFFF0, INDIRECT, 0)], [OK], 0),
    "table in a hole": ([(HOLE, 16, INDIRECT, 0)], [OK], 0),
    "table ends in a hole": ([(RAM - 16, 32, INDIRECT, 0)], [OK], 0),
    "table passes 2^64": ([(U64 - 16, 32, INDIRECT, 0)], [OK], 0),
    "indirect with next": ([(TABLE, 16, INDIRECT | NEXT, 1), OK], [OK], 0),
    "nested indirect": ([(TABLE, 16, INDIRECT, 0)], [(TABLE, 16, INDIRECT, 0)], 0),
    "nested indirect at the end": ([(TABLE, 32, INDIRECT, 0)], [(DATA, 1, NEXT, 1), (TABLE, 16, INDIRECT, 0)], 0),
    "next outside the table": ([(TABLE, 32, INDIRECT, 0)], [(DATA, 1, NEXT, 2), OK], 0),
    "next in the queue, not in the table": ([(TABLE, 16, INDIRECT, 0)], [(DATA, 1, NEXT, 1)], 0),
    "loop in the table": ([(TABLE, 32, INDIRECT, 0)], ring_of(2), 0),
    "hole in the table": ([(TABLE, 16, INDIRECT, 0)], [(HOLE, 1, 0, 0)], 0),
    "zero length in the table": ([(TABLE, 16, INDIRECT, 0)], [(DATA, 0, 0, 0)], 0),
    "order broken by the table": ([(DATA, 1, WRITE | NEXT, 1), (TABLE, 16, INDIRECT, 0)], [OK], 0),
    "direct and indirect longer than the queue": (
        [(DATA, 1, NEXT, 1), (TABLE, 16 * NUM, INDIRECT, 0)],
        [(DATA, 1, NEXT, i + 1) for i in range(NUM - 1)] + [OK],
        0,
    ),
}


def count_lines(function: Callable[[], object]) -> int:
    """Lines of Python that run in `function` and below."""
    lines = 0

    def trace(_frame: FrameType, event: str, _arg: Any) -> Callable[..., Any]:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return lines


WAYS: dict[str, Callable[[SplitRing], object]] = {"pop": SplitRing.pop, "take": lambda ring: ring.take(1 << 33, NUM)}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CHAINS)
def test_malformed_chain(name: str, way: str) -> None:
    descriptors, table, head = CHAINS[name]
    queue, ring = make()
    for i, descriptor in enumerate(descriptors):
        queue.poke(i, *descriptor)
    inner(queue, table)
    queue.offer(head)
    queue.publish()
    before = bytes(queue.ram)

    def get() -> None:
        with pytest.raises(RingError):
            WAYS[way](ring)

    # pytest.raises costs some lines of its own; a step of the walk costs less than 30.
    assert count_lines(get) < 400 + 30 * NUM
    assert ring.broken
    assert ring.base == 0, "the position stays"
    assert bytes(queue.ram) == before, "nothing was written anywhere"
    with pytest.raises(RingError):
        WAYS[way](ring)


@pytest.mark.parametrize(
    "name", ["head 65535", "self-loop", "address in a hole", "zero length, writable", "nested indirect"]
)
def test_malformed_chain_behind_good_ones(name: str) -> None:
    """Those before it are not taken either."""
    descriptors, table, head = CHAINS[name]
    queue, ring = make()
    for i, descriptor in enumerate(descriptors):
        queue.poke(i, *descriptor)
    inner(queue, table)
    queue.poke(NUM - 1, DATA, 16, WRITE, 0)
    for offered in (NUM - 1, NUM - 1, head):
        queue.offer(offered)
    queue.publish()
    with pytest.raises(RingError):
        ring.take(33, NUM)
    assert ring.broken
    assert ring.base == 0


def test_avail_idx_goes_back_while_chains_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """To entries that this very call has seen."""
    queue, ring = make()
    for _ in range(4):
        queue.add([], [(DATA, 16)])
    queue.publish()
    unpack = module._unpack

    def back(buffer: memoryview, offset: int) -> tuple[Any, ...]:
        queue.set_avail_idx(3)
        return unpack(buffer, offset)

    monkeypatch.setattr(module, "_unpack", back)
    with pytest.raises(RingError, match="avail idx"):
        ring.take(65, NUM)
    assert ring.broken
    assert ring.base == 0


@pytest.mark.parametrize("parts", [2, 3])
def test_chain_of_more_than_4_gib(parts: int) -> None:
    """2^32 bytes are the most (section 2.7.5.2). The same 2 GiB several times, none of which is touched."""
    half = 1 << 31
    queue, _ = make()
    fd = os.memfd_create("huge")  # sparse: no page of it ever exists
    os.ftruncate(fd, half)
    huge = mmap.mmap(fd, half)
    os.close(fd)
    regions = [Region(0, 0, RAM, queue.ram), Region(half, half, half, memoryview(huge))]
    ring = SplitRing(GuestMemory(regions), RingLayout(NUM, queue.desc_at, queue.avail_at, queue.used_at))
    queue.add([(half, half)] * parts, [])
    queue.publish()
    if parts == 2:
        assert ring.pop() is not None
    else:
        with pytest.raises(RingError, match="bytes"):
            ring.pop()


@pytest.mark.parametrize("name", [n for n, (d, _, _) in CHAINS.items() if any(f & INDIRECT for _, _, f, _ in d)])
def test_indirect_not_negotiated(name: str) -> None:
    descriptors, _, head = CHAINS[name]
    queue, ring = make(indirect=False)
    for i, descriptor in enumerate(descriptors):
        queue.poke(i, *descriptor)
    inner(queue, [OK])
    queue.offer(head)
    queue.publish()
    with pytest.raises(RingError):
        ring.pop()


@pytest.mark.parametrize("start", [0, 1, 32768, 65535])
@pytest.mark.parametrize("jump", [NUM + 1, NUM + 2, 1000, 32767, 32768, 65535 - NUM, 65534, 65535])
def test_avail_idx_jumps(start: int, jump: int) -> None:
    """Forward by more than the queue holds is the same as backward."""
    queue, ring = make(start)
    queue.poke(0, *OK)
    queue.set_avail_idx((start + jump) % 65536)
    with pytest.raises(RingError, match="avail idx"):
        ring.pop()
    assert ring.broken


def test_avail_idx_goes_back_after_good_chains() -> None:
    queue, ring = make()
    for _ in range(4):
        queue.add([(DATA, 1)], [])
    queue.publish()
    for _ in range(4):
        assert ring.pop() is not None
    queue.set_avail_idx(3)
    with pytest.raises(RingError, match="avail idx"):
        ring.pop()


def test_more_outstanding_than_the_queue_holds() -> None:
    """Without a single buffer used, a driver has no second ring full to offer."""
    queue, ring = make()
    for i in range(NUM):
        queue.poke(i, *OK)
        queue.offer(i)
    queue.publish()
    for _ in range(NUM):
        assert ring.pop() is not None
    queue.offer(0)
    queue.publish()
    with pytest.raises(RingError, match="avail idx"):
        ring.pop()


def test_driver_overwrites_used_ring() -> None:
    """Our indexes are ours: what the driver writes there is not read back."""
    queue, ring = make()
    queue.add([(DATA, 1)], [])
    queue.publish()
    chain = ring.pop()
    assert chain is not None
    queue.ram[queue.used_at : queue.end] = b"\xff" * (queue.end - queue.used_at)
    ring.push(chain[0], 0)
    ring.publish()
    assert bytes(queue.ram[queue.used_at + 2 : queue.used_at + 12]) == struct.pack("<HII", 1, chain[0], 0)


@pytest.mark.parametrize("num", [0, 3, 7, 9, 255, 32769, 65535, 65536, -8])
def test_impossible_size(num: int) -> None:
    with pytest.raises(RingError):
        SplitRing(GuestMemory([Region(0, 0, RAM, memoryview(bytearray(RAM)))]), RingLayout(num, 0, 4096, 8192))


@pytest.mark.parametrize(
    "layout",
    [
        RingLayout(NUM, 8, 4096, 8192),
        RingLayout(NUM, 0, 4097, 8192),
        RingLayout(NUM, 0, 4096, 8194),
        RingLayout(NUM, RAM - 16 * NUM + 16, 4096, 8192),
        RingLayout(NUM, 0, RAM - 20, 8192),
        RingLayout(NUM, 0, 4096, RAM - 64),
        RingLayout(NUM, U64 - 16, 4096, 8192),
        RingLayout(NUM, 0, U64 - 2, 8192),
        RingLayout(NUM, 0, 4096, U64 - 4),
        RingLayout(NUM, RAM, RAM, RAM),
    ],
)
def test_impossible_place(layout: RingLayout) -> None:
    with pytest.raises(RingError):
        SplitRing(GuestMemory([Region(0, 0, RAM, memoryview(bytearray(RAM)))]), layout)


def test_ring_that_lost_its_memory_is_left_alone() -> None:
    queue, ring = make()
    queue.add([(DATA, 1)], [])
    queue.publish()
    with pytest.raises(GuestMemoryError):
        ring.attach(GuestMemory())
    assert ring.pop() is not None


def test_descriptor_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that turns each descriptor bad the moment it was read is never seen to have done so."""
    queue, ring = make()
    reads: list[int] = []
    unpack = module._unpack

    def flip(buffer: memoryview, offset: int) -> tuple[Any, ...]:
        fields = unpack(buffer, offset)
        reads.append(offset)
        buffer_at = queue.desc_at + offset
        if not buffer.readonly and len(buffer) == 16 * NUM:
            queue.ram[buffer_at : buffer_at + 16] = b"\xff" * 16
        return fields

    monkeypatch.setattr(module, "_unpack", flip)
    queue.add([(DATA, 4), (DATA + 4, 4)], [(DATA + 8, 4)])
    queue.publish()
    chain = ring.pop()
    assert chain is not None
    assert [len(view) for view in chain[1] + chain[2]] == [4, 4, 4]
    assert len(reads) == len(set(reads)) == 3


def test_taken_descriptor_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is an available entry looked at again."""
    queue, ring = make()
    heads = [queue.add([], [(DATA + 4 * i, 4)]) for i in range(3)]
    queue.publish()
    reads: list[int] = []
    unpack = module._unpack

    def flip(buffer: memoryview, offset: int) -> tuple[Any, ...]:
        fields = unpack(buffer, offset)
        reads.append(offset)
        queue.ram[queue.desc_at + offset : queue.desc_at + offset + 16] = b"\xff" * 16
        at = queue.avail_at + 4 + 2 * (len(reads) - 1)
        queue.ram[at : at + 2] = b"\xff\xff"
        return fields

    monkeypatch.setattr(module, "_unpack", flip)
    used, views, room = ring.take(10, NUM)
    assert [(entry & 0xFFFFFFFF, entry >> 32) for entry in used] == list(zip(heads, [4, 4, 2], strict=True))
    assert room == sum(map(len, views)) == 12
    assert reads == [16 * head for head in heads]


def test_indirect_table_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    queue, ring = make()
    unpack = module._unpack

    def flip(buffer: memoryview, offset: int) -> tuple[Any, ...]:
        fields = unpack(buffer, offset)
        if buffer.readonly:  # our copy of the table
            queue.ram[TABLE : TABLE + 64] = b"\xff" * 64
        return fields

    monkeypatch.setattr(module, "_unpack", flip)
    queue.add([(DATA, 4), (DATA + 4, 4)], [(DATA + 8, 4)], table_addr=TABLE)
    queue.publish()
    chain = ring.pop()
    assert chain is not None
    assert [len(view) for view in chain[1] + chain[2]] == [4, 4, 4]
