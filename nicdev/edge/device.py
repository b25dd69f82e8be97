"""One NIC at the edge: kicks and port frames come in here, signals and frames go out.

Implements the callbacks of vhost/protocol.py. Per queue pair: a tx kick drains the tx ring in bursts; a frame from
the port goes to the rx ring of the flow's queue. A frame that finds no rx buffers is held, the port falls silent,
and the next rx kick goes on with it. A ring that breaks the rules is stopped and its error eventfd written; the
other rings go on. An error of our own that nobody foresaw is treated alike: `_drain` and `_place` are the boundary
that none passes, so what a guest or the wire can provoke costs one ring or one frame, never the process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

from nicdev.abi import EventCode
from nicdev.edge.loop import Loop
from nicdev.edge.port import Port
from nicdev.errors import RingError
from nicdev.nic import Nic, Packet
from nicdev.queues import QueuePair
from nicdev.stats import Counter
from nicdev.virtio.ring import SplitRing

log = logging.getLogger(__name__)
_ONE: Final = (1).to_bytes(8, "little")
QUIET_BUFFERS: Final = 16  # that may be filled without a signal, while more frames are there
PATIENCE: Final = 0.001  # seconds for which a signal about what was sent may wait


def _signal(fd: int) -> None:
    if fd >= 0:
        # A counter at its maximum is a signal to read anyway; a pipe with nobody behind it is the peer's loss.
        with suppress(OSError):
            os.write(fd, _ONE)


def _clear(fd: int) -> bool:
    """Take the kick; False if `fd` will never bring another (a pipe that was hung up, or the wrong end of one)."""
    try:
        return bool(os.read(fd, 8))
    except BlockingIOError:  # another callback of the same round was quicker
        return True
    except OSError:
        return False


class Device:
    """Queues of one NIC on `loop`, with `port` as its wire side."""

    def __init__(self, loop: Loop, nic: Nic, port: Port, queue_pairs: int) -> None:
        self.nic = nic
        self.port = port
        self.pairs = [QueuePair(i, nic) for i in range(queue_pairs)]
        self._loop = loop
        self._fds: dict[int, tuple[int, int, int]] = {}  # vring index -> kick, call, err
        self._held: list[tuple[int, Packet]] = []
        self._drains: list[Callable[[], None]] = [partial(self._drain, pair) for pair in self.pairs]
        self._settles: list[Callable[[], None]] = [partial(self._signal_late, pair) for pair in self.pairs]
        self._owing = [False] * queue_pairs  # a signal that waits
        self._busy = [False] * queue_pairs  # the tx ring is drained again in the next round
        self._placed: list[Callable[[], None]] = [partial(self._publish_rx, pair) for pair in self.pairs]
        port.receiver, port.before_frames = self._from_port, self._look

    # -- callbacks of the vhost-user protocol --------------------------------------------------------------------------

    def queue_started(self, index: int, ring: SplitRing, kick_fd: int, call_fd: int, err_fd: int) -> None:
        """Vring `index` (even: rx, odd: tx) runs; fds are eventfds or -1 and stay the protocol's property."""
        pair = self.pairs[index // 2]
        self._fds[index] = (kick_fd, call_fd, err_fd)
        if index % 2:
            pair.tx = ring
            on_kick = partial(self._on_tx_kick, pair, kick_fd)
            self._loop.soon(self._drains[pair.index])
        else:
            pair.rx = ring
            if index == 0 and ring.base:
                self.nic.resumed()
            ring.want_kicks()
            on_kick = partial(self._on_rx_kick, kick_fd)
            self._loop.soon(self._rx_has_room)
        if kick_fd >= 0:
            self._loop.watch(kick_fd, on_kick)

    def queue_stopped(self, index: int) -> None:
        """Vring `index` must not be touched any more."""
        kick_fd, _, _ = self._fds.pop(index, (-1, -1, -1))
        if kick_fd >= 0:
            self._loop.unwatch(kick_fd)
        pair = self.pairs[index // 2]
        if index % 2:
            pair.tx = None
        else:
            pair.rx = None
            self._held.clear()
            self.port.resume()

    def features_set(self, features: int) -> None:
        """The driver accepted `features`."""
        self.nic.features = features
        self.port.features_changed(features)

    def set_mtu(self, mtu: int) -> None:
        """QEMU's host_mtu (bytes), already known to the guest."""
        log.info("mtu %d", mtu)

    def reset(self, reason: str) -> None:
        """Contexts and keys go."""
        if len(self.nic.table):
            log.info("reset (%s): %d contexts deleted", reason, len(self.nic.table))
        self.nic.reset()
        self._held.clear()
        self.port.resume()

    def tell(self, code: EventCode) -> None:
        """Send the driver an event that is about no context."""
        if self.nic.greeted:
            self.nic.event(code)
            self._flush_messages()

    # -- tx -----------------------------------------------------------------------------------------------------------

    def _on_tx_kick(self, pair: QueuePair, kick_fd: int) -> None:
        if not _clear(kick_fd):
            self._loop.unwatch(kick_fd)
        self._drain(pair)

    def _drain(self, pair: QueuePair) -> None:
        ring = pair.tx
        if ring is None:
            return
        try:
            ring.suppress_kicks()
            more, owed = pair.drain_tx(self.port.sender)
            if owed and pair.urgent:
                self._signal_sent(pair)
            elif owed and not self._owing[pair.index]:
                self._owing[pair.index] = True
                self._loop.call_at(self._loop.time() + PATIENCE, self._settles[pair.index])
            self._busy[pair.index] = more or ring.want_kicks()
            if self._busy[pair.index]:
                self._loop.soon(self._drains[pair.index])
        except Exception as error:  # noqa: BLE001 - the ring is the boundary, whatever it was
            self._ring_failed(2 * pair.index + 1, Counter.TX_RING_ERRORS, error)
        if self.nic.messages:
            self._flush_messages()

    def _look(self) -> None:
        """Frames are about to come. A context that was posted for them without a kick must be there first; but where
        there is more to send than goes at once, both have their turns."""
        for pair in self.pairs:
            if pair.tx is not None and pair.tx.waiting and not self._busy[pair.index]:
                self._drain(pair)

    def _signal_sent(self, pair: QueuePair) -> None:
        """The guest is told that its packets are gone, if it still wants to be."""
        if pair.settle():
            _signal(self._fds[2 * pair.index + 1][1])

    def _signal_late(self, pair: QueuePair) -> None:
        self._owing[pair.index] = False
        self._signal_sent(pair)

    def _flush_messages(self) -> None:
        try:
            if self.pairs[0].flush_messages():
                self._publish_rx(self.pairs[0])
        except Exception as error:  # noqa: BLE001 - the ring is the boundary, whatever it was
            self._ring_failed(0, Counter.RX_RING_ERRORS, error)

    # -- rx -----------------------------------------------------------------------------------------------------------

    def _on_rx_kick(self, kick_fd: int) -> None:
        if not _clear(kick_fd):
            self._loop.unwatch(kick_fd)
        self._rx_has_room()

    def _rx_has_room(self) -> None:
        if self.nic.messages:
            self._flush_messages()
        held, self._held = self._held, []
        if self._place(held):
            self.port.resume()

    def _from_port(self, header: memoryview, frame: memoryview) -> bool:
        try:
            packets = self.nic.receive(header, frame)
        except Exception as error:  # noqa: BLE001 - one frame is the boundary, whatever it was
            self._internal_error("a received frame", error)
            return not self._held
        return self._place(packets)

    def _place(self, packets: list[tuple[int, Packet]]) -> bool:
        """Deliver packets in order; hold the rest when one finds no buffers. Returns whether all were placed."""
        touched: dict[int, None] = {}
        for at, (queue, packet) in enumerate(packets):
            pair = self.pairs[queue] if self.pairs[queue].rx is not None else self.pairs[0]
            try:
                if not pair.deliver(packet):
                    # The port's buffer is reused: what is held must be a copy.
                    self._held += [(q, Packet(bytes(p.header), memoryview(bytes(p.frame)))) for q, p in packets[at:]]
                    break
            except Exception as error:  # noqa: BLE001 - the ring is the boundary, whatever it was
                self._ring_failed(2 * pair.index, Counter.RX_RING_ERRORS, error)
                continue
            touched[pair.index] = None
        for index in touched:
            self._show_rx(self.pairs[index])
        return not self._held

    def _show_rx(self, pair: QueuePair) -> None:
        """Show what was placed. Frames in a row are one signal, at the end of the loop's round at the latest: a guest
        that is quicker than we are would take an interrupt for each, for which QEMU interrupts us where it has to share
        our processor, and GRO finds nothing to join."""
        if pair.rx is None or not pair.rx.show():
            return
        if pair.rx.untold >= QUIET_BUFFERS:
            self._publish_rx(pair)
        else:
            self._loop.soon(self._placed[pair.index])

    def _publish_rx(self, pair: QueuePair) -> None:
        if pair.rx is not None and pair.rx.publish():
            _signal(self._fds[2 * pair.index][1])

    def _internal_error(self, where: str, error: Exception) -> None:
        self.nic.stats.add(Counter.INTERNAL_ERRORS)
        log.error("internal error in %s", where, exc_info=error)

    def _ring_failed(self, index: int, counter: Counter, error: Exception) -> None:
        if not isinstance(error, RingError):
            self._internal_error(f"queue {index}", error)
        if index not in self._fds:
            return  # stopped already, by what the failed call set off
        log.warning("queue %d stopped: %s", index, error)
        self.nic.stats.add(counter)
        _, call_fd, err_fd = self._fds[index]
        pair = self.pairs[index // 2]
        ring = pair.tx if index % 2 else pair.rx
        if ring is not None:
            ring.broken = True
            if ring.publish():  # what was handled before the fault goes home
                _signal(call_fd)
        self.queue_stopped(index)
        _signal(err_fd)
