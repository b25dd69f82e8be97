"""On what grounds a rx `ideal` context marks records: the host's word, or a debt to be paid. See ideal.

Theory of operation: `Grounds` holds the state that says whether packets may be marked at all, and the dialogue with the
host that changes it:

    scanning   the place is lost. A record start that passes is asked about (resync.Ideal)
    tracking   muted: the first answer gave a place, records are verified from there on and not marked. A record start
               among them is asked about; if the host gives it the number that was counted, all is certain
    in_sync, holes   records are marked
    poisoned   in debt, and it cannot be paid: every packet is dropped

A context whose first packet has not come (not anchored) is muted too: the kernel may hold bytes that arrived before the
context was made. It scans and keeps what it can, so that the missing packet or the host's answer brings it in sync.

A hole that is not filled for long was perhaps filled by a way that the device does not see. So it asks the host about a
record start behind it: an answer means that the kernel has come there.
"""

from __future__ import annotations

from typing import Final

from nicdev.tls.ahead import Ahead
from nicdev.tls.context import ContextParams
from nicdev.tls.history import Happened, History
from nicdev.tls.resync import Ideal, Patience
from nicdev.tls.runs import MAX_RECORDS, Contradiction
from nicdev.tls.rx import RxContext, RxResult, RxState
from nicdev.tls.store import MAX_FLOW, Pool
from nicdev.tls.walk import SEQ_HALF, SEQ_MASK, Cursor

FAR: Final = 1 << 62  # behind every position


def signed(difference: int) -> int:
    """A difference of TCP sequence numbers, -2**31 .. 2**31-1."""
    difference &= SEQ_MASK
    return difference - SEQ_MASK - 1 if difference >= SEQ_HALF else difference


class Grounds(RxContext):
    """State of one flow and what it stands on."""

    __slots__ = (
        "_ahead",
        "_anchored",
        "_asked",
        "_blind",
        "_confirmed",
        "_in_debt",
        "_muted",
        "_patience",
        "_poisoned",
        "_pool",
        "_spoiled",
        "_top",
        "dropped",
    )

    def __init__(
        self,
        params: ContextParams,
        scratch: memoryview | None = None,
        pool: Pool | None = None,
        history: History | None = None,
    ) -> None:
        """`scratch` as in RxContext, `pool` is shared by the contexts of a device."""
        super().__init__(params, scratch, Ideal(history))
        self._pool = Pool() if pool is None else pool
        self._ahead: Ahead | None = None
        self._anchored = False  # the front has moved: nothing that the device did not see is missing there
        self._muted = params.no_sync
        self._confirmed = not params.no_sync  # muted: the host has answered, or has no need to
        # behind everything that passed; None: nothing is known to have
        self._top: int | None = None if params.no_sync else params.start_seq
        self._asked: tuple[int, int] | None = None  # where a record starts, and its number
        self._patience = Patience()  # with the answer
        self._blind = FAR  # position from which on nothing is remembered
        self._spoiled = -FAR  # position up to which copies of bytes may differ
        self._in_debt = False
        self._poisoned = False
        self.dropped = 0

    @property
    def place(self) -> Cursor | None:
        """See RxContext."""
        return self._cursor if self._state is RxState.IN_SYNC and not self._muted else None

    def lose_sync(self) -> None:
        """See RxContext. In debt, the place cannot be forgotten."""
        if not self._in_debt:
            self._forget()

    def wipe(self) -> None:
        """See RxContext."""
        self._forget()
        super().wipe()

    def describe(self) -> dict[str, object]:
        """See RxContext."""
        ahead = self._ahead
        return {
            **super().describe(),
            "state": self._name(),
            "holes": sum(1 for run in ahead.runs) if ahead is not None else 0,
            "ahead": ahead.store.size if ahead is not None else 0,
            "debt": ahead.debt if ahead is not None and self._in_debt else 0,
            "dropped": self.dropped,
        }

    def _name(self) -> str:
        if self._poisoned:
            return "poisoned"
        if self._cursor is None:
            return "scanning"
        if self._muted:
            return "tracking"
        return "holes" if self._ahead is not None else "in_sync"

    def _forget(self) -> None:
        """Forget the place and all that was kept; everything marked from now on lies behind what has passed."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            if self._cursor is not None:
                self._raise_top((self._cursor.seq + ahead.top - ahead.front) & SEQ_MASK)
            ahead.clear()
        self._set_debt(False)
        self._cursor = self._open = self._asked = None
        self._state = RxState.LOST
        self._muted, self._confirmed = True, False
        self._blind, self._spoiled = FAR, -FAR
        self._strategy.found()

    def _raise_top(self, seq: int) -> None:
        if self._top is None or signed(seq - self._top) > 0:
            self._top = seq

    def _set_debt(self, in_debt: bool) -> None:
        if in_debt == self._in_debt:
            return
        self._in_debt = in_debt
        pair = (self.params.local[0], self.params.remote[0])
        flows = self._pool.indebted
        flows[pair] = flows.get(pair, 0) + (1 if in_debt else -1)
        if not flows[pair]:
            del flows[pair]

    def _poison(self, why: str) -> None:
        cursor = self._cursor
        assert cursor is not None
        self._poisoned = True
        self.history.note(Happened.POISONED, cursor.seq, cursor.number, why)

    def _fail(self, result: RxResult, why: str) -> RxResult:
        """The front cannot be followed any further."""
        if self._in_debt:
            self._poison(why)
            return result
        lost_sync = self.place is not None
        if self._cursor is not None:
            self.history.note(Happened.LOST, self._cursor.seq, self._cursor.number, why)
        self._forget()
        return result._replace(lost_sync=lost_sync)

    # -- the host -----------------------------------------------------------------------------------------------------

    def _take(self, tcp_seq: int, rcd_sn: int) -> bool:
        """See RxContext."""
        cursor, ahead = self._cursor, self._ahead
        if self._poisoned or (cursor is not None and not self._muted and ahead is None):
            return False
        if cursor is not None and ahead is not None and (not self._muted or not self._anchored):
            at = ahead.front + signed(tcp_seq - cursor.seq)
            return ahead.front < at <= ahead.top and self._jump(ahead, at, Cursor(tcp_seq, rcd_sn))
        if cursor is not None and self._asked is not None:
            if tcp_seq != self._asked[0]:
                return False
            if rcd_sn == self._asked[1]:
                self._confirmed = True
            else:
                self._fail(RxResult(), f"record {self._asked[1]} was expected at the place of the answer")
            return True
        return self._track(tcp_seq, rcd_sn)

    def _track(self, tcp_seq: int, rcd_sn: int) -> bool:
        """Go on where the host's answer leads to. One that comes before any packet was meant for another context."""
        if self._top is None:
            return False
        place = self._strategy.answer(None, False, tcp_seq, rcd_sn)
        if self._cursor is not None or place is None or signed(place.seq - self._top) < 0:
            return False
        self._cursor, self._open, self._state = place, None, RxState.HINTED
        self._anchored = True
        self._confirmed = self._confirmed or (place.seq, place.number) == (tcp_seq, rcd_sn)
        if self._confirmed:
            self._muted = False
        self._strategy.found()
        return True

    def _jump(self, ahead: Ahead, at: int, place: Cursor) -> bool:
        """The host has come to `place`, so it has all that is missing before."""
        record = next((record for record in ahead.records if record.start == at), None)
        if self._muted:
            try:
                ahead.restart(at, place.number)
            except Contradiction as contradiction:
                self._fail(RxResult(), str(contradiction))
                return True
            self._muted, self._anchored = False, True
            self._strategy.found()
        elif record is None or not record.run.known:
            return False
        elif record.number != place.number:
            self._fail(RxResult(), f"record {record.number} was expected at the place of the answer")
            return True
        else:
            ahead.jump(record)
            self._set_debt(bool(ahead.debt))
        self._cursor, self._state, self._asked = place, RxState.HINTED, None
        return True

    def _question(self, ahead: Ahead, at: int, data: bytes) -> int | None:
        """Ask about a record start in a packet: while muted, and when a hole is not filled for a long time."""
        cursor = self._cursor
        assert cursor is not None
        if self._muted and not self._anchored:
            return self._pass(cursor.seq, self._seq(ahead, at), memoryview(data)).ask
        if not self._muted and ahead.store.size < MAX_FLOW // 2 and len(ahead.records) < MAX_RECORDS // 2:
            return None
        starts = [r for r in ahead.records if at <= r.start < at + len(data) and r is not ahead.current and r.run.known]
        if not starts:
            return None
        if self._asked is None:
            self._patience.reset()
        elif not self._patience.ends(starts[-1].number - self._asked[1]):
            return None
        self._asked = (self._seq(ahead, starts[-1].start), starts[-1].number)
        self.requested += 1
        self.history.note(Happened.ASKED, *self._asked, why="expected to be that one")
        return self._asked[0]

    def _seq(self, ahead: Ahead, at: int) -> int:
        """TCP sequence number of position `at`."""
        assert self._cursor is not None
        return (self._cursor.seq + at - ahead.front) & SEQ_MASK

    def _unmute(self) -> bool:
        """Mark again, if the host confirmed all that the front stands on, and nothing was marked on other grounds."""
        cursor, asked = self._cursor, self._asked
        if cursor is None or not self._confirmed or not self._anchored:
            return False
        if asked is not None and signed(cursor.seq - asked[0]) < 0:
            return False
        self._muted, self._asked = False, None
        self._strategy.found()
        return asked is not None
