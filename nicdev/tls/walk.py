"""Following record boundaries through a TCP stream that is cut anywhere.

Theory of operation: a `Cursor` says where in the record stream the next byte belongs. `walk` takes the cursor at the
start of a packet's payload and the payload, and finds every record end in it and the cursor behind it. It reads
headers, five bytes per record, and nothing else: no keys, no crypto, no change of state. So a caller learns that a
packet is well framed before it commits to anything, and drops it without a trace if it is not.

A header may itself be cut. Its first bytes are then kept in the cursor, and are judged as early as they are seen.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from nicdev.tls.record import HEADER_LEN, RecordFormat

SEQ_MASK: Final = 0xFFFFFFFF
SEQ_HALF: Final = 1 << 31  # differences from here on mean "before"

_new = tuple.__new__  # a NamedTuple from all its fields, at a third of the price of calling the class


class Cursor(NamedTuple):
    """A place in the record stream, between two bytes of it."""

    seq: int  # TCP sequence number of the next byte, 0..2**32-1
    number: int  # of the record that the next byte belongs to; may be MAX_NUMBER + 1 behind the very last one
    pos: int = 0  # bytes of that record before this place; 0 where a record starts
    size: int = 0  # length of that record with header and tag; 0 while its header is incomplete
    head: bytes = b""  # its first bytes, while its header is incomplete

    def inside(self, size: int) -> Cursor:
        """The place `size` bytes further on, which is still in the same record."""
        return _new(Cursor, ((self.seq + size) & SEQ_MASK, self.number, self.pos + size, self.size, b""))

    def skip(self, gap: int) -> Cursor | None:
        """The place `gap` bytes (>= 1) further on without having seen them; None if they may hold a header."""
        pos = self.pos + gap
        if pos > self.size:  # so too where a record starts or its header is incomplete: size is 0
            return None
        seq = (self.seq + gap) & SEQ_MASK
        if pos == self.size:
            return Cursor(seq, self.number + 1)
        return Cursor(seq, self.number, pos, self.size)


class Walk(NamedTuple):
    """What `walk` found in a payload."""

    ends: list[int]  # offsets where a record ends, ascending, the first > 0
    after: Cursor  # the place behind the payload
    last: int  # number of the last record that has a byte in the payload


def walk(fmt: RecordFormat, cursor: Cursor, payload: memoryview) -> Walk | None:
    """Follow the records through `payload` (not empty, only read), which starts at `cursor`.

    None if a header must be somewhere and none is.
    """
    seq = (cursor.seq + len(payload)) & SEQ_MASK
    left = len(payload)
    ends: list[int] = []
    at = -cursor.pos  # where in the payload the current record starts; negative: in an earlier packet
    size = cursor.size
    if at and not size:
        head = cursor.head + bytes(payload[: HEADER_LEN - cursor.pos])
        if len(head) < HEADER_LEN:
            return _in_header(fmt, seq, cursor.number, ends, head)
        size = fmt.total(head)
        if not size:
            return None
    at += size  # where it ends; nothing happens here where a record starts
    if size and at <= left:
        ends.append(at)
    total = fmt.total
    while at <= left - HEADER_LEN:
        size = total(payload, at)
        if not size:
            return None
        at += size
        if at <= left:
            ends.append(at)
    number = cursor.number + len(ends)
    if at > left:
        return _new(Walk, (ends, _new(Cursor, (seq, number, left - at + size, size, b"")), number))
    if at == left:
        return _new(Walk, (ends, _new(Cursor, (seq, number, 0, 0, b"")), number - 1))
    return _in_header(fmt, seq, number, ends, bytes(payload[at:]))


def _in_header(fmt: RecordFormat, seq: int, number: int, ends: list[int], head: bytes) -> Walk | None:
    """The end of a walk in the middle of a header, of which `head` was seen."""
    return Walk(ends, Cursor(seq, number, len(head), 0, head), number) if fmt.may_start(head) else None
