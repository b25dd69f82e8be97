"""Between ring and NIC: packets leave and arrive one for one, in order, at once."""

from __future__ import annotations

import random

import pytest

from nicdev import abi
from nicdev.errors import RingError
from nicdev.nic import MAX_CHAIN, Packet
from nicdev.queues import QUIET_BYTES, QUIET_CHAINS, QueuePair
from nicdev.stats import Counter
from nicdev.virtio.features import VIRTIO_NET_F_MRG_RXBUF
from tests.support.nic_chains import NEEDS_CSUM, PLAIN, START, add, hello, make_nic, marked, record, segment
from tests.support.rings import DATA, RAM, make

HEADERS = 54  # bytes of Ethernet, IP and TCP


def mixture(rng: random.Random, *, sealed: bool) -> list[tuple[bytes, bool]]:
    """Frames of one flow, and whether they hold a record: bare acknowledgements lie between the data."""
    frames = []
    seq, number = START, 0
    for _ in range(100):
        payload = record(rng.randbytes(rng.choice((1, 100, 1400))), number, sealed) if rng.random() < 0.5 else b""
        frames.append((segment(payload, seq=seq, outgoing=not sealed), bool(payload)))
        number += bool(payload)
        seq += len(payload)
    return frames


@pytest.mark.conformance(120)
@pytest.mark.conformance(122)
def test_data_and_acknowledgements_leave_as_they_came() -> None:
    nic = make_nic()
    add(nic, abi.Direction.TX)
    pair = QueuePair(0, nic)
    queue, pair.tx = make(16)
    rng = random.Random(1)
    frames = mixture(rng, sealed=False)
    sent: list[Packet] = []

    def send(packet: Packet) -> bool:
        sent.append(packet)
        return True

    posted = 0
    while posted < len(frames):
        at = DATA
        for frame, holds_record in frames[posted : posted + rng.randrange(1, 6)]:
            chain = marked(frame) if holds_record else NEEDS_CSUM + frame
            queue.ram[at : at + len(chain)] = chain
            queue.add([(at, len(chain))], [])
            at += len(chain)
            posted += 1
        queue.publish()
        pair.drain_tx(send)
        assert [packet.frame[:HEADERS] for packet in sent] == [frame[:HEADERS] for frame, _ in frames[:posted]]
        queue.collect()
    assert not queue.in_flight


@pytest.mark.parametrize("parts", [1, 2])
def test_a_chain_that_is_too_long_is_not_looked_at(parts: int) -> None:
    nic = make_nic()
    pair = QueuePair(0, nic)
    queue, pair.tx = make(8)
    head = queue.add([(DATA, MAX_CHAIN // parts + 1)] * parts, [])
    queue.publish()
    assert pair.drain_tx(lambda _: True) == (False, True)
    assert nic.stats[Counter.TX_DROP_TOO_BIG] == 1
    assert nic.stats[Counter.TX_PACKETS] == 0
    assert queue.collect() == [(head, 0)]


@pytest.mark.parametrize(("fault", "home"), [("ring", 3), ("port", 2)])
def test_chains_before_a_fault_go_home(fault: str, home: int) -> None:
    """The fourth is nowhere in memory, or the third is more than the port can bear."""
    pair = QueuePair(0, make_nic())
    queue, pair.tx = make(8)
    chain = PLAIN + segment(b"x")
    queue.ram[DATA : DATA + len(chain)] = chain
    heads = [queue.add([(address, len(chain))], []) for address in (DATA, DATA, DATA, RAM)]
    queue.publish()
    sent: list[Packet] = []

    def send(packet: Packet) -> bool:
        sent.append(packet)
        if fault == "port" and len(sent) == 3:
            raise ValueError
        return True

    with pytest.raises(RingError if fault == "ring" else ValueError):
        pair.drain_tx(send)
    pair.tx.publish()
    assert queue.collect() == [(head, 0) for head in heads[:home]]


@pytest.mark.conformance(89)
@pytest.mark.conformance(120)
@pytest.mark.conformance(122)
def test_data_and_acknowledgements_arrive_as_they_came() -> None:
    nic = make_nic()
    nic.transmit(0, hello())
    add(nic, abi.Direction.RX)
    for frame, holds_record in mixture(random.Random(2), sealed=True):
        ((queue, packet),) = nic.receive(memoryview(bytearray(PLAIN)), memoryview(bytearray(frame)))
        assert queue == 0
        assert packet.frame[:HEADERS] == frame[:HEADERS]
        assert len(packet.frame) == len(frame)
        assert bool(packet.header[0] & abi.HDR_F_EXT) is holds_record


def frame_for(buffers: int) -> Packet:
    """A packet that needs so many buffers of 100 bytes."""
    return Packet(bytes(12), memoryview(bytes(100 * buffers - 12)))


@pytest.mark.parametrize("event_idx", [True, False])
@pytest.mark.parametrize("start", [0, 65533])
def test_a_packet_waits_for_more_buffers_than_there_are(start: int, event_idx: bool) -> None:
    """The kick is for a buffer that was not there: those that were too few are known already."""
    nic = make_nic()
    nic.features = VIRTIO_NET_F_MRG_RXBUF
    pair = QueuePair(0, nic)
    queue, pair.rx = make(8, event_idx=event_idx, start=start)
    pair.rx.want_kicks()
    for at in range(2):
        queue.add([], [(DATA + 100 * at, 100)])
    assert queue.publish()
    assert not pair.deliver(frame_for(4))
    for wanted in (True, True):
        queue.add([], [(DATA + 500, 100)])
        assert queue.publish() is wanted
        delivered = pair.deliver(frame_for(4))
    assert delivered
    pair.rx.publish()
    assert [written for _, written in queue.collect()] == [100] * 4


def test_buffers_that_come_while_it_looks_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, each between the look and the request for a kick: no kick is sent for them."""
    nic = make_nic()
    nic.features = VIRTIO_NET_F_MRG_RXBUF
    pair = QueuePair(0, nic)
    queue, ring = make(8, event_idx=True)
    pair.rx = ring
    wait = type(ring).want_kicks

    def late(self: object) -> bool:
        queue.add([], [(DATA, 100)])
        queue.publish()
        return wait(ring)

    monkeypatch.setattr(type(ring), "want_kicks", late)
    assert pair.deliver(frame_for(3))


def test_a_packet_that_no_ring_of_this_size_can_take_is_dropped() -> None:
    nic = make_nic()
    nic.features = VIRTIO_NET_F_MRG_RXBUF
    pair = QueuePair(0, nic)
    queue, pair.rx = make(2, event_idx=True)
    for at in range(2):
        queue.add([], [(DATA + 100 * at, 100)])
    queue.publish()
    assert pair.deliver(frame_for(3))
    assert nic.stats[Counter.RX_DROP_TOO_BIG] == 1
    assert pair.deliver(frame_for(2))
    pair.rx.publish()
    assert len(queue.collect()) == 2


@pytest.mark.parametrize("apart", [0, 7])
@pytest.mark.parametrize("sizes", [[5] * 30, [12, 100], [32, 1, 100], [1, 31, 100], [33, 100], [44 + 60], [44 + 61]])
def test_a_packet_is_laid_over_buffers_of_any_size(sizes: list[int], apart: int) -> None:
    """Its header, which has an extension, tells their number; the rest of the last buffer stays as it was."""
    nic = make_nic()
    nic.features = VIRTIO_NET_F_MRG_RXBUF
    pair = QueuePair(0, nic)
    queue, pair.rx = make(32, event_idx=True)
    queue.ram[DATA : DATA + 1000] = b"\xee" * 1000
    at, places = DATA, []
    for size in sizes:
        places.append((at, size))
        queue.add([], [places[-1]])
        at += size + apart
    queue.publish()
    header, frame = bytes(range(44)), bytes(range(100, 160))
    assert pair.deliver(Packet(header, memoryview(frame)))
    pair.rx.publish()
    used = queue.collect()
    there = b"".join(bytes(queue.ram[a : a + n]) for a, n in places[: len(used)])
    expected = header[:10] + len(used).to_bytes(2, "little") + header[12:] + frame
    assert there == expected.ljust(len(there), b"\xee")
    assert len(there) - sizes[len(used) - 1] < len(expected)
    assert sum(written for _, written in used) == len(expected)
    assert [written for _, written in used][:-1] == sizes[: len(used) - 1]


class Sender:
    """A driver that posts chains, and what the queue then owes: nothing, a signal "later" or "now"."""

    def __init__(self) -> None:
        self.pair = QueuePair(0, make_nic())
        self.queue, self.pair.tx = make(128, event_idx=True)

    def post(self, chain: bytes, reply: int = 0) -> str:
        self.queue.ram[DATA : DATA + len(chain)] = chain
        self.queue.add([(DATA, len(chain))], [(DATA + 65536, reply)] if reply else [])
        self.queue.publish()
        more, owed = self.pair.drain_tx(lambda _: True)
        assert not more
        if not owed:
            return ""
        return "now" if self.pair.urgent and self.pair.settle() else "later"


def test_so_many_small_frames_need_no_signal_at_once() -> None:
    sender = Sender()
    for _ in range(3):
        sender.queue.want_signal()
        signals = [sender.post(PLAIN + bytes(60)) for _ in range(QUIET_CHAINS + 1)]
        assert signals == ["later"] * (QUIET_CHAINS - 1) + ["now", ""]
        assert len(sender.queue.collect()) == QUIET_CHAINS + 1


def test_so_many_bytes_need_no_signal_at_once() -> None:
    sender = Sender()
    for _ in range(3):
        sender.queue.want_signal()
        signals = [sender.post(PLAIN + bytes(size)) for size in (QUIET_BYTES - 1000, 999, 1)]
        assert signals == ["later", "later", "now"]
        sender.queue.collect()


def test_a_reply_is_signalled_at_once() -> None:
    sender = Sender()
    sender.queue.want_signal()
    assert sender.post(PLAIN + bytes(60)) == "later"
    nothing = bytes([abi.HDR_F_EXT]) + PLAIN[1:] + bytes([abi.ExtType.COMMAND]) + bytes(31)
    assert sender.post(nothing) == "later", "nobody waits for what has no room for a reply"
    assert sender.post(nothing, reply=64) == "now"
    sender.queue.collect()
    sender.queue.want_signal()
    assert sender.post(PLAIN + bytes(60)) == "later", "only the reply was urgent"


def test_who_wants_no_signal_gets_none() -> None:
    sender = Sender()
    sender.queue.want_signal()
    assert sender.post(PLAIN + bytes(QUIET_BYTES)) == "now"
    assert sender.post(PLAIN + bytes(QUIET_BYTES)) == ""
    sender.queue.collect()
    sender.queue.want_signal()
    assert sender.post(PLAIN + bytes(QUIET_BYTES)) == "now"
    sender.queue.collect()
    sender.queue.want_signal()
    assert sender.post(PLAIN + bytes(60)) == "later"
    sender.queue.collect()
    sender.queue.want_signal()
    assert not sender.pair.settle(), "the driver has looked by itself"
