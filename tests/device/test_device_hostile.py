"""A guest, a front end or a wire that means harm: it costs one ring or connection, the NIC lives, memory is bounded.

`Device` on a real loop, with rings in plain memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import count

import pytest

from nicdev import abi
from nicdev.control import Control, Identity
from nicdev.edge.device import Device
from nicdev.edge.loop import Loop
from nicdev.edge.port import PAIR_DEPTH, PairPort, Port
from nicdev.nic import Nic, Packet
from nicdev.stats import Counter, Stats
from nicdev.tls.table import ContextTable
from nicdev.virtio.features import OFFERED, VIRTIO_NET_F_GUEST_TSO4
from nicdev.virtio.memory import GuestMemory, Region
from nicdev.virtio.ring import RingLayout, SplitRing
from tests.support.fake_driver import FakeQueue
from tests.support.nic_chains import hello, segment

RAM = 1 << 20
BUFFERS = 0x40000
PLAIN = bytes(12)


class Guest:
    """A device with one queue pair, and the guest's side of its rings; index 0 is receiveq, 1 transmitq."""

    def __init__(self, loop: Loop, port: Port) -> None:
        stats, table = Stats(), ContextTable(8)
        boots = count(1)
        self.nic = Nic(stats, table, Control(Identity("1"), table, stats), lambda: next(boots))
        self.stats = stats
        self.device = Device(loop, self.nic, port, 1)
        self.device.features_set(OFFERED)
        self.ram = memoryview(bytearray(RAM))
        self.memory = GuestMemory([Region(0, 0, RAM, self.ram)])
        self.queues = [FakeQueue(self.ram, 0x4000 * i, 256) for i in range(2)]
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self.errs = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]

    def start(self, index: int) -> None:
        queue = self.queues[index]
        ring = SplitRing(self.memory, RingLayout(queue.num, queue.desc_at, queue.avail_at, queue.used_at))
        self.device.queue_started(index, ring, self.kicks[index], self.calls[index], self.errs[index])

    def transmit(self, chain: bytes | bytearray) -> None:
        """Post one chain and kick."""
        at = BUFFERS + 0x20000
        self.ram[at : at + len(chain)] = bytes(chain)
        self.queues[1].add([(at, len(chain))], [])
        self.queues[1].publish()
        os.eventfd_write(self.kicks[1], 1)

    def offer(self, buffers: int, size: int = 2048) -> None:
        """Post receive buffers and kick."""
        for i in range(buffers):
            self.queues[0].add([], [(BUFFERS + i * size, size)])
        self.queues[0].publish()
        os.eventfd_write(self.kicks[0], 1)


def rounds(loop: Loop, number: int = 3) -> None:
    """Let the loop go round so many times."""
    left = iter(range(number))

    def again() -> None:
        if next(left, None) is None:
            loop.stop()
        loop.soon(again)

    loop.soon(again)
    loop._running = True  # `run` is for once
    loop.run()
    loop._soon.pop(again)


@pytest.fixture
def loop() -> Iterator[Loop]:
    found = Loop()
    yield found
    found.close()


@pytest.fixture
def guest(loop: Loop) -> Guest:
    found = Guest(loop, Port())
    found.start(0)
    found.start(1)
    return found


class Broken(Exception):
    """An error that nobody thought of."""


def test_an_unexpected_error_stops_its_tx_ring_only(
    loop: Loop, guest: Guest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise Broken("secret")

    monkeypatch.setattr(guest.nic, "transmit", fail)
    guest.transmit(PLAIN + segment(b"x"))
    rounds(loop)
    assert guest.stats[Counter.INTERNAL_ERRORS] == guest.stats[Counter.TX_RING_ERRORS] == 1
    assert os.eventfd_read(guest.errs[1]) == 1
    assert "Broken" in caplog.text
    guest.offer(2)
    guest.device.port.receiver(memoryview(bytearray(PLAIN)), memoryview(bytearray(segment(b"in", outgoing=False))))
    assert len(guest.queues[0].collect()) == 1


def test_an_unexpected_error_stops_its_rx_ring_only(loop: Loop, guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise Broken

    pair = guest.device.pairs[0]
    monkeypatch.setattr(pair, "deliver", fail)
    guest.device.port.receiver(memoryview(bytearray(PLAIN)), memoryview(bytearray(segment(b"in", outgoing=False))))
    assert guest.stats[Counter.INTERNAL_ERRORS] == guest.stats[Counter.RX_RING_ERRORS] == 1
    assert pair.rx is None
    guest.transmit(PLAIN + segment(b"x"))
    rounds(loop)
    assert guest.stats[Counter.TX_WIRE_PACKETS] == 1


def test_a_frame_that_breaks_the_nic_is_dropped(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise Broken

    monkeypatch.setattr(guest.nic, "receive", fail)
    assert guest.device.port.receiver(memoryview(bytearray(PLAIN)), memoryview(bytearray(64)))
    assert guest.stats[Counter.INTERNAL_ERRORS] == 1
    assert guest.device.pairs[0].rx is not None


@pytest.mark.parametrize("end", ["closed", "read end"])
def test_a_call_fd_that_cannot_be_signalled_is_the_guests_loss(loop: Loop, end: str) -> None:
    guest = Guest(loop, Port())
    reader, writer = os.pipe()
    guest.calls[1] = reader if end == "read end" else writer
    if end == "closed":
        os.close(reader)
    guest.start(1)
    guest.transmit(PLAIN + segment(b"x"))
    rounds(loop)
    assert guest.stats[Counter.TX_WIRE_PACKETS] == 1


@pytest.mark.parametrize("end", ["hung up", "write end"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_kick_fd_that_says_nothing_any_more_is_left(loop: Loop, end: str, index: int) -> None:
    guest = Guest(loop, Port())
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    guest.kicks[index] = writer if end == "write end" else reader
    os.close(reader if end == "write end" else writer)
    guest.start(index)
    rounds(loop)
    assert guest.kicks[index] not in loop._callbacks


def test_hellos_that_nobody_reads_do_not_pile_up(guest: Guest) -> None:
    for nonce in range(1000):
        guest.nic.transmit(0, hello(nonce=nonce))
    (reply,) = guest.nic.messages
    assert abi.HelloReply._make(abi.HELLO_REPLY.unpack_from(reply, 12)).nonce == 999


def test_a_guest_that_takes_nothing_does_not_make_its_neighbours_packets_pile_up(loop: Loop) -> None:
    left, right = PairPort.create(loop)
    guest = Guest(loop, left)
    guest.start(0)
    frame = memoryview(segment(b"x", outgoing=False))
    sent = 0
    for number in range(PAIR_DEPTH + 100):
        sent += right.send(Packet(PLAIN, memoryview(bytes(frame[:-1]) + bytes((number & 0xFF,)))))
        rounds(loop, 1)
    held = len(guest.device._held) + len(left._waiting)
    assert sent == held <= PAIR_DEPTH + 1
    for _ in range(PAIR_DEPTH // 128 + 1):
        guest.offer(128)
        rounds(loop)
        guest.queues[0].collect()
    assert guest.stats[Counter.RX_PACKETS] == sent


def test_tiny_segments_are_refused_before_they_are_made() -> None:
    """A neighbour's 64 KiB packet with a gso_size of 1 would become 65,000 frames."""
    stats, table = Stats(), ContextTable(1)
    nic = Nic(stats, table, Control(Identity("1"), table, stats), lambda: 1)
    nic.features = OFFERED & ~VIRTIO_NET_F_GUEST_TSO4
    frame = memoryview(bytearray(segment(bytes(60000), outgoing=False)))

    def cut(size: int) -> int:
        header = bytearray(12)
        header[:6] = bytes((1, 1, 54, 0)) + size.to_bytes(2, "little")
        return len(nic.receive(memoryview(header), frame))

    assert cut(48) == 1250
    assert cut(1) == 0
    assert stats[Counter.RX_DROP_TOO_BIG] == 1
