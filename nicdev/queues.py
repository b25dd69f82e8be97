"""Between the virtqueues and the NIC: drains a tx ring, fills an rx ring, and knows mergeable buffers.

One `QueuePair` is one receiveq and one transmitq. The loop calls `drain_tx` when the guest kicked and `deliver` with
what a port read; both take a bounded number of packets, publish the used index once, and say whether the guest wants
to be signalled. A burst's chains go home together, whatever happens to the last of them.

Signals of tx queues may wait. All that the guest does about one is to free what was sent, but it costs the guest an
interrupt and QEMU a wake-up; a datagram, or an acknowledgement, costs less than that. What somebody waits for is not
put off: a command's reply, room in the ring (so many chains), and in socket buffers (so many bytes).

A chain that could not be handled still goes home with length 0, so nothing leaks in the guest. A packet that finds
too few rx buffers is refused whole (`deliver` returns what it could place), and the loop stops reading the port
until the guest kicks the rx ring.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from nicdev.errors import FrameError
from nicdev.nic import MAX_CHAIN, Nic, Packet
from nicdev.stats import Counter
from nicdev.virtio import features
from nicdev.virtio.ring import SplitRing

BURST: Final = 64  # packets per call, so that no queue starves another
QUIET_CHAINS: Final = 64  # that may go home without a signal,
QUIET_BYTES: Final = 32768  # with frames of so many bytes
_TX_WIRE_PACKETS, _TX_DROP_PORT = int(Counter.TX_WIRE_PACKETS), int(Counter.TX_DROP_PORT)
_TX_BYTES, _RX_PACKETS, _RX_BYTES = int(Counter.TX_BYTES), int(Counter.RX_PACKETS), int(Counter.RX_BYTES)
NUM_BUFFERS_AT: Final = 10  # offset of num_buffers in virtio_net_hdr_v1


class QueuePair:
    """Receive and transmit queue number `index` of one NIC; a ring is None while it is stopped."""

    def __init__(self, index: int, nic: Nic) -> None:
        self.index = index
        self.nic = nic
        self.rx: SplitRing | None = None
        self.tx: SplitRing | None = None
        self._quiet = 0  # bytes sent since the last signal of tx
        self._replied = False  # since then

    def drain_tx(self, send: Callable[[Packet], bool]) -> tuple[bool, bool]:
        """Handle up to BURST tx chains. Returns (more may be waiting, a signal is owed). Raises RingError."""
        ring = self.tx
        if ring is None:
            return False, False
        index, stats, transmit, pop = self.index, self.nic.stats.values, self.nic.transmit, ring.pop
        before, more = stats[_TX_BYTES], True
        used: list[int] = []
        try:
            for _ in range(BURST):
                element = pop()
                if element is None:
                    more = False
                    break
                head, readable, writable = element
                try:
                    single = len(readable) == 1 and len(first := readable[0]) <= MAX_CHAIN
                    chain = bytearray(first) if single else gather(readable)
                    outcome = transmit(index, chain, not writable)
                    if isinstance(outcome, Packet):
                        stats[_TX_WIRE_PACKETS if send(outcome) else _TX_DROP_PORT] += 1
                    elif outcome:
                        written = scatter(writable, outcome)
                        self._replied = self._replied or written > 0
                        head |= written << 32
                except FrameError as drop:
                    stats[drop.counter] += 1
                used.append(head)
        finally:
            ring.push_used(used)
        self._quiet += stats[_TX_BYTES] - before
        owed = ring.show()
        if not owed:  # the driver looks by itself
            self._quiet, self._replied = 0, False
        return more, owed

    @property
    def urgent(self) -> bool:
        """Whether the signal that is owed for tx cannot wait."""
        ring = self.tx
        full = ring is not None and ring.untold >= QUIET_CHAINS
        return full or self._quiet >= QUIET_BYTES or self._replied

    def settle(self) -> bool:
        """Whether the signal that was owed for tx still is; the caller sends it then."""
        self._quiet, self._replied = 0, False
        return self.tx is not None and self.tx.publish()

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
        used, views, room = ring.take(need, most)
        while room < need:
            if len(used) == most:
                stats[Counter.RX_DROP_TOO_BIG] += 1
                return True
            if not ring.want_kicks():
                return False
            used, views, room = ring.take(need, most)
        header = bytearray(packet.header)
        header[NUM_BUFFERS_AT : NUM_BUFFERS_AT + 2] = len(used).to_bytes(2, "little")
        self._write(views, header, packet.frame)
        ring.push_used(used)
        stats[_RX_PACKETS] += 1
        stats[_RX_BYTES] += len(packet.frame)
        return True

    @staticmethod
    def _write(views: list[memoryview], header: bytearray, frame: memoryview) -> None:
        """Copy a packet over the views, which have room for it."""
        first, size = views[0], len(header)
        if len(first) < size:  # no driver makes buffers that small
            scatter(views, header + frame)
            return
        first[:size] = header
        views[0] = first[size:]
        scatter(views, frame)

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
    if sum(map(len, readable)) > MAX_CHAIN:
        raise FrameError(Counter.TX_DROP_TOO_BIG)
    return bytearray().join(readable)


def scatter(writable: list[memoryview], data: bytes | bytearray | memoryview) -> int:
    """Write as much of `data` as fits; return the bytes written."""
    at = 0
    for view in writable:
        piece = data[at : at + len(view)]
        view[: len(piece)] = piece
        at += len(piece)
    return at
