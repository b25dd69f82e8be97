"""Following record headers without knowing their numbers, while a context is lost.

Theory of operation: records chain, each header says where the next one is. So from any true header on, every later
record start is known, only not its number. A `Chain` begins at something that looks like a header, counts records
from there, and starts anew where a predicted header is none. It remembers the places it passed. When the host then
says "the record that starts at this place has that number", and the place is one of these, the numbers of all later
records follow, however far the stream has gone on meanwhile.

A decoy (bytes of ciphertext that look like a header) can start a wrong chain, but not confirm one: the host names
only true record starts. Nothing that is found here is believed before that, and no number is ever guessed: a guess
that a tag confirms would let an attacker who moves records about have the guess confirmed at a place of his choice.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from nicdev.tls.history import Happened, History
from nicdev.tls.record import HEADER_LEN, RecordFormat
from nicdev.tls.walk import SEQ_HALF, SEQ_MASK, Cursor, walk

MAX_STARTS: Final = 1024  # places remembered: more records than a socket buffer holds at their full size
MAX_CANDIDATES: Final = 16  # per packet
_VERSION: Final = b"\x03\x03"


class Chain:
    """Record starts of one flow since it was lost; numbers count from the chain's first record."""

    __slots__ = ("_cursor", "_history", "_starts")

    def __init__(self, history: History) -> None:
        self._history = history
        self._cursor: Cursor | None = None
        self._starts: deque[tuple[int, int]] = deque(maxlen=MAX_STARTS)  # TCP sequence number, relative number

    @property
    def last(self) -> int | None:
        """TCP sequence number of the latest record start that passed."""
        return self._starts[-1][0] if self._starts else None

    def follow(self, fmt: RecordFormat, seq: int, payload: memoryview) -> None:
        """Look at a packet of the flow (not empty, only read)."""
        cursor = self._cursor
        if cursor is not None:
            gap = (seq - cursor.seq) & SEQ_MASK
            if gap >= SEQ_HALF:
                return  # seen before, or out of order: the chain has been here
            if gap:
                cursor = cursor.skip(gap)
        if cursor is None or not self._extend(fmt, cursor, payload):
            self._restart(fmt, seq, payload)

    def since(self, tcp_seq: int) -> int | None:
        """How many record starts passed behind the one at `tcp_seq`; None if none is remembered there."""
        for seq, number in self._starts:
            if seq == tcp_seq:
                return self._starts[-1][1] - number
        return None

    def place(self, tcp_seq: int, rcd_sn: int) -> Cursor | None:
        """Where the stream is now, if record `rcd_sn` starts at `tcp_seq`; None if no start was seen there."""
        if self._cursor is None:
            return None
        for seq, number in self._starts:
            if seq == tcp_seq:
                return self._cursor._replace(number=rcd_sn + self._cursor.number - number)
        return None

    def _extend(self, fmt: RecordFormat, cursor: Cursor, payload: memoryview) -> bool:
        walked = walk(fmt, cursor, payload)
        if walked is None:
            return False
        if not cursor.pos:
            self._note(cursor.seq, cursor.number)
        for count, end in enumerate(walked.ends, 1):
            self._note((cursor.seq + end) & SEQ_MASK, cursor.number + count)
        self._cursor = walked.after
        return True

    def _note(self, seq: int, number: int) -> None:
        if not self._starts or self._starts[-1][0] != seq:
            self._starts.append((seq, number))

    def _restart(self, fmt: RecordFormat, seq: int, payload: memoryview) -> None:
        """Begin anew at the first thing in `payload` that looks like a header and is followed by others to its end."""
        if self._cursor is not None:
            self._history.note(Happened.REJECTED, self.last, why="no header where one must be, or none was seen")
        self._cursor = None
        self._starts.clear()
        data = bytes(payload)
        at = 0
        for _ in range(MAX_CANDIDATES):
            at = data.find(_VERSION, at + 1)
            start = at - 1
            if at < 0 or start + HEADER_LEN > len(data):
                return
            if fmt.total(data, start) and self._extend(fmt, Cursor((seq + start) & SEQ_MASK, 0), payload[start:]):
                self._history.note(Happened.CANDIDATE, (seq + start) & SEQ_MASK)
                return
