"""rx `ideal`: what a NIC with memory can do. No packet waits, and hardly a record is left to the kernel.

Theory of operation. In order, a packet takes the way of `rx`. Out of order, `Ahead` keeps a copy of its ciphertext,
decrypts it by counter seek, and the packet that completes a record is marked only if the tag over the whole record is
right; so a record of which every packet is marked is one that the peer sent, whichever copies of bytes the kernel uses.

It must also be the right record for its place, since the kernel asks no more. A place is certain if the tags of all
records before it verified (their lengths are authentic then), or if the host named it. Behind a hole nothing is
certain: an attacker may have moved records. The device still marks them, and is *in debt* for it: it takes care that
the kernel cannot get there by another way than the device assumed. Every header between the front and the records
verified ahead must lead to them, with their numbers. The packet that brings a header that does not is dropped, and so
are all packets of the flow from then on (poisoned): the connection stalls. A packet with another copy of a byte of that
region is dropped, too; without debt it is left alone, and nothing is marked until the front has passed it (spoiled).

The debt rests on seeing all that fills the hole. So while a flow is in debt, frames between its two addresses that hide
their contents (fragments, tunnels, VLAN tags) are dropped; see table.

What cannot be kept up without debt ends in a loss: the context scans for headers, asks the host (see resync), and then
follows from the place the host named, muted: it verifies records, but marks none, until the host confirms a second
place: the first is certain, but not what passed since. It never resumes before `_top`, where it was lost: what lies
before may have been marked on grounds that are forgotten.

Packets of a record are marked before its tag was seen. If an attacker could choose its nonce, he could choose one whose
key stream he knows, a false length, and so what is marked where the next record begins; the kernel, to which he gave
the true record by packets of its own, would take that for a record. So where nonces are explicit, a record that spans
packets is marked only if its nonce counts on from a verified record's (`_regular`).
"""

from __future__ import annotations

from typing import Final

from nicdev.tls.aead import FAULTS
from nicdev.tls.ahead import Ahead
from nicdev.tls.context import ContextParams
from nicdev.tls.grounds import FAR, Grounds, signed
from nicdev.tls.history import Happened, History
from nicdev.tls.nonces import Nonces
from nicdev.tls.partial import OpeningRecord
from nicdev.tls.record import HEADER_LEN
from nicdev.tls.runs import MAX_RECORDS, Contradiction
from nicdev.tls.rx import MAX_HOLE, RxResult, RxState
from nicdev.tls.store import MAX_FLOW, PIECE_COST, Pool
from nicdev.tls.walk import SEQ_MASK, Cursor, Walk, walk

_UNTOUCHED: Final = RxResult()
_DROP: Final = RxResult(drop=True)


class IdealContext(Grounds):
    """Decryption state of one flow that may remember."""

    __slots__ = ("_judged", "_nonces", "_suspect")

    def __init__(
        self,
        params: ContextParams,
        scratch: memoryview | None = None,
        pool: Pool | None = None,
        history: History | None = None,
    ) -> None:
        """See Grounds."""
        super().__init__(params, scratch, pool, history)
        self._nonces = Nonces(self._fmt, params.rec_seq, params.iv)
        self._judged: OpeningRecord | None = None  # the open record whose nonce was looked at
        self._suspect = False  # it is not as expected

    def _place(self, seq: int, payload: memoryview) -> RxResult:
        """See RxContext."""
        cursor = self._cursor
        if cursor is not None and self._ahead is None and not self._muted:
            if seq == cursor.seq:
                return self._in_order(cursor, payload)
            gap = signed(seq - cursor.seq)
            if gap + len(payload) <= 0:
                return self._old(cursor, gap, payload)
        if self._poisoned:
            return self._drop()
        if cursor is None:
            self._raise_top((seq + len(payload)) & SEQ_MASK)
            return RxResult(ask=self._pass(None, seq, payload).ask)
        return self._out_of_order(cursor, seq, payload)

    def _out_of_order(self, cursor: Cursor, seq: int, payload: memoryview) -> RxResult:
        if signed(seq - cursor.seq) >= MAX_HOLE:
            return _UNTOUCHED
        ahead = self._ahead
        if ahead is None:
            if gap := signed(seq - cursor.seq):
                kind = f"{gap} bytes missing" if gap > 0 else "overlap"
                self.history.note(Happened.GAP, cursor.seq, cursor.number, kind)
            ahead, cursor = self._begin(cursor)
            self._ahead, self._cursor = ahead, cursor
        try:
            return self._disorder(ahead, ahead.front + signed(seq - cursor.seq), payload)
        except FAULTS as error:
            return self._fail(RxResult(error=True), type(error).__name__)

    def _in_order(self, cursor: Cursor, payload: memoryview) -> RxResult:
        result = self._follow(cursor, self._open, payload, True)
        self._anchored = True
        if not result.error:
            return result
        self._top = (cursor.seq + len(payload)) & SEQ_MASK
        if not result.lost_sync:
            self.history.note(Happened.LOST, cursor.seq, cursor.number, "wrong tag" if result.auth_failed else "error")
        self._forget()
        return result._replace(lost_sync=True)

    def _markable(self, cursor: Cursor, first: OpeningRecord | None, walked: Walk, payload: memoryview) -> bool:
        """See RxContext."""
        if self._fmt.prefix == HEADER_LEN:
            return True
        if walked.ends:
            self._nonces.learn(cursor.number, payload[: self._fmt.prefix] if first is None else first.head)
        return self._trusted()

    def _trusted(self) -> bool:
        """See RxContext."""
        if self._fmt.prefix != HEADER_LEN and self._open is not self._judged:
            self._look()
        return not self._suspect

    def _look(self) -> None:
        """Whether the open record may be marked before its tag was seen."""
        record, cursor = self._open, self._cursor
        self._suspect = False
        if record is None or cursor is None:
            self._judged = record
        elif len(record.head) == self._fmt.prefix:
            self._judged = record
            self._suspect = not self._nonces.expects(cursor.number, record.head)
            if self._suspect and not self._nonces.irregular:
                start = (cursor.seq - cursor.pos) & SEQ_MASK
                self.history.note(Happened.NONCE, start, cursor.number, "not marked before its tag is seen")

    def _old(self, cursor: Cursor, gap: int, payload: memoryview) -> RxResult:
        """Bytes before the cursor. Another header of the record that is still open makes all that follows uncertain."""
        at = gap + cursor.pos  # of the packet in the open record
        low, high = max(at, 0), min(at + len(payload), cursor.pos, HEADER_LEN)
        if low < high and self._open is not None and payload[low - at : high - at] != self._open.head[low:high]:
            self._top = cursor.seq
            start = (cursor.seq - cursor.pos) & SEQ_MASK
            self.history.note(Happened.LOST, start, cursor.number, "another copy of its header")
            self._forget()
            return RxResult(lost_sync=True)
        return _UNTOUCHED

    def _begin(self, cursor: Cursor) -> tuple[Ahead, Cursor]:
        """Something is missing at the cursor; it steps back to the start of a header that is not complete."""
        record, pos = self._open, cursor.pos
        in_header = 0 < pos < self._fmt.prefix and (record is not None or not cursor.size)
        if in_header:
            head = cursor.head if record is None else record.head
            cursor = Cursor((cursor.seq - pos) & SEQ_MASK, cursor.number)
        ahead = Ahead(self._fmt, self._key, self._pool, cursor, self._nonces, history=self.history)
        if in_header:  # it is something that arrived ahead
            ahead.add(0, head, [(0, len(head))])
        elif pos:
            ahead.resume(-pos, cursor.size, record)
        if not self._anchored:
            self._muted = True
        self._blind, self._spoiled = FAR, -FAR
        self._open = None
        return ahead, cursor

    def _disorder(self, ahead: Ahead, at: int, payload: memoryview) -> RxResult:
        """A packet at position `at`, while something is missing."""
        data = bytes(payload)
        end = at + len(data)
        if end > self._blind:
            ahead.top = max(ahead.top, end)
            if at >= self._blind:
                return _UNTOUCHED
            data = data[: self._blind - at]
        try:
            fresh, comparable = ahead.fresh(at, data)
        except Contradiction:
            return self._differs(ahead, at, end)
        comparable = comparable and len(data) == len(payload)
        size = sum(high - low for low, high in fresh)
        if at > ahead.front and not self._fits(ahead, size):
            return self._no_room(ahead, at, end, size)
        try:
            ahead.add(at, data, fresh)
            if not self._muted and fresh:
                ahead.find_run(at, data)
        except Contradiction as contradiction:
            if not self._in_debt:
                return self._fail(RxResult(error=True), str(contradiction))
            self._poison(str(contradiction))
            return self._drop()
        ask = self._question(ahead, at, data)
        return self._judge(ahead, at, data, payload, comparable)._replace(ask=ask)

    def _judge(self, ahead: Ahead, at: int, data: bytes, payload: memoryview, comparable: bool) -> RxResult:
        """Decrypt a packet that was taken in, verify what it completes, move the front."""
        end = at + len(data)
        quiet = self._muted or not comparable or self._certain(ahead) < self._spoiled
        front, good = ahead.front, ahead.good
        hinted = self._state is RxState.HINTED and not self._muted
        bad = ahead.verify()
        texts = None if quiet else ahead.read(at, data, self._scratch)
        stop = ahead.advance()
        self._follow_front(ahead, ahead.front - front)
        failing = [record for record in (*bad, *((stop,) if stop else ())) if record.start < end and at < record.end]
        failed = len(failing)
        result = RxResult(auth_failed=failed, error=bool(failed))
        if texts is not None and not failed:
            result = RxResult(True, ahead.good - good, *self._framed(texts, payload))
        self._set_debt(bool(ahead.debt) and not self._muted)
        if failed:
            self.history.note(Happened.AUTH_FAILED, self._seq(ahead, at), failing[0].number)
        if stop is not None:
            return self._fail(result, "wrong tag")
        if self._blind < FAR and not ahead.debt:
            return self._fail(result, "no room")
        if self._muted and self._unmute():
            hinted = True
        if hinted and self._state is RxState.IN_SYNC:
            self.history.note(Happened.IN_SYNC, self._seq(ahead, ahead.front), ahead.number, "the host's answer")
            result = result._replace(resynced=True)
        self._leave(ahead)
        return result

    @staticmethod
    def _certain(ahead: Ahead) -> int:
        """Up to where records and their places are certain."""
        return ahead.front if ahead.current is None else ahead.current.start

    def _follow_front(self, ahead: Ahead, moved: int) -> None:
        """The front moved by that many bytes."""
        cursor = self._cursor
        if not moved or cursor is None:
            return
        record = ahead.current
        seq = (cursor.seq + moved) & SEQ_MASK
        if record is None:
            self._cursor = Cursor(seq, ahead.number)
        else:
            self._cursor = Cursor(seq, record.number, ahead.front - record.start, record.size)
        self._state = RxState.IN_SYNC
        self._anchored = True

    def _leave(self, ahead: Ahead) -> None:
        """Nothing is missing any more: go on as in order."""
        cursor = self._cursor
        assert cursor is not None
        rest = ahead.store.size
        if self._muted or rest >= self._fmt.prefix or ahead.debt or self._certain(ahead) < self._spoiled:
            return
        head = ahead.store.read(ahead.front, rest)
        if len(head) != rest or ahead.top != ahead.front + rest:
            return
        self._open = ahead.opener
        if head:
            walked = walk(self._fmt, cursor, memoryview(head))
            if walked is None:
                return
            self._cursor = walked.after
            self._open = OpeningRecord(self._fmt, self._key, cursor.number)
            self._open.feed(memoryview(head), self._pool.scratch)
        self._top = cursor.seq if self._cursor is None else self._cursor.seq
        self.history.note(Happened.FILLED, cursor.seq, cursor.number)
        ahead.clear()
        self._ahead = None
        if self._fmt.prefix != HEADER_LEN:
            self._look()

    # -- what goes wrong ----------------------------------------------------------------------------------------------

    def _drop(self) -> RxResult:
        self.dropped += 1
        return _DROP

    def _differs(self, ahead: Ahead, at: int, end: int) -> RxResult:
        """Another copy of a byte passed before."""
        self.history.note(Happened.CONFLICT, self._seq(ahead, at), why="dropped" if self._in_debt else "left alone")
        if self._in_debt:
            return self._drop()
        ahead.top = max(ahead.top, end)
        self._spoiled = max(self._spoiled, ahead.top)
        return _UNTOUCHED

    def _fits(self, ahead: Ahead, size: int) -> bool:
        cost = size + PIECE_COST
        room = ahead.store.cost + cost <= MAX_FLOW and self._pool.free >= cost
        return room and len(ahead.records) < MAX_RECORDS

    def _no_room(self, ahead: Ahead, at: int, end: int, size: int) -> RxResult:
        """Memory is used up: see only what pays the debt."""
        if not self._in_debt:
            ahead.top = max(ahead.top, end)
            return self._fail(_UNTOUCHED, "no room")
        pays = at < ahead.debt_end
        self.history.note(Happened.NO_ROOM, self._seq(ahead, at), why="dropped" if pays else "left alone")
        if pays:
            return self._drop()
        ahead.top = max(ahead.top, end)
        self._blind = at
        return _UNTOUCHED
