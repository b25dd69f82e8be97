"""Between the virtqueues and the NIC: drains a tx ring, fills an rx ring, and knows mergeable buffers.

One `QueuePair` is one receiveq and one transmitq. The loop calls `drain_tx` when the guest kicked and `deliver` with
what a port read; both take a bounded number of packets, publish the used index once, and say whether the guest wants
to be signalled. A port is anything with `send(packet) -> bool`.

A chain that could not be handled still goes home with length 0, so nothing leaks in the guest. A packet that finds
too few rx buffers is refused whole (`deliver` returns what it could place), and the loop stops reading the port
until the guest kicks the rx ring.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from nicdev.errors import FrameError
from nicdev.nic import MAX_CHAIN, Nic, Packet
from nicdev.stats import Counter
from nicdev.virtio import features
from nicdev.virtio.ring import SplitRing

BURST: Final = 64  # packets per call, so that no queue starves another
_TX_WIRE_PACKETS, _TX_DROP_PORT = int(Counter.TX_WIRE_PACKETS), int(Counter.TX_DROP_PORT)
NUM_BUFFERS_AT: Final = 10  # offset of num_buffers in virtio_net_hdr_v1
_Buffer = tuple[int, list[memoryview]]  # head of a chain, and where to write


class Port(Protocol):
    """The wire side of a NIC."""

    def send(self, packet: Packet) -> bool:
        """Transmit one frame; False when the port would not take it."""


class QueuePair:
    """Receive and transmit queue number `index` of one NIC; a ring is None while it is stopped."""

    def __init__(self, index: int, nic: Nic) -> None:
        self.index = index
        self.nic = nic
        self.rx: SplitRing | None = None
        self.tx: SplitRing | None = None

    def drain_tx(self, send: Callable[[Packet], bool]) -> tuple[bool, bool]:
        """Handle up to BURST tx chains. Returns (more may be waiting, guest wants a signal). Raises RingError."""
        ring = self.tx
        if ring is None:
            return False, False
        stats, transmit, pop, push = self.nic.stats.values, self.nic.transmit, ring.pop, ring.push
        for _ in range(BURST):
            element = pop()
            if element is None:
                return False, ring.publish()
            head, readable, writable = element
            written = 0
            try:
                packet, reply = transmit(self.index, gather(readable))
                if packet is not None:
                    stats[_TX_WIRE_PACKETS if send(packet) else _TX_DROP_PORT] += 1
                elif reply:
                    written = scatter(writable, reply)
            except FrameError as drop:
                stats[drop.counter] += 1
            push(head, written)
        return True, ring.publish()

    def deliver(self, packet: Packet) -> bool:
        """Put one packet into rx buffers, not yet published. Raises RingError.

        False when there are too few; then the guest was asked for a kick when there are more.
        """
        ring = self.rx
        stats = self.nic.stats.values
        if ring is None:
            stats[Counter.RX_DROP_QUEUE_DOWN] += 1
            return True
        need = len(packet.header) + len(packet.frame)
        most = ring.num if self.nic.features & features.VIRTIO_NET_F_MRG_RXBUF else 1
        taken, room = self._take(ring, need, most)
        while room < need:
            ring.unpop(len(taken))
            if len(taken) == most:
                stats[Counter.RX_DROP_TOO_BIG] += 1
                return True
            if not ring.want_kicks():
                return False
            taken, room = self._take(ring, need, most)
        self._fill(ring, packet, taken)
        stats[Counter.RX_PACKETS] += 1
        stats[Counter.RX_BYTES] += len(packet.frame)
        return True

    @staticmethod
    def _take(ring: SplitRing, need: int, most: int) -> tuple[list[_Buffer], int]:
        """Buffers for `need` bytes, but at most so many, and the room in them; less than that if there are no more.

        Merging buffers (virtio 1.2, 5.1.6.4) is for the driver to allow.
        """
        taken: list[_Buffer] = []
        room = 0
        pop = ring.pop
        while room < need and len(taken) < most:
            element = pop()
            if element is None:
                break
            head, _, writable = element
            taken.append((head, writable))
            for view in writable:
                room += len(view)
        return taken, room

    @staticmethod
    def _fill(ring: SplitRing, packet: Packet, taken: list[_Buffer]) -> None:
        """Copy header (with num_buffers) and frame over the buffers and push them."""
        header, frame = bytearray(packet.header), packet.frame
        header[NUM_BUFFERS_AT : NUM_BUFFERS_AT + 2] = len(taken).to_bytes(2, "little")
        at, end = -len(header), len(frame)  # in the frame; the header comes before
        for head, writable in taken:
            written = 0
            for view in writable:
                size, here = len(view), 0
                if at < 0:
                    here = min(size, -at)
                    view[:here] = header[at : at + here or None]
                    at += here
                if here < size and at < end:
                    n = min(size - here, end - at)
                    view[here : here + n] = frame[at : at + n]
                    at += n
                    here += n
                written += here
            ring.push(head, written)

    def flush_messages(self) -> bool:
        """Deliver waiting messages to the driver (queue pair 0 only). Returns whether anything was placed."""
        messages = self.nic.messages
        placed = False
        while messages and self.rx is not None and self.deliver(Packet(messages[0], memoryview(b""))):
            messages.pop(0)
            placed = True
        return placed


def gather(readable: list[memoryview]) -> bytearray:
    """One copy of a chain's readable part; guest memory is not looked at again. Raises FrameError when too long."""
    if len(readable) == 1 and len(readable[0]) <= MAX_CHAIN:
        return bytearray(readable[0])
    if sum(map(len, readable)) > MAX_CHAIN:
        raise FrameError(Counter.TX_DROP_TOO_BIG)
    return bytearray().join(readable)


def scatter(writable: list[memoryview], data: bytes) -> int:
    """Write as much of `data` as fits; return the bytes written."""
    at = 0
    for view in writable:
        piece = data[at : at + len(view)]
        view[: len(piece)] = piece
        at += len(piece)
    return at
