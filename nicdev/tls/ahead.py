"""What arrived ahead of its turn: records behind a hole, and how the hole is closed.

Theory of operation. `front` is the first byte of the flow that has not arrived. Everything behind it that passed is in
the `Store`. Records are known in *runs*: in a run each record starts where the one before ends. The first run starts at
the front. Where a hole hides a header, the run ends, and another may be found behind the hole:

    ... record 7 | record 8 ~~~ hole ~~~ | record 10 | record 11 | 12
    first run            ^front            second run

A new run is found by its first header. Where explicit nonces count up with the record numbers, the nonce tells the
number, and 64 bits of it that this is a header at all. Else the number is unknown until a whole record has arrived; it
is then tried for the few numbers that the hole leaves possible, and the tag confirms one.

A piece of a record whose nonce is known is decrypted at once, by seeking in the key stream. A record is verified when
all its bytes have passed, and its bytes are forgotten then. When the front moves, what is stored behind it follows.

Numbers and places beyond the front are assumptions, whatever tags confirm: a tag says what a record is, not where it
belongs. `Contradiction` says that a header that came to light, or a second copy of a byte, does not agree with them.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Final

from nicdev.tls.aead import TAG_LEN, AeadKey
from nicdev.tls.nonces import Nonces
from nicdev.tls.partial import OpeningRecord
from nicdev.tls.record import HEADER_LEN, MAX_NUMBER, RecordFormat
from nicdev.tls.runs import MAX_RUNS, Contradiction, Record, Run, without
from nicdev.tls.store import Pool, Store

MAX_CANDIDATES: Final = 16  # headers looked at per packet
MAX_GUESSES: Final = 8  # numbers tried per record
_VERSION: Final = b"\x03\x03"


class Ahead:
    """Everything of one flow from its front on, while something is missing there."""

    def __init__(self, fmt: RecordFormat, key: AeadKey, pool: Pool, number: int, nonces: Nonces) -> None:
        """The front is at 0, where record `number` starts."""
        self._fmt = fmt
        self._key = key
        self._pool = pool
        self._nonces = nonces
        self.store = Store(pool)
        self.front = 0
        self.top = 0  # behind everything that passed
        self.runs = [Run(0, 0, number)]
        self.records: list[Record] = []  # ascending; the first may have begun before the front
        self._starts: list[int] = []
        self.current: Record | None = None  # the record that the front is in
        self.opener: OpeningRecord | None = None  # of that; None if its beginning was not seen
        self.debt = 0  # verified records beyond the front
        self.good = 0  # tags that were right
        self._ripe: list[Record] = []  # complete, not yet verified

    def resume(self, start: int, size: int, opener: OpeningRecord | None) -> None:
        """The front, at 0, is inside a record that began at `start` (< 0)."""
        run = self.runs[0]
        run.start, run.end = start, start + size
        record = self._note(run, start, size, opener.head if opener is not None else b"")
        record.have = -start
        run.number += 1
        self.current, self.opener = record, opener

    # -- taking a packet in -------------------------------------------------------------------------------------------

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

    # -- records ------------------------------------------------------------------------------------------------------

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

    def verify(self) -> list[Record]:
        """Judge the records that are complete; return the bad ones. May raise one of FAULTS."""
        ripe, self._ripe = self._ripe, []
        bad: list[Record] = []
        for record in ripe:
            if record.verified or record.bad:
                continue
            if not record.run.known:
                self._guess(record)
                if not record.run.known:
                    continue
            if self._opens(record, record.number):
                record.verified = True
                self.store.remove(record.start, record.end)
                self.debt += 1
                self._verified(record)
            else:
                record.bad = True
                bad.append(record)
        return bad

    def _verified(self, record: Record) -> None:
        self.good += 1
        self._nonces.learn(record.number, record.head)

    def _regular(self, record: Record) -> bool:
        """Whether pieces of the record may be marked, though it is not verified perhaps."""
        return record.assumed or record.verified or self._nonces.expects(record.number, record.head)

    def _guess(self, record: Record) -> None:
        """Find the number of a record of the last run, whose numbers are unknown."""
        before = self.runs[-2]
        low, high = self._hidden(before, record.run.start)
        for count in range(low, min(high, low + MAX_GUESSES - 1) + 1):
            if self._opens(record, before.number + count + record.number):
                self._number(record.run, before.number + count)
                return

    def _opens(self, record: Record, number: int) -> bool:
        fmt, head = self._fmt, record.head
        sealed = memoryview(self.store.read(record.start, record.size))[fmt.prefix :]
        out = self._pool.scratch[: len(sealed) - TAG_LEN]
        return self._key.open(fmt.nonce(number, head), fmt.aad(number, head), sealed, out)

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

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, at: int, data: bytes, out: memoryview) -> list[tuple[int, int]] | None:
        """Decrypt a packet into `out`; where text is in it, or None if any part cannot be read. May raise FAULTS."""
        texts: list[tuple[int, int]] = []
        end = here = at + len(data)
        here = at
        for record in self._overlapping(at, end):
            if record.start > here or record.bad or not record.run.known:
                return None
            high = min(end, record.end)
            low, text_end = max(here, record.start + self._fmt.prefix), min(high, record.end - TAG_LEN)
            if low < text_end:
                if not record.head or not self._regular(record):
                    return None
                self._decrypt(record, low, data[low - at : text_end - at], out[low - at : text_end - at])
                texts.append((low - at, text_end - at))
            here = high
        if here < end and not any(run.end == here and run.known for run in self.runs):
            return None
        return texts  # behind the last record are at most the first bytes of a header

    def _decrypt(self, record: Record, at: int, src: bytes, dst: memoryview) -> None:
        if record.stream is None or record.stream_at != at:
            nonce = self._fmt.nonce(record.number, record.head)
            record.stream = self._key.keystream(nonce, at - record.start - self._fmt.prefix)
        record.stream.update_into(src, dst)
        record.stream_at = at + len(src)

    # -- moving the front ---------------------------------------------------------------------------------------------

    def advance(self) -> Record | None:
        """Move the front as far as possible; the record with a wrong tag that stopped it, if any.

        May raise one of FAULTS.
        """
        while True:
            if self.current is None:
                record = self.records[0] if self.records else None
                if record is None or record.start != self.front or not record.head or record.assumed:
                    return None
                if record.bad:
                    return record
                if record.verified:
                    self.front = record.end
                    self._forget_first()
                    self.debt -= 1
                    continue
                self.current, self.opener = record, OpeningRecord(self._fmt, self._key, record.number)
            record = self.current
            piece = self.store.read(self.front, record.end - self.front)
            if not piece:
                return None
            if self.opener is not None:
                self.opener.feed(memoryview(piece), self._pool.scratch)
            self.store.remove(self.front, self.front + len(piece))
            self.front += len(piece)
            if self.front < record.end:
                return None
            if self.opener is not None and not self.opener.verify():
                return record
            if self.opener is not None:
                self._verified(record)
            self.current = self.opener = None
            self._forget_first()

    def jump(self, record: Record) -> None:
        """The host has come to the start of `record`: all before it is history."""
        while self.records[0] is not record:
            self.debt -= self.records[0].verified
            self._forget_first()
        while self.runs[0] is not record.run:
            self.runs.pop(0)
        self.store.remove(min(self.front, record.start), record.start)
        self.front = record.start
        self.current = self.opener = None

    def restart(self, at: int, number: int) -> None:
        """The host says that record `number` starts at `at`, behind the front; raises Contradiction if none does."""
        self.store.remove(self.front, at)
        self.front = at
        self.runs = [Run(at, at, number)]
        self.records.clear()
        self._starts.clear()
        self._ripe.clear()
        self.current = self.opener = None
        self.debt = 0
        self._extend()

    def _forget_first(self) -> None:
        del self.records[0]
        del self._starts[0]

    @property
    def number(self) -> int:
        """Of the record that the front is in or at the start of."""
        return self.records[0].number if self.records and self.records[0].start <= self.front else self.runs[0].number

    @property
    def debt_end(self) -> int:
        """Behind the last verified record."""
        return max((record.end for record in self.records if record.verified), default=self.front)

    def clear(self) -> None:
        """Give the memory back."""
        self.store.clear()
