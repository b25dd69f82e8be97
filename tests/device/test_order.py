"""The device on a real loop, with rings in plain memory: packets leave in the order they came in, each at once.

Packets that are work (records to encrypt, to decrypt, to leave alone) are mixed with packets that are none
(acknowledgements, other connections, no TCP at all), in both directions.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import ARP

from nicdev import abi
from nicdev.edge.loop import Loop
from nicdev.edge.port import PairPort, Port
from nicdev.edge.port_faulty import FaultyPort
from nicdev.edge.port_tap import TapPort
from nicdev.nic import Packet
from nicdev.queues import BURST
from tests.device.test_device_hostile import BUFFERS, PLAIN, Guest, rounds
from tests.support.ether import ETH
from tests.support.nic_chains import (
    GUEST,
    PEER,
    START,
    add,
    command,
    ctx_add,
    hello,
    make_nic,
    marked,
    record,
    segment,
)

COUNT = 200
CHAINS = BUFFERS + 0x20000
ROOM = 2048


class Recorder(Port):
    """A wire that remembers."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []

    def send(self, packet: Packet) -> bool:
        self.sent.append(bytes(packet.frame))
        return True


@pytest.fixture
def loop() -> Iterator[Loop]:
    found = Loop()
    yield found
    found.close()


@pytest.fixture
def port() -> Recorder:
    return Recorder()


@pytest.fixture
def guest(loop: Loop, port: Recorder) -> Guest:
    """A guest whose driver has said HELLO."""
    found = Guest(loop, port)
    found.start(0)
    found.start(1)
    found.offer(1)
    found.transmit(hello())
    rounds(loop)
    assert len(found.queues[0].collect()) == 1
    return found


def other(rng: random.Random, number: int, outgoing: bool) -> bytes:
    """A packet that is nobody's work; its number tells it from others."""
    ip = IP(src=GUEST, dst=PEER, id=number) if outgoing else IP(src=PEER, dst=GUEST, id=number)
    ack = TCP(sport=4000, dport=443, ack=number) if outgoing else TCP(sport=443, dport=4000, ack=number)
    kinds = [
        ip / ack,
        ip / TCP(sport=1, dport=2) / b"clear",
        ip / UDP(sport=1, dport=2) / b"clear",
        ARP(psrc=f"198.51.100.{number}"),
    ]
    return bytes(ETH / rng.choice(kinds))


def post(guest: Guest, number: int, chain: bytes) -> None:
    """Post a chain, not yet kicked; each number has memory of its own."""
    at = CHAINS + number * ROOM
    guest.ram[at : at + len(chain)] = chain
    guest.queues[1].add([(at, len(chain))], [])


def mixed_tx(rng: random.Random, guest: Guest) -> tuple[list[bytes], list[bytes]]:
    """Chains, and the frames they must become."""
    add(guest.nic, abi.Direction.TX)
    chains, frames, seq, records = [], [], START, 0
    for number in range(COUNT):
        if rng.random() < 0.5:
            frame = other(rng, number, outgoing=True)
            chains.append(PLAIN + frame)
        else:
            text = rng.randbytes(rng.randrange(900))
            clear = segment(record(text, records), seq)
            frame = clear[:54] + record(text, records, sealed=True)
            chains.append(bytes(marked(clear)))
            seq, records = seq + len(clear) - 54, records + 1
        frames.append(frame)
    return chains, frames


@pytest.mark.conformance(120)
def test_tx_keeps_the_order(loop: Loop, guest: Guest, port: Recorder) -> None:
    """All chains are there before the device looks."""
    chains, frames = mixed_tx(random.Random(1), guest)
    for number, chain in enumerate(chains):
        post(guest, number, chain)
    guest.queues[1].publish()
    os.eventfd_write(guest.kicks[1], 1)
    rounds(loop, 10)
    assert port.sent == frames
    assert len(guest.queues[1].collect()) == COUNT + 1  # and the HELLO


@pytest.mark.conformance(120)
@pytest.mark.conformance(122)
def test_tx_holds_nothing_back(loop: Loop, guest: Guest, port: Recorder) -> None:
    """Each packet is on the wire, and its chain is back, before the next one is there."""
    guest.queues[1].collect()
    for number, (chain, frame) in enumerate(zip(*mixed_tx(random.Random(2), guest), strict=True)):
        post(guest, number, chain)
        guest.queues[1].publish()
        os.eventfd_write(guest.kicks[1], 1)
        rounds(loop, 1)
        assert port.sent == [frame]
        assert len(guest.queues[1].collect()) == 1
        port.sent.clear()


@pytest.mark.parametrize("personality", list(abi.RxPersonality))
@pytest.mark.conformance(120)
@pytest.mark.conformance(122)
def test_rx_keeps_the_order_and_holds_nothing_back(guest: Guest, personality: abi.RxPersonality) -> None:
    """In sync, with a hole, lost, asking: whatever came is in the guest's next buffer at once."""
    rng = random.Random(personality)
    add(guest.nic, abi.Direction.RX, rx_personality=personality)
    stream = b"".join(record(rng.randbytes(rng.randrange(900)), number, sealed=True) for number in range(COUNT))
    at = 0
    marks: set[bool] = set()
    for number in range(COUNT):
        if number and rng.random() < 0.3:
            wire, plain = other(rng, number, outgoing=False), True
        else:
            size = rng.randrange(1, 1000)
            wire, plain = segment(stream[at : at + size], START + at, outgoing=False), False
            at += size if rng.random() > 0.1 else size + 300
        queue = guest.queues[0]
        where = BUFFERS
        queue.add([], [(where, ROOM)])
        queue.publish()
        guest.device.port.receiver(memoryview(bytearray(PLAIN)), memoryview(bytearray(wire)))
        ((_, written),) = queue.collect()
        got = bytes(guest.ram[where : where + written])
        extended = bool(got[0] & abi.HDR_F_EXT)
        assert extended is not plain
        frame = got[len(PLAIN) + abi.RX_TLS.size if extended else len(PLAIN) :]
        decrypted = extended and bool(got[13] & abi.RxTlsFlag.DECRYPTED)
        assert (frame[:54], len(frame)) == (wire[:54], len(wire))
        assert decrypted or frame == wire
        marks.add(decrypted)
    assert marks == {True, False}


class Datagrams(TapPort):
    """A tap as far as reading goes: frames come from a socket, and nobody asks it for offloads."""

    def features_changed(self, accepted: int) -> None:
        pass


def test_a_guest_that_sends_much_does_not_keep_the_wire_waiting(loop: Loop, guest: Guest, port: Recorder) -> None:
    """What is sent in the device's next round anyway does not go before frames that are there."""
    for number in range(COUNT):
        post(guest, number, PLAIN + segment(b"clear"))
    guest.queues[1].publish()
    os.eventfd_write(guest.kicks[1], 1)
    rounds(loop, 1)
    sent = len(port.sent)
    assert BURST <= sent < COUNT
    port.before_frames()
    assert len(port.sent) == sent
    rounds(loop, 10)
    assert len(port.sent) == COUNT


@contextmanager
def on_a_tap(loop: Loop) -> Iterator[tuple[Port, Callable[[bytes], object]]]:
    """A port, and what sends it a frame."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    with theirs:
        yield Datagrams(loop, ours.detach()), lambda frame: theirs.sendall(PLAIN + frame)


@contextmanager
def on_a_cable(loop: Loop) -> Iterator[tuple[Port, Callable[[bytes], object]]]:
    near, far = PairPort.create(loop)
    yield near, lambda frame: far.send(Packet(PLAIN, memoryview(frame)))


@pytest.mark.parametrize("director", [False, True])
@pytest.mark.parametrize("made", [on_a_tap, on_a_cable])
def test_what_was_posted_without_a_kick_comes_before_a_frame(
    loop: Loop,
    made: Callable[[Loop], AbstractContextManager[tuple[Port, Callable[[bytes], object]]]],
    director: bool,
) -> None:
    """A context for what is about to come: its driver need not tell the device of it (docs/device.md, Posted adds)."""
    with made(loop) as (port, send):
        posted_in_silence(loop, port, send, director)
        port.close()


def posted_in_silence(loop: Loop, port: Port, send: Callable[[bytes], object], director: bool) -> None:
    guest = Guest(loop, FaultyPort(loop, port, make_nic()) if director else port)
    guest.start(0)
    guest.start(1)
    guest.offer(2)
    guest.transmit(hello())
    rounds(loop)
    assert len(guest.queues[0].collect()) == 1
    post(guest, 0, PLAIN + segment(b"clear"))
    post(guest, 1, bytes(command(abi.Opcode.CTX_ADD, body=ctx_add(abi.Direction.RX))))
    guest.queues[1].publish()
    rounds(loop)
    assert len(guest.nic.table) == 0, "nobody has looked"
    send(segment(record(b"text", sealed=True), outgoing=False))
    rounds(loop)
    assert len(guest.queues[1].collect()) == 3
    ((_, written),) = guest.queues[0].collect()
    got = bytes(guest.ram[BUFFERS + ROOM : BUFFERS + ROOM + written])
    assert got[13] & abi.RxTlsFlag.DECRYPTED
    assert b"text" in got
