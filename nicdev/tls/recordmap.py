"""Where records are that lie ahead: what is known of them, and how more becomes known.

Theory of operation: records are known in *runs*. In a run each record starts where the one before ends. The first run
starts at the front, the first byte that has not arrived. Where a hole hides a header, the run ends, and another may be
found behind the hole:

    ... record 7 | record 8 ~~~ hole ~~~ | record 10 | record 11 | 12
    first run            ^front            second run

A new run is found by its first header. Where explicit nonces count up with the record numbers, the nonce tells the
number, and 64 bits of it that this is a header at all. Else the number is unknown until a whole record has arrived (see
ahead), or until the headers that were missing lead to it.

Positions are integers that never wrap; the front was at position 0 when the hole opened.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Final

from nicdev.tls.history import Happened, History
from nicdev.tls.nonces import Nonces
from nicdev.tls.record import HEADER_LEN, MAX_NUMBER, RecordFormat
from nicdev.tls.runs import MAX_RUNS, Contradiction, Record, Run, without
from nicdev.tls.store import Pool, Store
from nicdev.tls.walk import SEQ_MASK, Cursor

MAX_CANDIDATES: Final = 16  # headers looked at per packet
_VERSION: Final = b"\x03\x03"


class RecordMap:
    """Everything of one flow that passed from its front on, and the records in it."""

    def __init__(self, fmt: RecordFormat, pool: Pool, place: Cursor, nonces: Nonces, history: History) -> None:
        """The front is at 0, where record `place.number` starts; at `place.seq` is position 0."""
        self._fmt = fmt
        self._nonces = nonces
        self._history = history
        self._base = place.seq
        self.store = Store(pool)
        self.front = 0
        self.top = 0  # behind everything that passed
        self.runs = [Run(0, 0, place.number)]
        self.records: list[Record] = []  # ascending; the first may have begun before the front
        self._starts: list[int] = []
        self.current: Record | None = None  # the record that the front is in
        self._ripe: list[Record] = []  # complete, not yet verified

    def _tell(self, what: Happened, run: Run, number: int | None = None, why: str = "") -> None:
        self._history.note(what, (self._base + run.start) & SEQ_MASK, number, why)

    def fresh(self, at: int, data: bytes) -> tuple[list[tuple[int, int]], bool]:
        """Ranges of a packet that did not pass before, and whether all the others are known to be equal.

        Raises Contradiction if a byte is not, as far as bytes are remembered.
        """
        ranges = self.store.missing(at, data)
        if ranges is None:
            raise Contradiction("another copy of a byte")
        comparable = at >= self.front
        if not comparable:
            ranges = [(max(low, self.front), high) for low, high in ranges if high > self.front]
        for record in self._overlapping(at, at + len(data)):
            if not record.verified and record is not self.current:
                continue
            self._check_header(record, at, data)
            if record.verified:
                comparable = False
                ranges = without(ranges, record.start, record.end)
        return ranges, comparable

    def add(self, at: int, data: bytes, ranges: list[tuple[int, int]]) -> None:
        """Store these ranges of a packet, and find out what records they belong to. Raises Contradiction."""
        for low, high in ranges:
            self.store.add(low, data[low - at : high - at])
            for record in self._overlapping(low, high):
                record.have += min(high, record.end) - max(low, record.start)
                self._look(record)
        self.top = max(self.top, at + len(data))
        self._extend()

    def find_run(self, at: int, data: bytes) -> None:
        """Look for a header in a packet behind a hole that may hide one."""
        last = self.runs[-1]
        if at <= last.end or len(self.runs) >= MAX_RUNS:
            return
        if not last.known:  # it led nowhere
            self._drop_last_run()
            last = self.runs[-1]
        where = 0
        for _ in range(MAX_CANDIDATES):
            where = data.find(_VERSION, where + 1)
            start = where - 1
            if where < 0 or start + self._fmt.prefix > len(data):
                return
            if self._fmt.total(data, start) and self._try(last, at + start, data, start):
                return

    def _try(self, last: Run, start: int, data: bytes, index: int) -> bool:
        """Whether a run starts at `start`, as data[index:] looks."""
        low, high = self._hidden(last, start)
        if low > high:
            return False
        run = Run(start, start, 0, known=False)
        if self._nonces.offset is not None:
            run.number, run.known = self._nonces.number(data[index : index + self._fmt.prefix]), True
            if not last.number + low <= run.number <= last.number + high:
                return False
            if run.number == last.number + 1:
                self._assume(last, start)
            self._tell(Happened.FOUND, run, run.number, "by its nonce")
        else:
            self._tell(Happened.CANDIDATE, run)
        self.runs.append(run)
        self._extend()
        return self.runs[-1] is run or run.known

    def _assume(self, last: Run, end: int) -> None:
        """The hole behind `last` hides the header of one record, which ends at `end`."""
        size = end - last.end
        head = self._fmt.header(size) + self._nonces.predict(last.number)
        record = self._note(last, last.end, size, head)
        record.assumed = True
        record.have = self.store.covered(record.start, record.end)
        last.end += size
        last.number += 1
        self._look(record)

    def _hidden(self, last: Run, start: int) -> tuple[int, int]:
        """How many records, at least and at most, fit between the end of a run and `start`."""
        size = start - last.end
        low = -(-size // (HEADER_LEN + self._fmt.max_length))
        return max(low, 1), size // (HEADER_LEN + self._fmt.min_length)

    def _extend(self) -> None:
        """Follow headers that have come to light."""
        index = 0
        while index < len(self.runs):
            run = self.runs[index]
            following = self.runs[index + 1] if index + 1 < len(self.runs) else None
            if following is not None and run.end >= following.start:
                self._join(run, following)
                continue
            head = self.store.read(run.end, HEADER_LEN) if run.end < self.top else b""
            if len(head) == HEADER_LEN:
                size = self._fmt.total(head)
                if size and run.number <= MAX_NUMBER:
                    record = self._note(run, run.end, size, b"")
                    record.have = self.store.covered(record.start, record.end)
                    self._look(record)
                    run.end += size
                    run.number += 1
                    continue
                if run.known:
                    raise Contradiction("no header where one must be")
                self._drop_last_run()
                return
            if head and not self._fmt.may_start(head) and run.known:
                raise Contradiction("no header where one must be")
            index += 1

    def _join(self, run: Run, following: Run) -> None:
        if run.end > following.start:
            if following.known:
                raise Contradiction("a record starts inside another")
            self._drop_last_run()
            return
        if not following.known:
            self._tell(Happened.FOUND, following, run.number, "the headers before lead to it")
            self._number(following, run.number)
        if following.number - sum(record.run is following for record in self.records) != run.number:
            raise Contradiction("more or fewer records than assumed")
        run.end, run.number = following.end, following.number
        for record in self.records:
            if record.run is following:
                record.run = run
        self.runs.remove(following)

    def _number(self, run: Run, first: int) -> None:
        """The records of `run` count from `first`."""
        for record in self.records:
            if record.run is run:
                record.number += first
                self._look(record)
        run.number += first
        run.known = True

    def _drop_last_run(self) -> None:
        run = self.runs.pop()
        self._tell(Happened.REJECTED, run, why="it led to no record")
        self.records = [record for record in self.records if record.run is not run]
        self._ripe = [record for record in self._ripe if record.run is not run]
        self._starts = [record.start for record in self.records]

    def _note(self, run: Run, start: int, size: int, head: bytes) -> Record:
        record = Record(start, size, run.number, run, head)
        index = bisect_right(self._starts, start)
        self._starts.insert(index, start)
        self.records.insert(index, record)
        return record

    def _look(self, record: Record) -> None:
        """More of a record has passed, or its number became known."""
        if not record.head or record.assumed:
            head = self.store.read(record.start, self._fmt.prefix)
            if record.assumed and head[1:] != record.head[1 : len(head)]:
                raise Contradiction("another header than assumed")
            if len(head) == self._fmt.prefix:
                if not self._fmt.total(head):
                    raise Contradiction("no header where one must be")
                record.head, record.assumed = head, False
        if record.have == record.size and record is not self.current and record not in self._ripe:
            self._ripe.append(record)

    def _overlapping(self, at: int, end: int) -> list[Record]:
        index = max(bisect_right(self._starts, at) - 1, 0)
        found: list[Record] = []
        while index < len(self.records) and self.records[index].start < end:
            if self.records[index].end > at:
                found.append(self.records[index])
            index += 1
        return found

    @staticmethod
    def _check_header(record: Record, at: int, data: bytes) -> None:
        low, high = max(at, record.start), min(at + len(data), record.start + HEADER_LEN)
        if (
            low < high
            and record.head
            and data[low - at : high - at] != record.head[low - record.start : high - record.start]
        ):
            raise Contradiction("another copy of a header")
