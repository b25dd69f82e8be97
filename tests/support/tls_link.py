"""Packets of one stream of records, in any order, into one rx context; and what the context's history says of them."""

from __future__ import annotations

from nicdev.abi import Direction, RxPersonality
from nicdev.tls.personality import rx_context
from nicdev.tls.rx import RxContext, RxResult
from nicdev.tls.store import Pool
from nicdev.tls.tx import TxContext
from tests.support.tls_oracle import GCM_1_2, Stream, Suite, stream

BASE = 0xFFFFFF00  # sequence number of a stream's first byte
FIRST = 5  # number of its first record
SIZE = 100  # of a record of `small`
Told = tuple[str, int | None, int | None]  # kind, offset in the stream, record counted from the first


def decrypt(rx: RxContext, seq: int, buffer: bytearray) -> RxResult:
    """What the host gets of a packet is in `buffer` then; the verdict, without that."""
    wire = bytes(buffer)
    result = rx.decrypt(seq % 2**32, memoryview(buffer))
    assert buffer == wire, "what came is never written to"
    if result.text is not None:
        buffer[:] = result.text
    return result._replace(text=None)


class Link:
    """A stream and a context; `packet` sends bytes a..b of the stream and checks them for what the verdict claims."""

    def __init__(self, records: Stream, rx: RxContext | None = None) -> None:
        self.records = records
        self.rx = RxContext(records.suite.params(Direction.RX, BASE, records.first_number)) if rx is None else rx

    def packet(self, a: int, b: int) -> RxResult:
        buffer = bytearray(self.records.wire[a:b])
        result = decrypt(self.rx, BASE + a, buffer)
        expected = self.records.clear if result.decrypted else self.records.wire
        assert buffer == expected[a:b]
        return result

    def marks(self, *spans: tuple[int, int]) -> str:
        """One letter per packet: D decrypted, - left alone, L left alone and sync lost just then."""
        results = [self.packet(a, b) for a, b in spans]
        return "".join("D" if r.decrypted else "L" if r.lost_sync else "-" for r in results)

    def resync(self, index: int) -> bool:
        """The kernel's hint that names the start of record `index` of the stream."""
        return self.rx.resync((BASE + self.records.starts()[index]) % 2**32, self.records.first_number + index)

    @property
    def state(self) -> object:
        return self.rx.describe()["state"]


def small(count: int = 12, suite: Suite = GCM_1_2) -> Stream:
    """Records of SIZE bytes."""
    return stream(suite, [SIZE - 21 - suite.explicit - (suite.version == 0x0304)] * count)


def link(
    personality: RxPersonality, records: Stream | None = None, *, no_sync: bool = False, pool: Pool | None = None
) -> Link:
    """A stream, of small records unless others are given, and a context of this personality."""
    records = small() if records is None else records
    params = records.suite.params(Direction.RX, BASE, records.first_number, no_sync=no_sync, rx_personality=personality)
    return Link(records, rx_context(params, pool=pool))


def told(context: RxContext | TxContext) -> list[Told]:
    """The history, in offsets of the stream and records counted from its first."""
    return [
        (
            str(event.what),
            None if event.seq is None else (event.seq - BASE) % 2**32,
            None if event.record is None else event.record - FIRST,
        )
        for event in context.history.events
    ]


def why(context: RxContext | TxContext) -> list[str]:
    return [event.why for event in context.history.events]
