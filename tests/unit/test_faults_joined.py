"""segments = "joined" does to segments what "wire" does: whatever leaves, cut to wire size, is the same."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from nicdev.abi import Direction
from nicdev.faults.parcel import Parcel
from nicdev.stats import Counter
from nicdev.wire import checksum
from nicdev.wire.frame import TCP_CWR, Frame, parse
from nicdev.wire.segment import segment
from nicdev.wire.vnet import VnetHdr, split
from tests.support.ether import ETH
from tests.support.fault_world import GSO, PLAIN, RECORD, RX, START, STREAM, TX, World, rule
from tests.support.fault_world import segment as segment_of

ENDS = {4: ("198.51.100.2", "198.51.100.1"), 6: ("2001:db8::2", "2001:db8::1")}


@dataclass(frozen=True)
class Large:
    """A packet of a guest's connection, from byte `at` of the stream on."""

    direction: Direction = TX
    at: int = 0
    size: int = 5000
    gso_size: int = 1000
    family: int = 4
    port: int = 4000
    flags: str = "PA"
    is_open: bool = True
    pause: float = 0  # seconds before it comes

    @cached_property
    def frame(self) -> bytes:
        (guest, peer), ip = ENDS[self.family], IP(id=0xFFFD) if self.family == 4 else IPv6()
        ip.src, ip.dst = (guest, peer) if self.direction is TX else (peer, guest)
        sport, dport = (self.port, 443) if self.direction is TX else (443, self.port)
        options = [("NOP", None)] * 4
        tcp = TCP(sport=sport, dport=dport, seq=(START + self.at) & 0xFFFFFFFF, flags=self.flags, options=options)
        frame = bytearray(bytes(ETH / ip / tcp / STREAM[self.at : self.at + self.size]))
        if self.is_open:
            checksum.set_partial(frame, known(parse(frame)))
        return bytes(frame)

    def header(self, frame: bytes) -> bytes:
        f = known(parse(bytearray(frame)))
        gso_type = (1 if self.family == 4 else 4) | 0x80 * ("C" in self.flags)
        start, offset = (f.l4, 16) if self.is_open else (0, 0)
        return struct.pack("<BBHHHHH", self.is_open, gso_type, f.payload, self.gso_size, start, offset, 0)


def known(parsed: Frame | None) -> Frame:
    assert parsed is not None
    return parsed


def cut(parcels: list[Parcel]) -> list[bytes]:
    """What leaves, in segments of wire size with complete checksums."""
    frames: list[bytearray] = []
    for parcel in parcels:
        hdr, frame = VnetHdr.unpack_from(parcel.header), bytearray(parcel.frame)
        f = known(parse(frame))
        if hdr.gso_type:
            frames += segment(frame, f, hdr.gso_size)
        else:
            if hdr.flags:
                checksum.fill_tcp(frame, f)
            elif frame[f.l4 + 16 : f.l4 + 18] == b"\xff\xff":  # the same as 0
                frame[f.l4 + 16 : f.l4 + 18] = b"\0\0"
            frames.append(frame)
    return [bytes(frame) for frame in frames]


def headers_are_right(parcels: list[Parcel], spoilt: bool) -> None:
    """Nobody refuses, or misunderstands, what leaves; `spoilt`: checksums may be wrong on purpose."""
    for parcel in parcels:
        hdr, frame = VnetHdr.unpack_from(parcel.header), bytearray(parcel.frame)
        f = known(parse(frame))
        if hdr.flags:
            assert (hdr.flags, hdr.csum_start, hdr.csum_offset) == (1, f.l4, 16)
            split(memoryview(bytearray(parcel.header) + frame), 12)
            checksum.set_partial(frame, f)
            assert frame == parcel.frame
        else:
            assert spoilt or checksum.verify_tcp(frame, f)
        if hdr.gso_type:
            assert f.end - f.payload > hdr.gso_size
            assert (hdr.gso_type & 0x7F, hdr.hdr_len) == ({4: 1, 6: 4}[f.family], f.payload)
            assert not hdr.gso_type & 0x80 or f.tcp_flags & TCP_CWR
        else:
            assert hdr.gso_size == hdr.hdr_len == 0


class Ways:
    """The same scenario and the same segments: cut before they come, by "wire", or judged in large packets."""

    def __init__(self, rates: str, rules: str = "", seed: int = 1) -> None:
        self.spoilt = "wrong" in rates + rules
        self.fed = self.out = 0
        self.before, self.wire, self.joined = self.worlds = [
            World(f"seed = {seed}\n" + "".join(f'[{d}]\nsegments = "{kind}"\n{rates}\n' for d in ("tx", "rx")) + rules)
            for kind in ("wire", "wire", "joined")
        ]
        for world in self.worlds:
            for direction in (TX, RX):
                world.context(direction)
                world.context(direction, port=4001)

    def feed(self, large: Large, now: float = 0) -> list[Parcel]:
        """One packet for all; what leaves where neighbours are joined."""
        frame = large.frame
        header = large.header(frame)
        pieces = segment(bytearray(frame), known(parse(bytearray(frame))), large.gso_size)
        before, wire, joined = (world.director for world in self.worlds)
        first = [parcel for one in pieces for parcel in before.feed(large.direction, PLAIN, memoryview(one), now)]
        second, third = (
            director.feed(large.direction, header, memoryview(bytearray(frame)), now) for director in (wire, joined)
        )
        self.fed += 1
        headers_are_right([parcel for parcel in third if parcel.header is not header], self.spoilt)
        self.same(first, second, third)
        return third

    def same(self, *ways: list[Parcel]) -> None:
        """What leaves is the same, and so is what the rules say of it."""
        first, second, third = map(cut, ways)
        assert first == second
        assert second == third
        shown = [world.director.describe() for world in self.worlds]
        for key in ("rules", "held"):
            assert shown[0][key] == shown[1][key] == shown[2][key]
        self.out += len(ways[2])

    def end(self) -> None:
        """What is held leaves; no packet was lost or made without a count, and all else was counted alike."""
        self.same(*([parcel for _, parcel in world.director.flush()] for world in self.worlds))
        for counter in Counter:
            first, second, third = (world.stats[counter] for world in self.worlds)
            assert counter is Counter.FAULT_CUT or first == second == third, counter.name
        stats = self.joined.stats
        made = stats[Counter.FAULT_CUT] + stats[Counter.FAULT_DUPLICATED] - stats[Counter.FAULT_DROPPED]
        assert self.fed + made == self.out


LARGE = st.builds(
    Large,
    direction=st.sampled_from((TX, RX)),
    at=st.sampled_from((0, 1000, 2500, 4000)) | st.integers(0, 5000),
    size=st.sampled_from((0, 1, 999, 1000, 1001, 5000)) | st.integers(0, 5500),
    gso_size=st.sampled_from((100, 536, 536, 1000, 1000, 6000)),
    family=st.sampled_from((4, 4, 6)),
    port=st.sampled_from((4000, 4000, 4001)),
    flags=st.sampled_from(("A", "PA", "FPA", "CPA", "SA")),
    is_open=st.sampled_from((True, True, False)),
    pause=st.sampled_from((0, 0, 0.002, 0.03)),
)
RATES = (
    "drop = 0.1",
    "duplicate = 0.1",
    "corrupt = 0.1",
    "reorder = 0.05",
    "delay = 0.1",
    'checksum = "wrong"',
    "ms = 1",
)
LIMITS = ("nth = 3", "count = 2", 'remote = "*:443"', 'local = "*:4001"', "retransmissions = false")
PLACES: tuple[list[str], ...] = (
    [], ["flow = 1"], ["record = 3"], ["record = 2", 'part = "header"'], ["record = 5", 'part = "tag"'],
    ["seq = [1500, 2500]"],
)  # fmt: skip
RULES = st.builds(
    lambda action, direction, limits, place: rule(action, *limits, *place, direction=direction),
    st.sampled_from(("drop", "duplicate", "corrupt", "swap", "reorder")),
    st.sampled_from(("tx", "rx")),
    st.lists(st.sampled_from(LIMITS), unique=True),
    st.sampled_from(PLACES),
)


@settings(deadline=None, max_examples=400)
@given(
    st.lists(st.sampled_from(RATES), unique=True),
    st.lists(RULES, max_size=4),
    st.integers(0, 1000),
    st.lists(LARGE, min_size=1, max_size=12),
)
def test_the_same_segments_are_struck_in_the_same_way(
    rates: list[str], rules: list[str], seed: int, packets: list[Large]
) -> None:
    ways = Ways("\n".join(rates), "".join(rules), seed)
    now = 0.0
    for large in packets:
        now += large.pause
        ways.feed(large, now)
    ways.end()


@pytest.mark.parametrize("large", [Large(), Large(RX), Large(RX, family=6, flags="CFPA", is_open=False)])
def test_a_packet_that_no_rule_touches_is_not_touched(large: Large) -> None:
    """Header and frame are those that came; the rules have seen every segment of it."""
    world = World("".join(f'[{d}]\nsegments = "joined"\ndrop = 0.000001\n' for d in ("tx", "rx")))
    frame = memoryview(bytearray(large.frame))
    header = large.header(large.frame)
    (parcel,) = world.director.feed(large.direction, header, frame, 0)
    assert parcel.header is header
    assert parcel.frame is frame
    assert frame == large.frame
    assert world.stats[Counter.FAULT_CUT] == 0
    assert sorted(rule["fitted"] for rule in world.rules()) == [0, 5]


def sizes(parcels: list[Parcel]) -> list[int]:
    """Bytes of payload in each."""
    return [f.end - f.payload for f in (known(parse(parcel.frame)) for parcel in parcels)]


@pytest.mark.parametrize(("direction", "behind"), [(TX, [7000]), (RX, [1000] * 7)])
def test_neighbours_leave_together(direction: Direction, behind: list[int]) -> None:
    """Segment 3 is lost, and nothing of the next packet; behind the hole the engine sees segments."""
    ways = Ways("", rule("drop", "nth = 3", direction=direction.name.lower()))
    out = ways.feed(Large(direction, size=10000, flags="CFPA"))
    assert sizes(out) == [2000, *behind]
    assert [known(parse(parcel.frame)).tcp_flags for parcel in (out[0], out[-1])] == [0x90, 0x19]
    assert [parcel.header[1] for parcel in out] == [0x81] + [int(direction is TX)] * len(behind)
    assert sizes(ways.feed(Large(direction, at=5000))) == [5000]
    ways.end()


def test_what_is_overtaken_is_overtaken_by_segments() -> None:
    """A held segment counts segments of its stream and goes on between them; those behind it leave together again."""
    ways = Ways("", rule("reorder", "nth = 2", "distance = 6"))
    assert sizes(ways.feed(Large())) == [1000] * 4
    assert sizes(ways.feed(Large(port=4001))) == [5000]
    assert sizes(ways.feed(Large(at=5000, size=5400))) == [1000] * 3 + [1000] + [2400]
    ways.end()


def test_a_segment_is_judged_by_what_has_passed_with_it() -> None:
    """What comes later in the same packet, and is no TLS, does not hide the records before it."""
    ways = Ways("", rule("drop", "record = 2", 'part = "header"'))
    stream = STREAM[: 4 * RECORD] + bytes(3000)
    out = [world.pass_(segment_of(0, stream), GSO) for world in (ways.wire, ways.joined)]
    assert [len(frames) for frames in out] == [5, 2]
