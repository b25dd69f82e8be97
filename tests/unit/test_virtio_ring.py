"""SplitRing as a lawful driver sees it: every chain arrives as it was posted, every head goes home exactly once."""

from __future__ import annotations

import random

import pytest

from nicdev.virtio.memory import GuestMemory, Region
from nicdev.virtio.ring import Chain, RingLayout, SplitRing
from tests.support.fake_driver import FakeQueue, random_chain
from tests.support.rings import DATA, RAM, USER, beside, make


def test_nothing_there() -> None:
    _, ring = make(4)
    assert ring.pop() is None
    assert ring.publish() is False
    assert ring.want_kicks() is False


def test_one_of_each_kind() -> None:
    queue, ring = make(8)
    queue.ram[DATA : DATA + 6] = b"abcdef"
    queue.add([(DATA, 4), (DATA + 4, 2)], [(DATA + 100, 3)])
    assert ring.pop() is None, "not visible before avail.idx moves"
    queue.publish()
    chain = ring.pop()
    assert chain is not None
    head, readable, writable = chain
    assert [bytes(view) for view in readable] == [b"abcd", b"ef"]
    writable[0][:] = b"xyz"
    ring.push(head, 3)
    assert queue.collect() == [], "not visible before used.idx moves"
    assert ring.publish() is True
    assert queue.collect() == [(head, 3)]
    assert bytes(queue.ram[DATA + 100 : DATA + 103]) == b"xyz"
    assert ring.pop() is None


@pytest.mark.parametrize("direct", [0, 1, 2, 3])
def test_indirect_after_direct(direct: int) -> None:
    """A chain may begin with ordinary descriptors and end in one indirect (section 2.7.5.3.2)."""
    queue, ring = make(8)
    queue.ram[DATA : DATA + 4] = b"abcd"
    queue.add([(DATA + i, 1) for i in range(4)], [(DATA + 8, 2), (DATA + 10, 2)], table_addr=DATA + 4096, direct=direct)
    queue.publish()
    chain = ring.pop()
    assert chain is not None
    assert b"".join(chain[1]) == b"abcd"
    assert [len(view) for view in chain[2]] == [2, 2]


def test_write_flag_on_the_indirect_head_is_ignored() -> None:
    queue, ring = make(4)
    queue.ram[DATA : DATA + 2] = b"ab"
    head = queue.add([(DATA, 2)], [], table_addr=DATA + 4096)
    queue.poke(head, DATA + 4096, 16, 4 | 2, 0)
    queue.publish()
    chain = ring.pop()
    assert chain is not None
    assert [bytes(view) for view in chain[1]] == [b"ab"]
    assert chain[2] == []


@pytest.mark.parametrize("indirect", [False, True])
def test_chain_as_long_as_the_queue(indirect: bool) -> None:
    queue, ring = make(8)
    queue.add([(DATA + i, 1) for i in range(8)], [], table_addr=DATA + 4096 if indirect else None)
    queue.publish()
    chain = ring.pop()
    assert chain is not None
    assert len(chain[1]) == 8


def test_buffer_and_table_across_two_regions() -> None:
    """Contiguous for the guest, far apart for us (CVE-2018-1059)."""
    border = DATA + 4096
    queue, ring = make(8, split_at=border)
    queue.ram[border - 3 : border + 3] = b"abcdef"
    queue.add([(border - 3, 6), (border - 1, 1)], [(border - 2, 4)], table_addr=border - 24)
    queue.ram[border - 3 : border + 3] = queue.ram[border - 3 : border + 3]
    queue.publish()
    chain = ring.pop()
    assert chain is not None
    assert [len(view) for view in chain[1]] == [3, 3, 1]
    assert [len(view) for view in chain[2]] == [2, 2]


def test_take_of_nothing() -> None:
    queue, ring = make(4)
    assert ring.take(1, 4) == ([], [], 0)
    queue.add([], [(DATA, 64)])
    assert ring.take(1, 4) == ([], [], 0), "not visible before avail.idx moves"


@pytest.mark.parametrize("most", [4, 2, 1])
def test_take_all_or_nothing(most: int) -> None:
    """As much as there is, up to `most`, is told but not taken; `pop` and another `take` find it."""
    queue, ring = make(4, start=65534)
    heads = [queue.add([], [(DATA + 64 * i, 64)]) for i in range(3)]
    queue.publish()
    used, _, room = ring.take(64 * 3 + 1, most)
    assert (len(used), room) == (min(3, most), 64 * min(3, most))
    assert ring.base == 65534
    chain = ring.pop()
    assert chain is not None
    assert chain[0] == heads[0]
    used, _, room = ring.take(65, 2)
    assert ([entry & 0xFFFFFFFF for entry in used], room) == (heads[1:], 128)
    assert ring.base == 1
    ring.push(chain[0], 64)
    ring.push_used(used)
    ring.publish()
    assert queue.collect() == list(zip(heads, [64, 64, 1], strict=True))


def test_neighbours_are_one_view() -> None:
    """Not those beyond a gap or before, and those of another region begin with a view of their own."""
    border = DATA + 4096
    queue, ring = make(16, split_at=border)
    below = [(border - 300, 100), (border - 200, 100), (border - 100, 100)]
    above = [(border, 50), (border + 50, 50), (border + 200, 50), (border + 150, 50), (border + 200, 7)]
    for piece in (*below, *above, (DATA, 10), (DATA + 10, 10)):
        queue.add([], [piece])
    queue.publish()
    used, views, room = ring.take(527, 16)
    assert (len(used), room) == (10, 527)
    assert [len(view) for view in views] == [100, 200, 50, 50, 50, 57, 10, 10]


def random_buffers(rng: random.Random, queue: FakeQueue, at: int) -> int:
    """Receive buffers of any kind, most next to one another, none overlapping those in flight; the first at `at` or
    behind it. Returns where the last ends."""
    for _ in range(rng.randint(0, len(queue.free))):
        writable = []
        for size in rng.choices([1, 12, 60, 500], k=rng.choice([1, 1, 1, 1, 1, 0, 2])):
            at += rng.choice([0, 0, 0, 8])
            if at + size > DATA + 3 * RAM // 8:
                at = DATA
            writable.append((at, size))
            at += size
        readable = [(DATA, 20)] if not writable or rng.random() < 0.1 else []
        direct = len(readable + writable) == 1 and rng.random() < 0.9
        queue.add(readable, writable, None if direct else DATA + 7 * RAM // 16 + 64 * queue.free[-1])
    return at


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_take_is_pop_of_many(seed: int, event_idx: bool) -> None:
    """Where a packet lies and what goes home is as another device finds that takes the same chains one by one."""
    rng = random.Random(seed)
    num = rng.choice([8, 16, 64])
    queue, ring = make(num, event_idx=event_idx, start=65000, split_at=DATA + RAM // 8)
    at, packets = DATA, 0
    for _ in range(2000):
        at = random_buffers(rng, queue, at)
        queue.publish()
        other = beside(queue, ring)
        need, most = rng.randint(1, 700), rng.choice([num, num, 2])
        plain: list[Chain] = []
        room = 0
        while room < need and len(plain) < most and (chain := other.pop()) is not None:
            plain.append(chain)
            room += sum(map(len, chain[2]))
        used, views, found = ring.take(need, most)
        assert (len(used), found) == (len(plain), room)
        if room < need:
            assert ring.base == (other.base - len(plain)) & 0xFFFF
            continue
        assert ring.base == other.base
        packet = rng.randbytes(room)
        assert sum(map(len, views)) == room
        for view in views:
            view[:], packet = packet[: len(view)], packet[len(view) :] + packet[: len(view)]
        assert b"".join(view for chain in plain for view in chain[2]) == packet
        ring.push_used(used)
        ring.publish()
        expected = []
        for head, _, writable in plain:
            expected.append((head, min(need, sum(map(len, writable)))))
            need -= expected[-1][1]
        assert queue.collect() == expected
        packets += 1
    assert packets > 500


def test_base_and_used_index_survive_a_restart() -> None:
    """GET_VRING_BASE and a new ring on the same memory go on where the old one stopped."""
    queue, first = make(4)
    for _ in range(3):
        queue.add([(DATA, 1)], [])
    queue.publish()
    chain = first.pop()
    assert chain is not None
    first.push(chain[0], 0)
    first.publish()
    layout = RingLayout(4, USER + queue.desc_at, USER + queue.avail_at, USER + queue.used_at)
    second = SplitRing(GuestMemory([Region(0, USER, RAM, queue.ram)]), layout, base=first.base)
    rest = [second.pop(), second.pop()]
    assert second.pop() is None
    for chain in rest:
        assert chain is not None
        second.push(chain[0], 0)
    second.publish()
    assert len(queue.collect()) == 3
    assert not queue.in_flight


def test_attach_to_moved_memory() -> None:
    """The same guest memory under another user address map; the ring keeps its place."""
    queue, ring = make(4)
    queue.add([(DATA, 1)], [])
    queue.publish()
    assert ring.pop() is not None
    queue.add([(DATA, 1)], [])
    queue.publish()
    copy = memoryview(bytearray(queue.ram))
    copy[DATA] = 0x55
    ring.attach(GuestMemory([Region(0, USER, RAM, copy)]))
    chain = ring.pop()
    assert chain is not None
    assert bytes(chain[1][0]) == b"\x55"


@pytest.mark.parametrize("num", [1, 2, 16, 256, 32768])
def test_indexes_wrap(num: int) -> None:
    """Queues of every kind of size, started just below the wrap and driven well past it."""
    ram = memoryview(bytearray(26 * 32768 + 64 + 4096))
    queue = FakeQueue(ram, 0, num, event_idx=True, start=65500)
    layout = RingLayout(num, queue.desc_at, queue.avail_at, queue.used_at)
    ring = SplitRing(GuestMemory([Region(0, 0, len(ram), ram)]), layout, base=65500, event_idx=True)
    buffer = len(ram) - 4096
    total = 0
    while total < 3 * num + 100:
        added = min(num, 2000)
        for _ in range(added):
            queue.add([(buffer, 10)], [])
        queue.publish()
        while (chain := ring.pop()) is not None:
            ring.push(chain[0], 0)
            total += 1
        ring.publish()
        assert len(queue.collect()) == added
    assert ring.base == (65500 + total) % 65536


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_random_traffic(seed: int, event_idx: bool) -> None:
    """Random chains, direct and indirect, in random bursts, completed out of order; contents compared byte for byte."""
    rng = random.Random(seed)
    num = rng.choice([4, 16, 64])
    queue, ring = make(num, event_idx=event_idx, start=rng.choice([0, 65000]), split_at=DATA + 5000)
    queue.ram[DATA : DATA + 20000] = rng.randbytes(20000)
    posted: dict[int, tuple[bytes, int]] = {}
    held: list[int] = []
    done = 0
    while done < 1500:
        for _ in range(rng.randint(0, num)):
            slots = len(queue.free)
            readable = random_chain(rng, DATA, 20000, min(3, num // 2))
            writable = random_chain(rng, DATA, 20000, min(3, num // 2))
            count = len(readable) + len(writable)
            indirect = rng.random() < 0.5
            if not count or slots < (1 if indirect else count):
                break
            table = DATA + 24000 + 16 * 8 * queue.free[-1]  # behind the data, one for each head
            head = queue.add(readable, writable, table if indirect else None)
            contents = b"".join(bytes(queue.ram[a : a + n]) for a, n in readable)
            posted[head] = contents, sum(n for _, n in writable)
        queue.publish()
        for _ in range(rng.randint(0, num)):
            chain = ring.pop()
            if chain is None:
                break
            assert (b"".join(chain[1]), sum(map(len, chain[2]))) == posted[chain[0]]
            held.append(chain[0])
        rng.shuffle(held)
        for _ in range(rng.randint(0, len(held))):
            head = held.pop()
            ring.push(head, rng.randint(0, posted.pop(head)[1]))
            done += 1
        ring.publish()
        queue.collect()
    assert len(queue.in_flight) == len(posted)
