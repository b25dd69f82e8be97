"""How an rx context that lost its place is told where to go on: one class per personality.

Theory of operation: `rx` knows where it stands, follows the stream while it can, and says so when it cannot. Everything
that differs between kinds of NIC is what happens then: who finds the next record, and what an RX_RESYNC command means.
That is a strategy's business. It holds no keys and sees no cipher state; it answers with a cursor to stand at, or None
to stay.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

from nicdev.tls.chain import Chain
from nicdev.tls.history import Happened, History
from nicdev.tls.record import RecordFormat
from nicdev.tls.walk import SEQ_HALF, SEQ_MASK, Cursor

FIRST_WAIT: Final = 16  # records


class Question(NamedTuple):
    """What the host is to be told or asked with a packet; the fields are those of RxResult."""

    ask: int | None = None
    opened: tuple[int, int] | None = None
    guess: int | None = None
    cancelled: bool = False


NO_QUESTION: Final = Question()


class ResyncStrategy(Protocol):
    """A way to find one's place again; `name` is that of the personality, `history` that of the context."""

    name: str
    history: History

    def passed(self, fmt: RecordFormat, expected: int | None, seq: int, payload: memoryview) -> Question:
        """A packet behind the cursor went by while the context is lost.

        `expected` is the TCP sequence number of the cursor, None if there is none.
        """

    def found(self) -> bool:
        """The context is in sync: what was noted while it was lost is of no use any more.

        True if the host must be told that an attempt is abandoned.
        """

    def answer(self, cursor: Cursor | None, in_sync: bool, tcp_seq: int, rcd_sn: int) -> Cursor | None:
        """Where to stand after an RX_RESYNC command, or None to stay at `cursor` (None: nowhere)."""


class CoreNextHint:
    """core-next-hint (nfp): after a few records that the kernel had to decrypt itself, it tells where the next starts.

    The kernel sends the hint when it has read all that arrived, but packets race with it: in a stream that never pauses
    the record has passed when the device hears of it. So a lost device follows the headers that pass, and knows from a
    hint about one of them which record the stream has come to. Any other hint ahead of the cursor is where to stand:
    the packet that covers it resumes. One behind the cursor is of no use, and the kernel backs off and tries again.
    """

    __slots__ = ("_chain", "history")
    name = "core-next-hint"

    def __init__(self, history: History | None = None) -> None:
        self.history = History() if history is None else history
        self._chain: Chain | None = None

    def passed(self, fmt: RecordFormat, expected: int | None, seq: int, payload: memoryview) -> Question:
        """See ResyncStrategy. Nothing is asked."""
        self._follow(fmt, seq, payload)
        return NO_QUESTION

    def _follow(self, fmt: RecordFormat, seq: int, payload: memoryview) -> Chain:
        if self._chain is None:
            self.history.note(Happened.SCANNING, seq)
            self._chain = Chain(self.history)
        self._chain.follow(fmt, seq, payload)
        return self._chain

    def found(self) -> bool:
        """See ResyncStrategy."""
        self._chain = None
        return False

    def answer(self, cursor: Cursor | None, in_sync: bool, tcp_seq: int, rcd_sn: int) -> Cursor | None:
        """See ResyncStrategy; record `rcd_sn` starts at `tcp_seq`, where the stream will be or was."""
        if not in_sync and self._chain is not None:
            place = self._chain.place(tcp_seq, rcd_sn)
            if place is not None:
                return place
        return _next_hint(cursor, in_sync, tcp_seq, rcd_sn)


def _next_hint(cursor: Cursor | None, in_sync: bool, tcp_seq: int, rcd_sn: int) -> Cursor | None:
    """Where to stand when record `rcd_sn` starts at `tcp_seq`, as far as the cursor knows."""
    hint = Cursor(tcp_seq, rcd_sn)
    if cursor is None:
        return hint
    ahead = (tcp_seq - cursor.seq) & SEQ_MASK
    if ahead >= SEQ_HALF:
        return None
    if in_sync and hint == (cursor.skip(ahead) if ahead else cursor):
        return None  # no news
    return hint


class Patience:
    """For how many records a question stands until another takes its place: for twice as many each time.

    There may be no answer: it is lost, or the host read that record before the device existed and was sent it again. A
    host that is behind with reading, though, would see a question that moves on in even steps move away forever.
    """

    __slots__ = ("_records",)

    def __init__(self) -> None:
        self._records = FIRST_WAIT

    def reset(self) -> None:
        """The next question is a first one."""
        self._records = FIRST_WAIT

    def ends(self, records: int) -> bool:
        """Whether a question that has stood for so many records is to be replaced."""
        if records < self._records:
            return False
        self._records *= 2
        return True


class Ideal(CoreNextHint):
    """ideal: asks the host at once for the number of a record that passes, and takes a hint as it takes an answer.

    The question travels with the packet that holds the header, so the host meets it before the record. It is asked
    again when patience ends, and at once if the answer could not be related: the chain began anew, or is too long.
    """

    __slots__ = ("_asked", "_patience")
    name = "ideal"

    def __init__(self, history: History | None = None) -> None:
        super().__init__(history)
        self._asked: int | None = None
        self._patience = Patience()

    def passed(self, fmt: RecordFormat, expected: int | None, seq: int, payload: memoryview) -> Question:
        """See ResyncStrategy."""
        chain = self._follow(fmt, seq, payload)
        stands = None if self._asked is None else chain.since(self._asked)
        if stands is None:
            self._patience.reset()
        if chain.last is None or (stands is not None and not self._patience.ends(stands)):
            return NO_QUESTION
        self._asked = chain.last
        return Question(ask=self._asked)

    def found(self) -> bool:
        """See ResyncStrategy."""
        self._asked = None
        return super().found()
