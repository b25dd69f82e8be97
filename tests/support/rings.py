"""A driver's queue and the device's ring on the same memory."""

from __future__ import annotations

import itertools

from nicdev.virtio.memory import GuestMemory, Region
from nicdev.virtio.ring import RingLayout, SplitRing
from tests.support.fake_driver import FakeQueue

USER = 0x5555_0000_0000
RAM = 1 << 18
DATA = 1 << 17  # guest address of the data area


def make(
    num: int, *, event_idx: bool = False, indirect: bool = True, start: int = 0, split_at: int | None = None
) -> tuple[FakeQueue, SplitRing]:
    """A driver and a device on the same memory; `split_at` cuts it into two regions that lie apart in user
    addresses."""
    ram = memoryview(bytearray(RAM))
    cuts = [0, RAM] if split_at is None else [0, split_at, RAM]
    regions = [
        Region(lo, USER + lo + i * RAM, hi - lo, ram[lo:hi]) for i, (lo, hi) in enumerate(itertools.pairwise(cuts))
    ]
    queue = FakeQueue(ram, 0, num, event_idx=event_idx, start=start)
    layout = RingLayout(num, USER + queue.desc_at, USER + queue.avail_at, USER + queue.used_at)
    ring = SplitRing(GuestMemory(regions), layout, base=start, event_idx=event_idx, indirect=indirect)
    return queue, ring


def beside(queue: FakeQueue, ring: SplitRing) -> SplitRing:
    """Another device on the same memory, at the same position."""
    layout = RingLayout(queue.num, USER + queue.desc_at, USER + queue.avail_at, USER + queue.used_at)
    return SplitRing(ring._memory, layout, base=ring.base, indirect=True)
