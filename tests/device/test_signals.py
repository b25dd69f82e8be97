"""When the guest hears that its packets are gone: what somebody waits for at once, all else soon."""

from __future__ import annotations

import os

import pytest

from nicdev.edge.device import PATIENCE, QUIET_BUFFERS
from nicdev.edge.loop import Loop
from nicdev.edge.port import Port
from nicdev.queues import QUIET_BYTES, QUIET_CHAINS
from nicdev.wire.vnet import VNET_HDR
from tests.device.test_device_hostile import PLAIN, Guest, loop, rounds
from tests.support.nic_chains import segment

__all__ = ["loop"]


class Clock:
    """The loop's, which stands still."""

    def __init__(self, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(loop, "time", lambda: self.now)


@pytest.fixture
def clock(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(loop, monkeypatch)


@pytest.fixture
def guest(loop: Loop) -> Guest:
    found = Guest(loop, Port())
    found.start(1)
    rounds(loop)
    return found


def signalled(guest: Guest, index: int = 1) -> bool:
    """Whether the queue (tx) has been signalled since the last time."""
    try:
        return bool(os.eventfd_read(guest.calls[index]))
    except BlockingIOError:
        return False


def test_a_small_packets_signal_waits(loop: Loop, guest: Guest, clock: Clock) -> None:
    for _ in range(2):
        for _ in range(QUIET_CHAINS - 1):
            guest.transmit(PLAIN + segment(b"x"))
            rounds(loop)
            clock.now += PATIENCE / QUIET_CHAINS
        assert len(guest.queues[1].collect()) == QUIET_CHAINS - 1
        assert not signalled(guest)
        clock.now += PATIENCE
        rounds(loop)
        assert signalled(guest)
        clock.now += PATIENCE
        rounds(loop)
        assert not signalled(guest), "once is enough"


def test_the_first_packet_decides_how_long_a_signal_waits(loop: Loop, guest: Guest, clock: Clock) -> None:
    for _ in range(3):
        for _ in range(4):
            assert not signalled(guest)
            guest.transmit(PLAIN + segment(b"x"))
            rounds(loop)
            clock.now += PATIENCE / 4
        rounds(loop)
        assert signalled(guest)


def test_a_signal_that_waits_is_not_sent_to_who_wants_none(loop: Loop, guest: Guest, clock: Clock) -> None:
    guest.transmit(PLAIN + segment(b"x"))
    rounds(loop)
    guest.queues[1].no_signals()
    clock.now += PATIENCE
    rounds(loop)
    assert not signalled(guest)


def test_many_packets_and_large_ones_are_signalled_at_once(loop: Loop, guest: Guest, clock: Clock) -> None:
    for _ in range(QUIET_CHAINS):
        guest.transmit(PLAIN + segment(b"x"))
    rounds(loop)
    assert signalled(guest)
    guest.transmit(PLAIN + segment(bytes(QUIET_BYTES)))
    rounds(loop)
    assert signalled(guest)
    assert clock.now == 0


def test_a_queue_is_stopped_while_its_signal_waits(loop: Loop, guest: Guest, clock: Clock) -> None:
    """Whoever starts it again signals first of all; until then there is nobody to be signalled."""
    ring = guest.device.pairs[0].tx
    assert ring is not None
    guest.transmit(PLAIN + segment(b"x"))
    rounds(loop)
    guest.device.queue_stopped(1)
    clock.now += PATIENCE
    rounds(loop)
    assert not signalled(guest)
    guest.device.queue_started(1, ring, guest.kicks[1], guest.calls[1], guest.errs[1])
    for _ in range(2):
        guest.transmit(PLAIN + segment(b"x"))
        rounds(loop)
        assert not signalled(guest)
        clock.now += PATIENCE
        rounds(loop)
        assert signalled(guest)


def receive(guest: Guest, size: int = 60) -> bool:
    """A frame comes from the port."""
    return guest.device.port.receiver(memoryview(bytearray(VNET_HDR.size)), memoryview(bytearray(size)))


@pytest.fixture
def receiver(loop: Loop, guest: Guest) -> Guest:
    guest.start(0)
    guest.offer(60)
    rounds(loop)
    return guest


def test_received_frames_in_a_row_are_one_signal(loop: Loop, receiver: Guest) -> None:
    for _ in range(QUIET_BUFFERS - 1):
        receive(receiver)
    assert len(receiver.queues[0].collect()) == QUIET_BUFFERS - 1, "seen without a signal, too"
    assert not signalled(receiver, 0)
    rounds(loop, 1)
    assert signalled(receiver, 0)
    rounds(loop)
    assert not signalled(receiver, 0), "once is enough"


@pytest.mark.parametrize("buffers", [1, 2])
def test_many_received_frames_are_signalled_at_once(receiver: Guest, buffers: int) -> None:
    size = 2048 * buffers - VNET_HDR.size
    for _ in range(QUIET_BUFFERS // buffers - 1):
        receive(receiver, size)
    assert not signalled(receiver, 0)
    receive(receiver, size)
    assert signalled(receiver, 0)


def test_buffers_run_out_behind_frames_whose_signal_waits(loop: Loop, receiver: Guest) -> None:
    """The guest must hear of them, or it never offers more."""
    for _ in range(3):
        assert receive(receiver, 2048 * 18)
        assert signalled(receiver, 0)
    assert receive(receiver)
    assert not receive(receiver, 2048 * 2)
    rounds(loop)
    assert signalled(receiver, 0)
