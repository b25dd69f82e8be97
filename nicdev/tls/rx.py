"""Wire to guest: decrypt the records in a packet, or leave the packet alone.

Theory of operation: the verdict is about whole packets. Either every TLS byte of a packet was decrypted and every tag
in it is right; then the host gets, marked, a payload with plaintext in place of the ciphertext, and framing (header,
explicit nonce, tag) as it was. Or the packet stays exactly what was on the wire. So what came is never written to: the
other payload is put together in a scratch buffer. The verdict on a record that spans packets falls in the packet that
ends it; packets before were marked already, and the kernel, finding marked and unmarked packets in one record,
re-encrypts the marked ones and decrypts the record itself.

The context stands at a `Cursor`. For each packet:

    starts there          walk its records, decrypt
    ends before it        old data: leave it alone
    reaches across it     leave it alone, but follow the new part
    starts behind it      a hole. If the hole cannot hide a record header, the rest of the current record is left alone
                          and the next one is decrypted. Else: lost, leave packets alone, stay.

In a packet that is left alone, a record that begins in it and ends in a later one is still fed to its cipher, so that
the later packets can be decrypted; without this, a stream whose packets never start with a record would never come
back. A record of which bytes were missed (`_open` is None in mid-record) is left alone up to its end.

Lost means only that packets behind the cursor cannot be read; the cursor itself still holds. So a lost context goes on
by itself when the missing packet arrives late, and a resync only has to put the cursor elsewhere: see `resync`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

from nicdev.abi import MAX_TCP_PAYLOAD
from nicdev.tls.aead import FAULTS, TAG_LEN
from nicdev.tls.context import ContextParams
from nicdev.tls.history import Happened
from nicdev.tls.partial import OpeningRecord
from nicdev.tls.record import MAX_NUMBER
from nicdev.tls.resync import NO_QUESTION, CoreNextHint, Question, ResyncStrategy
from nicdev.tls.walk import SEQ_HALF, SEQ_MASK, Cursor, Walk, walk

# No TCP window is larger (RFC 7323 2.3). A lost context forgets a cursor this far behind, lest it match when the
# sequence numbers have wrapped.
MAX_HOLE: Final = 1 << 30


class RxState(IntEnum):
    """Whether packets can be read."""

    IN_SYNC = 0
    LOST = 1  # until a resync, or until data at the cursor arrives after all
    HINTED = 2  # a resync put the cursor where it is; no packet has covered it yet


class RxResult(NamedTuple):
    """The verdict on a packet."""

    decrypted: bool = False
    records: int = 0  # records that ended in a decrypted packet: their tags are right
    plaintext: int = 0  # bytes decrypted
    text: memoryview | None = None  # what the host gets in place of the payload; good until the next packet of any flow
    auth_failed: int = 0  # records whose tag is wrong
    error: bool = False  # left alone because of an error: wrong tag, no header where one must be
    lost_sync: bool = False  # in sync before this packet, not any more
    resynced: bool = False  # a resync took effect with this packet
    ask: int | None = None  # where a record seems to start (TCP sequence number): the host is to tell its number
    drop: bool = False  # the packet must not reach the host: see ideal
    opened: tuple[int, int] | None = None  # driver-req-async: an attempt opens; TCP sequence number and length
    guess: int | None = None  # driver-req-async: the attempt ends, a record seems to start here
    cancelled: bool = False  # driver-req-async: the attempt is abandoned


_UNTOUCHED: Final = RxResult()
_NOTHING_ASKED: Final = _UNTOUCHED[8:]  # all that follows `resynced`
_NOTHING_WRONG: Final = _UNTOUCHED[4:]  # all that follows `text`
_new = tuple.__new__  # a NamedTuple from all its fields, at a third of the price of calling the class


class RxContext:
    """Decryption state of one flow."""

    __slots__ = (
        "_cursor",
        "_fmt",
        "_key",
        "_open",
        "_scratch",
        "_state",
        "_strategy",
        "_withdrawn",
        "answered",
        "auth_failed",
        "bytes",
        "history",
        "losses",
        "packets",
        "params",
        "passed",
        "records",
        "requested",
        "resyncs",
    )

    def __init__(
        self, params: ContextParams, scratch: memoryview | None = None, strategy: ResyncStrategy | None = None
    ) -> None:
        """`scratch` (MAX_TCP_PAYLOAD bytes) may be shared by contexts that never decrypt at the same time."""
        self.params = params
        self._fmt, self._key = params.crypto()
        self._scratch = memoryview(bytearray(MAX_TCP_PAYLOAD)) if scratch is None else scratch
        self._strategy = CoreNextHint() if strategy is None else strategy
        self.history = self._strategy.history
        self._cursor = None if params.no_sync else Cursor(params.start_seq, params.rec_seq)
        self._state = RxState.LOST if params.no_sync else RxState.IN_SYNC
        self._open: OpeningRecord | None = None  # the record that the cursor stands in, if all of it was seen
        self._withdrawn = False  # the host is to be told that the attempt is abandoned
        self.packets = 0  # decrypted
        self.passed = 0  # left alone
        self.bytes = 0  # of plaintext
        self.records = 0
        self.auth_failed = 0
        self.losses = 0
        self.resyncs = 0
        self.requested = 0  # questions to the host
        self.answered = 0  # answers of it that were of use
        if params.no_sync:
            self.history.note(Happened.LOST, why="made without a place")

    def decrypt(self, seq: int, payload: memoryview) -> RxResult:
        """Decrypt a TCP payload (1..MAX_TCP_PAYLOAD bytes, only read) that starts at `seq`, or leave it alone."""
        result = self._place(seq, payload)
        if result.decrypted:
            self.packets += 1
            self.bytes += result.plaintext
            self.records += result.records
        else:
            self.passed += 1
            self.auth_failed += result.auth_failed
            self.losses += result.lost_sync
        self.resyncs += result.resynced
        if self._withdrawn:
            self._withdrawn = False
            self.history.note(Happened.CANCELLED)
            return result._replace(cancelled=True)
        return result

    def resync(self, tcp_seq: int, rcd_sn: int) -> bool:
        """Take an RX_RESYNC command; False if it changes nothing. Sequence number and record number in host order."""
        in_sync = self._state is RxState.IN_SYNC
        if not self._take(tcp_seq, rcd_sn):
            self.history.note(
                Happened.REFUSED, tcp_seq, rcd_sn, "in sync" if in_sync else "nothing known of that place"
            )
            return False
        self.answered += 1
        late = self._cursor.number - rcd_sn if self._cursor is not None else 0
        self.history.note(Happened.ANSWER, tcp_seq, rcd_sn, f"{late} records later" if late > 0 else "")
        return True

    def _take(self, tcp_seq: int, rcd_sn: int) -> bool:
        """What `resync` says."""
        cursor = self._strategy.answer(self._cursor, self._state is RxState.IN_SYNC, tcp_seq, rcd_sn)
        if cursor is None:
            return False
        self._cursor, self._open, self._state = cursor, None, RxState.HINTED
        return True

    @property
    def place(self) -> Cursor | None:
        """Where the context stands; None while it is not in sync."""
        return self._cursor if self._state is RxState.IN_SYNC else None

    def lose_sync(self) -> None:
        """Forget the place, as after a loss that nothing repairs; a resync brings it back."""
        self._cursor = self._open = None
        self._state = RxState.LOST

    def wipe(self) -> None:
        """Overwrite all secrets; every packet is left alone from now on."""
        self.lose_sync()
        self._key.wipe()
        self._fmt.wipe()
        self.params.wipe()

    def describe(self) -> dict[str, object]:
        """Snapshot for control output."""
        cursor = self._cursor
        return {
            **self.params.describe(),
            "personality": self._strategy.name,
            "state": self._state.name.lower(),
            "seq": cursor.seq if cursor else None,
            "record": cursor.number if cursor else None,
            "packets": self.packets,
            "passed": self.passed,
            "bytes": self.bytes,
            "records": self.records,
            "records_software": self._left_to_software(),
            "auth_failed": self.auth_failed,
            "losses": self.losses,
            "requested": self.requested,
            "answered": self.answered,
            "resyncs": self.resyncs,
        }

    def _left_to_software(self) -> int | None:
        """How many records before the place the host had to decrypt, by what passed; None if that cannot be told."""
        if self._cursor is None or self.params.no_sync:
            return None
        return self._cursor.number - self.params.rec_seq - self.records

    def _place(self, seq: int, payload: memoryview) -> RxResult:
        """Compare the packet with the cursor."""
        cursor = self._cursor
        if cursor is None:
            return RxResult(**self._pass(None, seq, payload)._asdict())
        gap = (seq - cursor.seq) & SEQ_MASK
        if not gap:
            return self._follow(cursor, self._open, payload, True)
        if gap >= SEQ_HALF:
            old = SEQ_MASK + 1 - gap
            return self._follow(cursor, self._open, payload[old:], False) if old < len(payload) else _UNTOUCHED
        beyond = cursor.skip(gap)
        if beyond is not None:
            self.history.note(Happened.GAP, cursor.seq, cursor.number, f"{gap} bytes, without a header")
            return self._follow(beyond, None, payload, True)
        if gap >= MAX_HOLE:
            self._cursor = self._open = None
        lost = self._lose(cursor, f"{gap} bytes missing")
        return lost._replace(**self._pass(cursor.seq, seq, payload)._asdict())

    def _pass(self, expected: int | None, seq: int, payload: memoryview) -> Question:
        """A packet goes by while the context is lost; what the host is asked with it. See ResyncStrategy.passed."""
        question = self._strategy.passed(self._fmt, expected, seq, payload)
        if question is not NO_QUESTION:
            self._note_question(question)
        return question

    def _note_question(self, question: Question) -> None:
        note = self.history.note
        self.requested += question.ask is not None or question.opened is not None
        if question.ask is not None:
            note(Happened.ASKED, question.ask)
        elif question.opened is not None:
            note(Happened.OPENED, question.opened[0], why=f"{question.opened[1]} bytes")
        elif question.guess is not None:
            note(Happened.SUBMITTED, question.guess)
        else:
            note(Happened.CANCELLED)

    def _follow(self, cursor: Cursor, record: OpeningRecord | None, payload: memoryview, whole: bool) -> RxResult:
        """Handle a payload that starts at `cursor`; `whole` if that is the whole packet."""
        in_sync = self._state is RxState.IN_SYNC
        if record is not None and whole and in_sync and record.inside(len(payload)) and self._trusted():
            return self._inside(cursor, record, payload)
        walked = walk(self._fmt, cursor, payload)
        if walked is None or walked.last > MAX_NUMBER:
            return self._lose(cursor, "no header where one must be", error=True)
        resynced = self._state is RxState.HINTED
        if not in_sync:
            by = "the host's answer" if resynced else "the missing packet came"
            self.history.note(Happened.IN_SYNC, cursor.seq, cursor.number, by)
            self._withdrawn = self._strategy.found()
        self._cursor, self._open, self._state = walked.after, None, RxState.IN_SYNC
        try:
            if whole and (record is not None or not cursor.pos):
                return self._decrypt(cursor, walked, record, payload, resynced)
            self._open = self._carry(cursor, walked, record, payload)
        except FAULTS as error:
            self.history.note(Happened.ERROR, cursor.seq, cursor.number, type(error).__name__)
            return RxResult(error=True, resynced=resynced)
        return RxResult(resynced=True) if resynced else _UNTOUCHED

    def _inside(self, cursor: Cursor, record: OpeningRecord, payload: memoryview) -> RxResult:
        """A packet that is text of the open record to its last byte, as most of wire size are: no tag can be wrong."""
        text = self._scratch[: len(payload)]
        self._cursor = cursor.inside(len(payload))
        try:
            record.more(payload, text)
        except FAULTS as error:
            self._open = None
            self.history.note(Happened.ERROR, cursor.seq, cursor.number, type(error).__name__)
            return RxResult(error=True)
        return _new(RxResult, (True, 0, len(payload), text, *_NOTHING_WRONG))

    def _lose(self, cursor: Cursor, why: str, error: bool = False) -> RxResult:
        """What follows cannot be read; `cursor` is where the context stands."""
        lost_sync = self._state is RxState.IN_SYNC
        if lost_sync or (error and self._state is RxState.HINTED):
            self.history.note(Happened.LOST, cursor.seq, cursor.number, why)
        if lost_sync or error or self._cursor is None:
            self._state = RxState.LOST
        return RxResult(error=error, lost_sync=lost_sync)

    def _decrypt(
        self, cursor: Cursor, walked: Walk, record: OpeningRecord | None, payload: memoryview, resynced: bool
    ) -> RxResult:
        """Decrypt everything in `payload`."""
        scratch, open_, sealing, prefix = self._scratch, self._key.open, self._fmt.sealing, self._fmt.prefix
        first = record
        number = cursor.number
        failed: list[int] = []
        start = 0
        texts: list[tuple[int, int]] = []  # where plaintext is
        for end in walked.ends:
            if record is not None:
                texts.append(record.feed(payload[:end], scratch[:end]))
                if not record.verify():
                    failed.append(number)
                record = None
            else:
                text, text_end = start + prefix, end - TAG_LEN
                if not open_(*sealing(number, payload, start), payload[text:end], scratch[text:text_end]):
                    failed.append(number)
                texts.append((text, text_end))
            number += 1
            start = end
        if start < len(payload):
            if record is None:
                record = OpeningRecord(self._fmt, self._key, number)
            text, text_end = record.feed(payload[start:], scratch[start:])
            texts.append((start + text, start + text_end))
        self._open = record
        if failed:
            self.history.note(Happened.AUTH_FAILED, cursor.seq, failed[0], f"{len(failed)} of the packet's records")
            return RxResult(auth_failed=len(failed), error=True, resynced=resynced)
        if not self._markable(cursor, first, walked, payload):
            return RxResult(resynced=resynced)
        plaintext, whole = self._framed(texts, payload)
        return _new(RxResult, (True, len(walked.ends), plaintext, whole, 0, False, False, resynced, *_NOTHING_ASKED))

    def _framed(self, texts: list[tuple[int, int]], payload: memoryview) -> tuple[int, memoryview]:
        """Put the payload's framing around the plaintext in scratch; how many bytes that is, and both together."""
        scratch = self._scratch
        plaintext = at = 0
        for text, text_end in texts:
            scratch[at:text] = payload[at:text]
            plaintext += text_end - text
            at = text_end
        scratch[at : len(payload)] = payload[at:]
        return plaintext, scratch[: len(payload)]

    def _markable(self, cursor: Cursor, first: OpeningRecord | None, walked: Walk, payload: memoryview) -> bool:
        """Whether a packet that could be decrypted may be marked; `first` is the record that it began in."""
        return True

    def _trusted(self) -> bool:
        """Whether packets of the open record may be marked before its tag is seen."""
        return True

    def _carry(
        self, cursor: Cursor, walked: Walk, record: OpeningRecord | None, payload: memoryview
    ) -> OpeningRecord | None:
        """Follow a payload that is left alone; the record that it ends in, if it does and all of it was seen."""
        start = walked.ends[-1] if walked.ends else 0
        if start == len(payload):
            return None
        if walked.ends or not cursor.pos:
            record = OpeningRecord(self._fmt, self._key, walked.after.number)
        if record is not None:
            record.feed(payload[start:], self._scratch[start:])
        return record
