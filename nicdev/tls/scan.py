"""Finding records again as hardware does it: driver-req and driver-req-async.

Theory of operation (tls-offload.rst, "Stream scan resynchronization"): no packet is kept, none is looked at twice. Once
the stream is more than a longest record beyond the expected place, a `Scan` looks for something like a header, follows
the lengths from there, and starts anew where a predicted header is none. It counts records since the match, so that an
answer of the host about the match tells the number of the record that the stream has come to. Decoys are found out by
the chain, or never confirmed by the host: there is no negative answer. A question of which nothing is heard for
`RESCAN_AFTER` records is given up.

driver-req asks with the packet that holds the match. driver-req-async (mlx5) tells with that packet only that an
attempt begins, so that the kernel notes the record starts in it; which one is meant it says when `CONFIRM_HEADERS` more
headers were where they had to be. An attempt that breaks before is cancelled.
"""

from __future__ import annotations

from typing import Final

from nicdev.tls.history import Happened, History
from nicdev.tls.record import HEADER_LEN, RecordFormat
from nicdev.tls.resync import NO_QUESTION, Question
from nicdev.tls.walk import SEQ_HALF, SEQ_MASK, Cursor, walk

RESCAN_AFTER: Final = 256  # records
CONFIRM_HEADERS: Final = 3
MAX_CANDIDATES: Final = 16  # per packet
_VERSION: Final = b"\x03\x03"


class Scan:
    """Record headers from a match on; numbers count from it."""

    __slots__ = ("_begun", "_history", "cursor", "start")

    def __init__(self, history: History) -> None:
        self._history = history
        self._begun = False
        self.start = 0  # TCP sequence number of the match
        self.cursor: Cursor | None = None  # behind what was followed; None: no match

    def stop(self) -> None:
        """The place is found."""
        self._begun, self.cursor = False, None

    def follow(self, fmt: RecordFormat, seq: int, payload: memoryview) -> bool:
        """Go on through a packet (not empty, only read).

        False if there is no match (any more): a predicted header is not there, is missed, or no answer comes.
        """
        if self.cursor is None:
            return False
        if not self._follow(self.cursor, fmt, seq, payload):
            self._history.note(Happened.REJECTED, self.start, why="no header where one must be, or none was seen")
        elif self.cursor.number > RESCAN_AFTER:
            self._history.note(Happened.REJECTED, self.start, why=f"no answer for {RESCAN_AFTER} records")
            self.cursor = None
        return self.cursor is not None

    def _follow(self, cursor: Cursor, fmt: RecordFormat, seq: int, payload: memoryview) -> bool:
        gap = (seq - cursor.seq) & SEQ_MASK
        if gap >= SEQ_HALF:
            return True  # old: not looked at
        place = cursor.skip(gap) if gap else cursor
        walked = None if place is None else walk(fmt, place, payload)
        self.cursor = None if walked is None else walked.after
        return walked is not None

    def find(self, fmt: RecordFormat, seq: int, payload: memoryview) -> bool:
        """Match the first thing in a packet that looks like a header and leads to others up to the packet's end."""
        if not self._begun:
            self._begun = True
            self._history.note(Happened.SCANNING, seq)
        data = bytes(payload)
        at = 0
        for _ in range(MAX_CANDIDATES):
            at = data.find(_VERSION, at + 1)
            start = at - 1
            if at < 0 or start + HEADER_LEN > len(data):
                return False
            self.start = (seq + start) & SEQ_MASK
            if fmt.total(data, start) and self._follow(Cursor(self.start, 0), fmt, self.start, payload[start:]):
                self._history.note(Happened.CANDIDATE, self.start)
                return True
        return False


class DriverReq:
    """driver-req: asks the host about a match, and relates the answer to where the stream is by then."""

    __slots__ = ("_scan", "history")
    name = "driver-req"

    def __init__(self, history: History | None = None) -> None:
        self.history = History() if history is None else history
        self._scan = Scan(self.history)

    def passed(self, fmt: RecordFormat, expected: int | None, seq: int, payload: memoryview) -> Question:
        """See ResyncStrategy."""
        if not beyond_a_record(fmt, expected, seq, payload):
            return NO_QUESTION
        scan = self._scan
        if scan.follow(fmt, seq, payload):
            return NO_QUESTION
        return Question(ask=scan.start) if scan.find(fmt, seq, payload) else NO_QUESTION

    def found(self) -> bool:
        """See ResyncStrategy."""
        self._scan.stop()
        return False

    def answer(self, cursor: Cursor | None, in_sync: bool, tcp_seq: int, rcd_sn: int) -> Cursor | None:
        """See ResyncStrategy. Only the answer to the question that stands is of use."""
        return None if in_sync else related(self._scan, tcp_seq, rcd_sn)


class DriverReqAsync:
    """driver-req-async: opens an attempt with the match, submits it when it has proven itself, or cancels."""

    __slots__ = ("_open", "_scan", "history")
    name = "driver-req-async"

    def __init__(self, history: History | None = None) -> None:
        self.history = History() if history is None else history
        self._scan = Scan(self.history)
        self._open = False  # an attempt is, its guess not yet submitted

    def passed(self, fmt: RecordFormat, expected: int | None, seq: int, payload: memoryview) -> Question:
        """See ResyncStrategy. A packet carries one message at most."""
        if not beyond_a_record(fmt, expected, seq, payload):
            return NO_QUESTION
        scan = self._scan
        if scan.follow(fmt, seq, payload):
            if self._open and scan.cursor is not None and scan.cursor.number >= CONFIRM_HEADERS:
                self._open = False
                return Question(guess=scan.start)
            return NO_QUESTION
        if self._open:
            self._open = False
            return Question(cancelled=True)
        if not scan.find(fmt, seq, payload):
            return NO_QUESTION
        self._open = True
        return Question(opened=(seq, len(payload)))

    def found(self) -> bool:
        """See ResyncStrategy."""
        cancel, self._open = self._open, False
        self._scan.stop()
        return cancel

    def answer(self, cursor: Cursor | None, in_sync: bool, tcp_seq: int, rcd_sn: int) -> Cursor | None:
        """See ResyncStrategy. Only the answer to the guess that was submitted is of use."""
        return None if in_sync or self._open else related(self._scan, tcp_seq, rcd_sn)


def beyond_a_record(fmt: RecordFormat, expected: int | None, seq: int, payload: memoryview) -> bool:
    """Whether the stream is more than a longest record beyond the expected place, so that it cannot be in that one."""
    if expected is None:
        return True
    return (seq + len(payload) - expected) & SEQ_MASK > HEADER_LEN + fmt.max_length


def related(scan: Scan, tcp_seq: int, rcd_sn: int) -> Cursor | None:
    """Where the stream is, if record `rcd_sn` starts at `tcp_seq`; None if that is not where the match was."""
    if scan.cursor is None or tcp_seq != scan.start:
        return None
    return scan.cursor._replace(number=rcd_sn + scan.cursor.number)
