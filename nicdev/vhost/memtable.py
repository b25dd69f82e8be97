"""The memory table of one connection: regions come and go, each mapped once and unmapped once.

A change first maps what is new and checks the whole table, then becomes visible, then returns the views of what is
gone. The caller moves its rings to the new table before it gives those to `release`.

QEMU before 8.0 adds and removes every region once per queue pair. So an exact repetition of a region is counted, and
the region goes when it was removed as often as it was added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from nicdev.errors import GuestMemoryError, ProtocolError
from nicdev.vhost.host import Host
from nicdev.vhost.message import MemoryRegion
from nicdev.virtio.memory import U64_MAX, GuestMemory, Region

MAX_SLOTS: Final = 509  # as many as KVM gives an x86 guest: never the first limit to be met


class MemoryTable:
    """Regions of guest RAM; `memory` is the current table."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.memory = GuestMemory()
        self._repeats: dict[tuple[int, int, int], int] = {}  # addresses and size -> additions after the first

    def replace(self, regions: Sequence[MemoryRegion], fds: Sequence[int]) -> list[memoryview]:
        """Make these the whole table (one fd per region, which stays the caller's); returns the views to release.

        Raises ProtocolError, with the old table still in place.
        """
        if len(fds) != len(regions):
            raise ProtocolError(f"{len(fds)} fds for {len(regions)} memory regions")
        old = [region.view for region in self.memory.regions]
        self._change([], regions, fds)
        self._repeats.clear()
        return old

    def add(self, region: MemoryRegion, fd: int) -> None:
        """Add one region. Raises ProtocolError, with the old table still in place."""
        same = _identity(region)
        if any(_identity(old) == same for old in self.memory.regions):
            self._repeats[same] = self._repeats.get(same, 0) + 1
            return
        if len(self.memory.regions) >= MAX_SLOTS:
            raise ProtocolError(f"more than {MAX_SLOTS} memory regions")
        self._change(list(self.memory.regions), [region], [fd])

    def remove(self, region: MemoryRegion) -> list[memoryview]:
        """Remove the region with these addresses and size; returns the view to release, none if it stays.

        Raises ProtocolError if there is none.
        """
        same = _identity(region)
        if self._repeats.get(same):
            self._repeats[same] -= 1
            return []
        for old in self.memory.regions:
            if _identity(old) == same:
                self.memory = GuestMemory([r for r in self.memory.regions if r is not old])
                return [old.view]
        raise ProtocolError(f"no memory region {region}")

    def clear(self) -> list[memoryview]:
        """Empty the table; returns the views to release."""
        old = [region.view for region in self.memory.regions]
        self.memory = GuestMemory()
        self._repeats.clear()
        return old

    def release(self, views: Sequence[memoryview]) -> None:
        """Unmap what a change returned."""
        for view in views:
            self._host.unmap(view)

    def _change(self, kept: list[Region], wanted: Sequence[MemoryRegion], fds: Sequence[int]) -> None:
        mapped: list[Region] = []
        try:
            for region, fd in zip(wanted, fds, strict=True):
                guest_addr, size, user_addr, offset = region
                if not size or max(guest_addr, user_addr, offset) + size - 1 > U64_MAX:
                    raise ProtocolError(f"memory region that cannot be: {region}")
                mapped.append(Region(guest_addr, user_addr, size, self._host.map(fd, offset, size)))
            self.memory = GuestMemory(kept + mapped)
        except (ProtocolError, GuestMemoryError) as error:
            self.release([region.view for region in mapped])
            raise ProtocolError(str(error)) from error


def _identity(region: Region | MemoryRegion) -> tuple[int, int, int]:
    return region.guest_addr, region.user_addr, region.size
