"""The contexts of a device: handles to contexts, and flows to rx contexts.

Theory of operation: the driver chooses a slot for each context and gives it a generation. A tx packet names both, so a
handle that outlived its context (a device restart, a slot used again) never reaches another flow's key. An rx packet
names neither; it is looked up by its flow. The table owns the contexts: what leaves it is wiped.

CTX_ADD only writes down what was said, in 1 KB. The context itself is made by the first that asks for it, mostly the
first packet: 2 us and 1 KB more, besides the library's expanded key (see aead), which a flow that never comes so far
need not have. Nobody can tell the difference; a context that is made without a place is made at once, since that
belongs in its history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, NamedTuple, Protocol

from nicdev.abi import Direction, Status
from nicdev.errors import CommandError, TxDrop
from nicdev.stats import Counter
from nicdev.tls.context import ContextParams
from nicdev.tls.history import History
from nicdev.tls.personality import rx_context
from nicdev.tls.rx import RxContext
from nicdev.tls.scratch import Scratch
from nicdev.tls.store import Pool
from nicdev.tls.tx import TxContext
from nicdev.wire.hidden import hides_tcp

Flow = tuple[bytes, int, bytes, int]  # local address and port (the guest), remote address and port
Context = TxContext | RxContext
# Generation, the context or what it is to be made from, and when it was added in seconds.
_Entry = tuple[int, Context | ContextParams, float]

_OK: Final = Status.OK
_RX: Final = Direction.RX


class RxEntry(NamedTuple):
    """An rx context and its handle."""

    slot: int
    generation: int
    context: RxContext


class ContextObserver(Protocol):
    """Somebody who watches contexts come and go."""

    def added(self, slot: int, generation: int, params: ContextParams) -> None:
        """A context was made."""

    def deleted(self, slot: int, generation: int) -> None:
        """A context is gone."""


class ContextTable:
    """At most `max_contexts` contexts of either direction; slots count from 0."""

    __slots__ = ("_clock", "_flows", "_pool", "_sent", "_slots", "max_contexts", "observer", "scratch")

    def __init__(self, max_contexts: int, clock: Callable[[], float] = float) -> None:
        """`clock` gives the seconds of the contexts' histories."""
        self.max_contexts = max_contexts
        self._clock = clock
        self.observer: ContextObserver | None = None
        self._slots: dict[int, _Entry] = {}
        self._flows: dict[Flow, RxEntry | int] = {}  # a slot where the context is not made yet
        self._pool = Pool()
        self._sent = Pool()  # memory for what tx contexts sent
        self.scratch = Scratch()  # one packet is decrypted at a time

    def add(self, slot: int, generation: int, params: ContextParams) -> None:
        """Make a context; `params` is taken over. Raises CommandError (TABLE_FULL, EXISTS, BAD_REQUEST), params wiped.

        EXISTS: the slot is taken, or an rx context of the same flow exists.
        """
        flow = params.local + params.remote
        status = self._refusal(slot, params.direction, flow)
        if status is not _OK:
            params.wipe()
            raise CommandError(status)
        self._slots[slot] = entry = (generation, params, self._clock())
        if params.direction is _RX:
            self._flows[flow] = slot
        if params.no_sync:
            self._make(slot, entry)
        if self.observer is not None:
            self.observer.added(slot, generation, params)

    def _make(self, slot: int, entry: _Entry) -> Context:
        """The context of an entry, made if it was not yet."""
        generation, params, added = entry
        if not isinstance(params, ContextParams):
            return params
        history = History(self._clock, added)
        context: Context
        if params.direction is _RX:
            context = rx_context(params, self.scratch.text, self._pool, history)
            self._flows[params.local + params.remote] = RxEntry(slot, generation, context)
        else:
            context = TxContext(params, history, self._sent)
        self._slots[slot] = (generation, context, added)
        return context

    def get_tx(self, slot: int, generation: int) -> TxContext:
        """The context of a tx packet. Raises TxDrop (TX_DROP_UNKNOWN_CONTEXT, _STALE_CONTEXT, _WRONG_DIRECTION)."""
        entry = self._slots.get(slot)
        if entry is None:
            raise TxDrop(Counter.TX_DROP_UNKNOWN_CONTEXT)
        if entry[0] != generation:
            raise TxDrop(Counter.TX_DROP_STALE_CONTEXT)
        context = entry[1]
        if not isinstance(context, TxContext):
            context = self._make(slot, entry)
            if not isinstance(context, TxContext):
                raise TxDrop(Counter.TX_DROP_WRONG_DIRECTION)
        return context

    def get_rx(self, slot: int, generation: int) -> RxContext:
        """The context of an RX_RESYNC command. Raises CommandError (STALE; BAD_REQUEST for a tx context)."""
        context = self._make(slot, self._get(slot, generation))
        if not isinstance(context, RxContext):
            raise CommandError(Status.BAD_REQUEST, "not an rx context")
        return context

    def lookup_rx(self, local: bytes, local_port: int, remote: bytes, remote_port: int) -> RxEntry | None:
        """The rx context of a flow: addresses of 4 or 16 bytes, local is the guest, ports in host order."""
        entry = self._flows.get((local, local_port, remote, remote_port))
        if isinstance(entry, int):
            self._make(entry, self._slots[entry])
            return self.lookup_rx(local, local_port, remote, remote_port)
        return entry

    def hides(self, frame: memoryview) -> bool:
        """Whether a frame that is no plain TCP segment may hold one of a flow that must see all of its segments."""
        return any(map(partial(hides_tcp, frame), self._pool.indebted))

    def delete(self, slot: int, generation: int) -> None:
        """Wipe and forget a context. Raises CommandError(STALE)."""
        context = self._get(slot, generation)[1]
        params = context if isinstance(context, ContextParams) else context.params
        del self._slots[slot]
        if params.direction is _RX:
            del self._flows[params.local + params.remote]
        context.wipe()
        if self.observer is not None:
            self.observer.deleted(slot, generation)

    def clear(self) -> int:
        """Wipe and forget all contexts; how many there were."""
        entries = list(self._slots.items())
        self._slots.clear()
        self._flows.clear()
        for slot, (generation, context, _) in entries:
            context.wipe()
            if self.observer is not None:
                self.observer.deleted(slot, generation)
        self.scratch.wipe()
        self._pool.scratch[:] = bytes(len(self._pool.scratch))
        return len(entries)

    def counts(self) -> dict[Direction, int]:
        """Live contexts per direction."""
        return {Direction.RX: len(self._flows), Direction.TX: len(self._slots) - len(self._flows)}

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[tuple[int, int, Context]]:
        """Slot, generation and context of each, in order of creation."""
        return ((slot, entry[0], self._make(slot, entry)) for slot, entry in self._slots.items())

    def _get(self, slot: int, generation: int) -> _Entry:
        entry = self._slots.get(slot)
        if entry is None or entry[0] != generation:
            raise CommandError(Status.STALE)
        return entry

    def _refusal(self, slot: int, direction: Direction, flow: Flow) -> Status:
        if slot >= self.max_contexts:
            return Status.BAD_REQUEST
        if len(self._slots) >= self.max_contexts:
            return Status.TABLE_FULL
        if slot in self._slots or (direction is _RX and flow in self._flows):
            return Status.EXISTS
        return _OK
