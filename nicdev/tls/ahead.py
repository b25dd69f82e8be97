"""What arrived ahead of its turn: records behind a hole, and how the hole is closed.

Theory of operation. `front` is the first byte of the flow that has not arrived. Everything behind it that passed is in
the `Store`; which records are there says the `RecordMap`.

A piece of a record whose nonce is known is decrypted at once, by seeking in the key stream. A record is verified when
all its bytes have passed, and its bytes are forgotten then. If its number is unknown, it is tried for the few numbers
that the hole leaves possible, and the tag confirms one. When the front moves, what is stored behind it follows.

Numbers and places beyond the front are assumptions, whatever tags confirm: a tag says what a record is, not where it
belongs. `Contradiction` says that a header that came to light, or a second copy of a byte, does not agree with them.
"""

from __future__ import annotations

from typing import Final

from nicdev.tls.aead import TAG_LEN, AeadKey
from nicdev.tls.history import Happened, History
from nicdev.tls.nonces import Nonces
from nicdev.tls.partial import OpeningRecord
from nicdev.tls.record import RecordFormat
from nicdev.tls.recordmap import RecordMap
from nicdev.tls.runs import Record, Run
from nicdev.tls.store import Pool
from nicdev.tls.walk import Cursor

MAX_GUESSES: Final = 8  # numbers tried per record


class Ahead(RecordMap):
    """Everything of one flow from its front on, while something is missing there."""

    def __init__(
        self, fmt: RecordFormat, key: AeadKey, pool: Pool, place: Cursor, nonces: Nonces, *, history: History
    ) -> None:
        """See RecordMap."""
        super().__init__(fmt, pool, place, nonces, history)
        self._key = key
        self._pool = pool
        self.opener: OpeningRecord | None = None  # of `current`; None if its beginning was not seen
        self.debt = 0  # verified records beyond the front
        self.good = 0  # tags that were right

    def resume(self, start: int, size: int, opener: OpeningRecord | None) -> None:
        """The front, at 0, is inside a record that began at `start` (< 0)."""
        run = self.runs[0]
        run.start, run.end = start, start + size
        record = self._note(run, start, size, opener.head if opener is not None else b"")
        record.have = -start
        run.number += 1
        self.current, self.opener = record, opener

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
                self._tell(Happened.FOUND, record.run, before.number + count, "guessed, and its tag is right")
                self._number(record.run, before.number + count)
                return

    def _opens(self, record: Record, number: int) -> bool:
        fmt, head = self._fmt, record.head
        sealed = memoryview(self.store.read(record.start, record.size))[fmt.prefix :]
        out = self._pool.scratch[: len(sealed) - TAG_LEN]
        return self._key.open(fmt.nonce(number, head), fmt.aad(number, head), sealed, out)

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
