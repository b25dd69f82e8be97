"""Ciphertext that arrived ahead of its turn, and the memory for it.

Theory of operation: a `Store` holds the bytes of one flow that passed out of order, as they were on the wire, each
byte once, keyed by its position in the stream (an integer that never wraps). It tells which bytes of a packet are new
and whether the others are what passed before. Nothing is held back here: the packets went on; these are copies.

A `Pool` is what all flows of a device share: a bound on that memory, whose turn it is to give some back (see sent), the
scratch buffer, and the list of address pairs for which the device must see every segment (see ideal).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import OrderedDict
from typing import Final

from nicdev.abi import MAX_TCP_PAYLOAD

MAX_POOL: Final = 64 << 20  # bytes, all flows of a device together
PIECE_COST: Final = 64  # bytes that a piece costs besides its own, about
MAX_FLOW: Final = 512 << 10  # bytes of one flow


class Pool:
    """Memory of all flows of a device."""

    __slots__ = ("free", "holders", "indebted", "scratch")

    def __init__(self, size: int = MAX_POOL) -> None:
        self.free = size  # bytes; may go below 0 for a while, see ideal
        self.holders: OrderedDict[Store, None] = OrderedDict()  # that have something; the first is the next to shed
        self.scratch = memoryview(bytearray(MAX_TCP_PAYLOAD))  # plaintext nobody looks at
        self.indebted: dict[tuple[bytes, bytes], int] = {}  # local and remote address -> flows in debt

    def shed(self) -> None:
        """The first of the holders forgets half of its pieces, and goes to the end."""
        store, _ = self.holders.popitem(last=False)
        store.forget((store.pieces + 1) // 2)
        if store.size:
            self.holders[store] = None


class Store:
    """Bytes of one flow by position; pieces are disjoint and ascending."""

    __slots__ = ("_blobs", "_pool", "_starts", "size")

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._starts: list[int] = []
        self._blobs: list[bytes | memoryview] = []
        self.size = 0

    def missing(self, at: int, data: bytes | memoryview) -> list[tuple[int, int]] | None:
        """The ranges of `data`, which starts at `at`, that are not here; None if what is here differs."""
        starts, blobs = self._starts, self._blobs
        end = at + len(data)
        fresh: list[tuple[int, int]] = []
        here = at
        index = self._index(at)
        while index < len(starts) and starts[index] < end:
            start, blob = starts[index], blobs[index]
            if start > here:
                fresh.append((here, start))
            low, high = max(start, at), min(start + len(blob), end)
            if bytes(data[low - at : high - at]) != bytes(blob[low - start : high - start]):  # not views: byte by byte
                return None
            here = high
            index += 1
        if here < end:
            fresh.append((here, end))
        return fresh

    def add(self, at: int, data: bytes | memoryview) -> None:
        """Keep `data` itself, which nobody may change any more, and none of which is here."""
        index = bisect_left(self._starts, at)
        self._starts.insert(index, at)
        self._blobs.insert(index, data)
        self._count(len(data), 1)

    def read(self, at: int, size: int) -> bytes:
        """Up to `size` bytes from `at` on, as far as they are here without a hole."""
        index = self._index(at)
        parts: list[bytes | memoryview] = []
        here = at
        while here < at + size and index < len(self._starts) and self._starts[index] <= here:
            start, blob = self._starts[index], self._blobs[index]
            part = blob[here - start : at + size - start]
            parts.append(part)
            here += len(part)
            index += 1
        return bytes(parts[0]) if len(parts) == 1 else b"".join(parts)

    def covered(self, at: int, end: int) -> int:
        """How many bytes of at..end are here."""
        count = 0
        for index in range(self._index(at), len(self._starts)):
            start = self._starts[index]
            if start >= end:
                break
            count += min(start + len(self._blobs[index]), end) - max(start, at)
        return count

    def remove(self, at: int, end: int) -> None:
        """Forget the bytes of at..end."""
        first = index = self._index(at)
        starts: list[int] = []
        blobs: list[bytes | memoryview] = []
        while index < len(self._starts) and self._starts[index] < end:
            start, blob = self._starts[index], self._blobs[index]
            for low, high in ((start, at), (end, start + len(blob))):
                if low < high:
                    starts.append(low)
                    blobs.append(blob[low - start : high - start])
            self._count(-len(blob), -1)
            index += 1
        self._starts[first:index] = starts
        self._blobs[first:index] = blobs
        self._count(sum(map(len, blobs)), len(blobs))

    def forget(self, pieces: int) -> None:
        """Forget the first so many pieces."""
        self._count(-sum(map(len, self._blobs[:pieces])), -pieces)
        del self._starts[:pieces], self._blobs[:pieces]

    def clear(self) -> None:
        """Forget everything."""
        self._count(-self.size, -len(self._starts))
        self._starts.clear()
        self._blobs.clear()

    def _index(self, at: int) -> int:
        """Of the first piece that ends behind `at`."""
        index = bisect_right(self._starts, at) - 1
        if index >= 0 and self._starts[index] + len(self._blobs[index]) > at:
            return index
        return index + 1

    @property
    def pieces(self) -> int:
        """How many there are."""
        return len(self._starts)

    @property
    def cost(self) -> int:
        """Bytes of memory that this holds."""
        return self.size + PIECE_COST * len(self._starts)

    def _count(self, size: int, pieces: int) -> None:
        self.size += size
        self._pool.free -= size + PIECE_COST * pieces
