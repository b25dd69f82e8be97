"""Guest memory: from the guest's addresses to bounded views of it.

Theory of operation. The front end shares the guest's RAM as regions; each has a guest physical address (what
descriptors hold), a front-end user address (what the ring addresses of vhost-user hold) and bytes we mapped. A
`GuestMemory` is one immutable table of them: a changed table is a new object, and whoever holds views of the old
one keeps those bytes mapped.

Two regions may follow one another in guest addresses and lie anywhere in ours, so a buffer that crosses such a
border is handed out as several views, never assumed contiguous. Every address and length is the guest's word:
nothing is sliced before the sum was compared in integers that cannot overflow.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from nicdev.errors import GuestMemoryError

U64_MAX = (1 << 64) - 1


class Region(NamedTuple):
    """One piece of guest RAM; addresses and size in bytes, `view` has exactly `size` bytes."""

    guest_addr: int
    user_addr: int
    size: int
    view: memoryview


class GuestMemory:
    """An immutable table of regions.

    Raises GuestMemoryError when they are empty, overlap or pass the end of 64 bits.
    """

    __slots__ = ("_starts", "regions")

    def __init__(self, regions: Sequence[Region] = ()) -> None:
        for region in regions:
            if region.size <= 0 or len(region.view) != region.size:
                raise GuestMemoryError(f"region of {region.size} bytes maps {len(region.view)}")
        _check_apart([(r.guest_addr, r.size) for r in regions], "guest")
        _check_apart([(r.user_addr, r.size) for r in regions], "user")
        self.regions = tuple(sorted(regions))
        self._starts = [r.guest_addr for r in self.regions]

    def region_at(self, guest_addr: int) -> Region:
        """The region that holds `guest_addr`; raises GuestMemoryError if none does."""
        at = bisect_right(self._starts, guest_addr) - 1
        if at >= 0:
            region = self.regions[at]
            if guest_addr - region.guest_addr < region.size:
                return region
        raise GuestMemoryError(f"guest address {guest_addr:#x} is in no region")

    def views(self, guest_addr: int, length: int) -> list[memoryview]:
        """Views of `length` (> 0) bytes from `guest_addr`, in order.

        Raises GuestMemoryError unless all of them are guest memory.
        """
        if length <= 0 or guest_addr + length - 1 > U64_MAX:
            raise GuestMemoryError(f"{length} bytes at guest address {guest_addr:#x}")
        found = []
        while length:
            region = self.region_at(guest_addr)
            at = guest_addr - region.guest_addr
            piece = region.view[at : at + length]
            found.append(piece)
            guest_addr += len(piece)
            length -= len(piece)
        return found

    def user_view(self, user_addr: int, length: int) -> memoryview:
        """One view of `length` bytes at a front-end user address, as the ring addresses are (vhost-user, "Memory
        access").

        Raises GuestMemoryError unless a single region holds all of them.
        """
        for region in self.regions:
            at = user_addr - region.user_addr
            if at >= 0 and at + length <= region.size:
                return region.view[at : at + length]
        raise GuestMemoryError(f"{length} bytes at user address {user_addr:#x} are in no region")


def _check_apart(ranges: list[tuple[int, int]], name: str) -> None:
    """Raises GuestMemoryError where ranges (address, size) overlap or leave 64 bits."""
    end = 0
    for address, size in sorted(ranges):
        if address < end:
            raise GuestMemoryError(f"regions overlap at {name} address {address:#x}")
        end = address + size
        if end - 1 > U64_MAX:
            raise GuestMemoryError(f"region at {name} address {address:#x} passes the end of 64 bits")
