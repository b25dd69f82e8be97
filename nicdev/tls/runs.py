"""What is known of records that lie ahead: where they are, and which follow one another. See ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nicdev.tls.aead import Keystream

MAX_RECORDS: Final = 4096  # known ahead, per flow; a hostile peer may send as far ahead as it likes
MAX_RUNS: Final = 64


class Contradiction(Exception):
    """What passed does not agree with what was assumed."""


@dataclass(slots=True, eq=False)
class Record:
    """One record; positions are the store's."""

    start: int
    size: int
    number: int  # counts from the run's start while the run's numbers are unknown
    run: Run
    head: bytes = b""  # header and explicit nonce, once complete
    assumed: bool = False  # head is: it hides in a hole, and what lies around leaves no other
    have: int = 0  # bytes that passed
    verified: bool = False
    bad: bool = False  # complete, but its tag is wrong
    stream: Keystream | None = None  # decrypts what is at `stream_at`
    stream_at: int = 0

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass(slots=True, eq=False)
class Run:
    """Records one behind another."""

    start: int
    end: int  # where the next header is
    number: int  # of the next record
    known: bool = True  # whether numbers are


def without(ranges: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """`ranges` less start..end."""
    left: list[tuple[int, int]] = []
    for low, high in ranges:
        if low < start:
            left.append((low, min(high, start)))
        if high > end:
            left.append((max(low, end), high))
    return [(low, high) for low, high in left if low < high]
