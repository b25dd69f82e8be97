"""Guest to wire: encrypt the records in a packet, in place.

Theory of operation: a packet marked for encryption leaves encrypted or not at all. `encrypt` therefore works in three
steps. It asks whether the packet starts where the context stands (or where its resync puts the context); it walks all
record headers of the packet; only then does it touch a byte. What the first two steps refuse leaves the context as it
was, except where a record header is missing: no stream can continue there, so the context is out of sync until a
resync. Before the third step the context counts as out of sync, and it is in sync again when everything is done:
whatever goes wrong between, no later packet can be encrypted with a wrong state.

Records come framed by the kernel: header, explicit nonce, text, and 16 bytes for the tag. Those 16 bytes are
uninitialised guest memory; every one of them that lies in the packet is overwritten. A record that lies whole in the
packet is sealed in one call, others go through a `SealingRecord`.

A resync says "record rcd_sn starts at record_seq" and brings the bytes from there up to the packet, which are encrypted
too, but only to move the cipher's state to where the packet starts. With no such bytes the packet starts a record: that
is how the next-record personality comes back.

What was encrypted is compared with what left before at the same place (see sent) and must be the same.
"""

from __future__ import annotations

from typing import NamedTuple

from nicdev.errors import TxDrop
from nicdev.stats import Counter
from nicdev.tls.aead import FAULTS, TAG_LEN, BytesLike
from nicdev.tls.context import ContextParams
from nicdev.tls.history import Happened, History
from nicdev.tls.partial import SealingRecord
from nicdev.tls.record import MAX_NUMBER
from nicdev.tls.sent import Sent
from nicdev.tls.store import Pool
from nicdev.tls.walk import SEQ_MASK, Cursor, Walk, walk


class Resync(NamedTuple):
    """Where the context has to stand for a packet; from a TX_TLS extension."""

    record_seq: int  # TCP sequence number where the record starts
    rcd_sn: int  # its number
    prefix: BytesLike  # its bytes from record_seq up to the packet, may be empty


class TxResult(NamedTuple):
    """What was done to a packet that may leave."""

    records: int  # records that ended in it
    plaintext: int  # bytes that were encrypted


_new = tuple.__new__  # a NamedTuple from all its fields, at a third of the price of calling the class


class TxContext:
    """Encryption state of one flow."""

    __slots__ = (
        "_cursor",
        "_fmt",
        "_key",
        "_open",
        "_sent",
        "bytes",
        "history",
        "packets",
        "params",
        "records",
        "resyncs",
    )

    def __init__(self, params: ContextParams, history: History | None = None, sent: Pool | None = None) -> None:
        """`sent` is the memory for what left; without one the context has its own."""
        self.params = params
        self.history = History() if history is None else history
        self._fmt, self._key = params.crypto()
        self._cursor = None if params.no_sync else Cursor(params.start_seq, params.rec_seq)  # None: out of sync
        self._open: SealingRecord | None = None  # the record that the cursor stands in
        self._sent = Sent(Pool() if sent is None else sent)
        self.packets = 0
        self.bytes = 0  # of plaintext
        self.records = 0
        self.resyncs = 0
        if params.no_sync:
            self.history.note(Happened.LOST, why="made without a place")

    def encrypt(self, seq: int, payload: memoryview, resync: Resync | None = None) -> TxResult:
        """Encrypt a TCP payload (writable, not empty) that starts at sequence number `seq`, in place.

        Raises TxDrop with TX_DROP_WRONG_SEQ, _BAD_EXTENSION, _SEQ_WRAP (context and payload as before), _BAD_RECORD
        (payload as before, context out of sync), _CRYPTO or _NONCE_REUSE (payload undefined, context out of sync; as
        before if it is the resync's prefix that differs). A packet for which it raised must not be sent.
        """
        try:
            cursor, record = self._cursor, self._open
            if resync is not None:
                cursor, record = self._rebuild(seq, resync)
            if cursor is None or cursor.seq != seq:
                raise TxDrop(Counter.TX_DROP_WRONG_SEQ)
            if record is not None and record.inside(len(payload)):  # most wire-size packets
                self.lose_sync()
                record.more(payload)
                after, records, plaintext = cursor.inside(len(payload)), 0, len(payload)
            else:
                walked = self._walk(cursor, payload)
                self.lose_sync()
                record, plaintext = self._seal(cursor, walked, record, payload)
                after, records = walked.after, len(walked.ends)
            if not self._sent.admit(seq, payload):
                raise TxDrop(Counter.TX_DROP_NONCE_REUSE)
        except TxDrop as drop:
            self.history.note(Happened.DROPPED, seq, why=drop.counter.name.lower())
            raise
        except FAULTS as error:
            self.lose_sync()
            self.history.note(Happened.DROPPED, seq, why=Counter.TX_DROP_CRYPTO.name.lower())
            raise TxDrop(Counter.TX_DROP_CRYPTO, repr(error)) from error
        self._cursor, self._open = after, record
        self.packets += 1
        self.bytes += plaintext
        self.records += records
        self.resyncs += resync is not None
        return _new(TxResult, (records, plaintext))

    @property
    def place(self) -> Cursor | None:
        """Where the context stands; None while it is out of sync."""
        return self._cursor

    def lose_sync(self) -> None:
        """Forget the place; a resync brings it back."""
        self._cursor = self._open = None

    def wipe(self) -> None:
        """Overwrite all secrets; the context drops every packet from now on."""
        self.lose_sync()
        self._sent.clear()
        self._key.wipe()
        self._fmt.wipe()
        self.params.wipe()

    def describe(self) -> dict[str, object]:
        """Snapshot for control output."""
        cursor = self._cursor
        return {
            **self.params.describe(),
            "state": "in_sync" if cursor else "lost",
            "seq": cursor.seq if cursor else None,
            "record": cursor.number if cursor else None,
            "packets": self.packets,
            "bytes": self.bytes,
            "records": self.records,
            "resyncs": self.resyncs,
        }

    def _walk(self, cursor: Cursor, payload: memoryview) -> Walk:
        """Find the records, or raise TxDrop."""
        walked = walk(self._fmt, cursor, payload)
        if walked is None:
            self.lose_sync()
            raise TxDrop(Counter.TX_DROP_BAD_RECORD)
        if walked.last > MAX_NUMBER:
            raise TxDrop(Counter.TX_DROP_SEQ_WRAP)
        return walked

    def _rebuild(self, seq: int, resync: Resync) -> tuple[Cursor, SealingRecord | None]:
        """Cursor and partial record at `seq`, from what the driver knows; the context itself is not changed."""
        prefix = memoryview(resync.prefix)
        if (resync.record_seq + len(prefix)) & SEQ_MASK != seq:
            raise TxDrop(Counter.TX_DROP_BAD_EXTENSION, "the prefix does not end where the packet starts")
        self.history.note(Happened.REBUILT, resync.record_seq, resync.rcd_sn, f"prefix of {len(prefix)} bytes")
        start = Cursor(resync.record_seq, resync.rcd_sn)
        if not prefix:
            return start, None
        walked = self._walk(start, prefix)
        if walked.ends:
            raise TxDrop(Counter.TX_DROP_BAD_EXTENSION, "the prefix is longer than its record")
        record = SealingRecord(self._fmt, self._key, resync.rcd_sn)
        encrypted = memoryview(bytearray(prefix))
        record.feed(prefix, encrypted)
        if self._sent.differs(resync.record_seq, encrypted):
            raise TxDrop(Counter.TX_DROP_NONCE_REUSE, "the prefix is not what was sent")
        return walked.after, record

    def _seal(
        self, cursor: Cursor, walked: Walk, record: SealingRecord | None, payload: memoryview
    ) -> tuple[SealingRecord | None, int]:
        """Encrypt everything in `payload`; the record that it ends in, if it does, and the bytes encrypted."""
        fmt, key = self._fmt, self._key
        prefix, sealing, seal = fmt.prefix, fmt.sealing, key.seal
        number = cursor.number
        plaintext = 0
        start = 0
        for end in walked.ends:
            if record is not None:
                piece = payload[:end]
                plaintext += record.feed(piece, piece)
                record = None
            else:
                text = start + prefix
                seal(*sealing(number, payload, start), payload[text : end - TAG_LEN], payload[text:end])
                plaintext += end - TAG_LEN - text
            number += 1
            start = end
        if start < len(payload):
            if record is None:
                record = SealingRecord(fmt, key, number)
            piece = payload[start:]
            plaintext += record.feed(piece, piece)
        return record, plaintext
