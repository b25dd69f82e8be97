"""Which packet belongs to which context, and where in its record stream.

Theory of operation: the context table tells of every context that comes and goes. From its `start_seq` on, a
`Follower` reads the five clear header bytes of each record as they pass and so knows where every record begins, before
any fault of ours has acted. Bytes may come in any order; what lies behind a missing header is kept for a while (it
belongs to no record until then). Positions are bytes from the start of the context, they do not wrap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from struct import Struct
from typing import Any, Final, Literal, NamedTuple

from nicdev.abi import Cipher, Direction, TlsVersion
from nicdev.faults.scenario import Part
from nicdev.tls.context import ContextParams, Endpoint
from nicdev.tls.rx import RxContext
from nicdev.tls.tx import TxContext
from nicdev.tls.walk import Cursor

HEADER_LEN: Final = 5
TAG_LEN: Final = 16
MAX_LENGTH: Final = (1 << 14) + 2048  # of a record without its header; RFC 5246 6.2.3
MAX_KEPT_RECORDS: Final = 8192  # starts known per flow; older ones are forgotten
MAX_STASH: Final = 1 << 20  # bytes kept per flow behind a missing header
_HEADER: Final = Struct(">BHH")
_HALF: Final = 1 << 31
_MASK: Final = 0xFFFFFFFF


class Follower:
    """Record boundaries of one stream. Record numbers count from the context's first."""

    def __init__(self, start_seq: int, prefix: int, first: Cursor, rec_seq: int) -> None:
        """`prefix`: header and explicit nonce in bytes; `first`: a known place in the stream."""
        self._start_seq = start_seq
        self._prefix = prefix
        self._first = first.number - rec_seq  # number of the record that starts at _starts[0]
        begin = ((first.seq - start_seq) & _MASK) - first.pos
        self._starts = [begin, begin + first.size] if first.size else [begin]
        self._head = first.head  # of the record at _starts[-1]
        self._stash: list[tuple[int, bytes]] = []
        self._stashed = 0
        self.lost = False

    @property
    def headers(self) -> int:
        """Records whose header has passed, counted from the context's start."""
        return self._first + len(self._starts) - 1

    def position(self, seq: int) -> int:
        """The byte of the stream that has this TCP sequence number, the one nearest to where records are read."""
        near = self._starts[-1]
        return near + ((seq - self._start_seq - near + _HALF) & _MASK) - _HALF

    def feed(self, at: int, payload: memoryview) -> None:
        """Look at the bytes that start at position `at`."""
        if self.lost or at + len(payload) <= self._wanted:
            return
        if at > self._wanted:
            if self._stashed + len(payload) > MAX_STASH:
                self._lose()
                return
            self._stash.append((at, bytes(payload)))
            self._stashed += len(payload)
            return
        self._read(at, payload)
        while ready := [piece for piece in self._stash if piece[0] <= self._wanted]:
            self._stash = [piece for piece in self._stash if piece[0] > self._wanted]
            for at_, piece in ready:
                self._stashed -= len(piece)
                self._read(at_, memoryview(piece))

    def span(self, record: int, part: Part | None = None, byte: int | None = None) -> tuple[int, int] | None:
        """Positions [from, to) of a record, its part, or one byte of these; None if not (or no longer) known."""
        index = record - self._first
        if self.lost or not 0 <= index < len(self._starts):
            return None
        start = self._starts[index]
        end = self._starts[index + 1] if index + 1 < len(self._starts) else 0
        if part is Part.HEADER or (part is None and not end):
            low, high = start, start + HEADER_LEN
        elif not end:
            return None
        elif part is Part.NONCE:
            low, high = start + HEADER_LEN, start + self._prefix
        elif part is Part.TAG:
            low, high = end - TAG_LEN, end
        else:
            low, high = (start + self._prefix, end - TAG_LEN) if part is Part.PAYLOAD else (start, end)
        if byte is not None:
            low, high = low + byte, min(high, low + byte + 1)
        return (low, high) if low < high else None

    @property
    def _wanted(self) -> int:
        """Position of the next header byte to be read."""
        return self._starts[-1] + len(self._head)

    def _read(self, at: int, payload: memoryview) -> None:
        """Read the headers in a payload that holds the wanted byte or ends before it."""
        while not self.lost and at <= self._wanted < at + len(payload):
            start = self._starts[-1]
            self._head += payload[self._wanted - at : start + HEADER_LEN - at]
            if len(self._head) < HEADER_LEN:
                return
            kind, version, length = _HEADER.unpack(self._head)
            if not 20 <= kind <= 24 or version != TlsVersion.TLS_1_2 or not TAG_LEN <= length <= MAX_LENGTH:
                self._lose()
                return
            self._starts.append(start + HEADER_LEN + length)
            self._head = b""
        if len(self._starts) > MAX_KEPT_RECORDS:
            self._first += MAX_KEPT_RECORDS // 2
            del self._starts[: MAX_KEPT_RECORDS // 2]

    def _lose(self) -> None:
        self.lost = True
        self._stash.clear()
        self._stashed = 0


class Due(NamedTuple):
    """When a wait ends: at a number of packets or records of the flow, or a time in seconds."""

    unit: Literal["packets", "records", "time"]
    at: float


class Flow:
    """A context, as rules see it, and what it is behind with."""

    def __init__(self, number: int, params: ContextParams, place: Cursor | None) -> None:
        self.number = number
        self.direction = params.direction
        self.local = params.local
        self.remote = params.remote
        self.rec_seq = params.rec_seq
        explicit = params.tls_version is TlsVersion.TLS_1_2 and params.cipher is not Cipher.CHACHA20_POLY1305
        prefix = HEADER_LEN + (8 if explicit else 0)
        self.follower = Follower(params.start_seq, prefix, place, params.rec_seq) if place is not None else None
        self.packets = 0  # that the device judged
        self.requests: deque[tuple[Due, dict[str, Any]]] = deque()  # resync questions that wait: fields of a verdict
        self.answers: deque[tuple[Due, int, int]] = deque()  # resync answers that wait: sequence number, record number

    @property
    def headers(self) -> int:
        """Records whose header has passed; 0 where they cannot be followed."""
        return self.follower.headers if self.follower is not None else 0


_Key = tuple[Direction, Endpoint, Endpoint]


class Flows:
    """All contexts of a device since a scenario was set; implements tls.table.ContextObserver."""

    def __init__(self, existing: Iterable[tuple[int, int, TxContext | RxContext]] = ()) -> None:
        self._created = {Direction.TX: 0, Direction.RX: 0}
        self._by_handle: dict[tuple[int, int], Flow] = {}
        self._by_ends: dict[_Key, Flow] = {}
        for slot, generation, context in existing:
            self._enter(slot, generation, context.params, context.place)

    def added(self, slot: int, generation: int, params: ContextParams) -> None:
        """A context was made."""
        self._enter(slot, generation, params, None if params.no_sync else Cursor(params.start_seq, params.rec_seq))

    def deleted(self, slot: int, generation: int) -> None:
        """A context is gone."""
        flow = self._by_handle.pop((slot, generation), None)
        if flow is not None:
            key = (flow.direction, flow.local, flow.remote)
            if self._by_ends.get(key) is flow:
                del self._by_ends[key]

    def by_handle(self, slot: int, generation: int) -> Flow | None:
        """The flow of a context."""
        return self._by_handle.get((slot, generation))

    def by_ends(self, direction: Direction, local: Endpoint, remote: Endpoint) -> Flow | None:
        """The flow of a packet."""
        return self._by_ends.get((direction, local, remote))

    def _enter(self, slot: int, generation: int, params: ContextParams, place: Cursor | None) -> None:
        self._created[params.direction] += 1
        flow = Flow(self._created[params.direction], params, place)
        self._by_handle[slot, generation] = self._by_ends[flow.direction, flow.local, flow.remote] = flow
