"""Frame parsing, checksums and segmentation; scapy builds the frames and computes the checksums."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Raw

from nicdev.wire import checksum
from nicdev.wire.frame import TCP_CWR, TCP_FIN, TCP_PSH, Frame, parse
from nicdev.wire.segment import segment
from tests.support.ether import ETH

V4 = IP(src="10.1.2.3", dst="10.4.5.6", id=0xFFFE, ttl=64)
V6 = IPv6(src="fd00::1:2", dst="fd00::3:4")
SEGMENT = TCP(sport=50001, dport=4433, seq=0xFFFFFF00, ack=77, flags="PA", window=501)
OPTIONS = [("NOP", None), ("NOP", None), ("Timestamp", (12345, 67890))]
EXTENSIONS = [
    V6 / IPv6ExtHdrHopByHop(),
    V6 / IPv6ExtHdrDestOpt(),
    V6 / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / IPv6ExtHdrRouting(segleft=0) / IPv6ExtHdrDestOpt(),
]


def build(packet: object) -> bytearray:
    return bytearray(bytes(packet))  # type: ignore[call-overload]


def parsed(frame: bytearray) -> Frame:
    f = parse(frame)
    assert f is not None
    assert parse(memoryview(frame)) == f
    return f


@pytest.mark.parametrize("padding", [0, 1, 18])
def test_ipv4(padding: int) -> None:
    frame = build(ETH / V4 / SEGMENT / b"hello") + bytes(padding)
    assert parsed(frame) == Frame(
        family=4,
        l3=14,
        l4=34,
        payload=54,
        end=59,
        src=bytes((10, 1, 2, 3)),
        dst=bytes((10, 4, 5, 6)),
        sport=50001,
        dport=4433,
        seq=0xFFFFFF00,
        tcp_flags=0x18,
    )


def test_ipv6() -> None:
    frame = build(ETH / V6 / SEGMENT / b"hello") + bytes(3)
    f = parsed(frame)
    assert (f.family, f.l3, f.l4, f.payload, f.end) == (6, 14, 54, 74, 79)
    assert f.src.hex() == "fd000000000000000000000000010002"
    assert f.dst.hex() == "fd000000000000000000000000030004"
    assert (f.sport, f.dport, f.seq, f.tcp_flags) == (50001, 4433, 0xFFFFFF00, 0x18)


@pytest.mark.conformance(126)
def test_ipv4_and_tcp_options() -> None:
    frame = build(ETH / IP(src="1.2.3.4", dst="5.6.7.8", options=b"\x94\x04\x00\x00") / TCP(options=OPTIONS) / b"x")
    f = parsed(frame)
    assert (f.l4, f.payload, f.end) == (38, 38 + 32, 38 + 33)


@pytest.mark.conformance(126)
@pytest.mark.parametrize("headers", EXTENSIONS, ids=["hop-by-hop", "destination", "four"])
def test_ipv6_extension_headers(headers: IPv6) -> None:
    frame = build(ETH / headers / SEGMENT / b"abc")
    f = parsed(frame)
    assert frame[f.payload : f.end] == b"abc"
    assert (f.sport, f.dport) == (50001, 4433)
    assert checksum.verify_tcp(frame, f)


def test_segment_without_payload_and_all_flags() -> None:
    f = parsed(build(ETH / V4 / TCP(flags=0xFF)))
    assert (f.payload, f.end, f.tcp_flags) == (54, 54, 0xFF)


@pytest.mark.parametrize(
    "packet",
    [
        ETH / Dot1Q(vlan=5) / V4 / SEGMENT / (b"x" * 40),
        ETH / V4 / UDP(sport=1, dport=2) / (b"x" * 40),
        ETH / V6 / UDP(sport=1, dport=2) / (b"x" * 40),
        ETH / ARP() / Raw(b"x" * 60),
        ETH / IP(flags="MF") / SEGMENT / b"x",
        ETH / IP(frag=100) / SEGMENT / b"x",
        ETH / V6 / IPv6ExtHdrFragment(offset=0, m=0) / SEGMENT / b"x",
        ETH / V6 / IPv6ExtHdrFragment(offset=0, m=1) / SEGMENT / b"x",
        ETH / V6 / IPv6ExtHdrRouting(segleft=1, addresses=["::1"]) / SEGMENT / b"x",
        ETH / V6 / IPv6ExtHdrDestOpt() / IPv6ExtHdrHopByHop() / SEGMENT / b"x",
        ETH / V6 / IPv6ExtHdrDestOpt() / UDP() / (b"x" * 40),
        ETH / V6 / IPv6(src="::1", dst="::2") / SEGMENT,
        ETH / V4 / IP() / SEGMENT,
        ETH / IP(len=0) / SEGMENT / b"x",
        ETH / IPv6(plen=0) / SEGMENT / b"x",
        ETH / IP(len=39) / SEGMENT / b"x",
        ETH / IPv6(plen=19) / SEGMENT / b"x",
        ETH / IP(len=42) / SEGMENT / b"x",
        ETH / IPv6(plen=22) / SEGMENT / b"x",
        ETH / IP(ihl=4) / SEGMENT / b"x",
        ETH / IP(version=6) / SEGMENT / b"x",
        ETH / IPv6(version=4) / SEGMENT / b"x",
        ETH / V4 / TCP(dataofs=4) / b"x",
        ETH / V4 / TCP(dataofs=6) / b"x",
        ETH / V6 / TCP(dataofs=15) / b"x",
    ],
    ids=lambda packet: packet.summary()[8:60],
)
def test_refused(packet: Ether) -> None:
    assert parse(build(packet)) is None


def test_a_long_chain_of_extension_headers_is_refused() -> None:
    packet = V6
    for _ in range(9):
        packet = packet / IPv6ExtHdrDestOpt()
    assert parse(build(ETH / packet / SEGMENT)) is None


@pytest.mark.parametrize(
    "packet",
    [ETH / V4 / SEGMENT / b"hi", ETH / EXTENSIONS[2] / TCP(options=OPTIONS) / b"hi"],
    ids=["ipv4", "ipv6"],
)
def test_every_truncation_is_refused(packet: Ether) -> None:
    frame = build(packet)
    assert parse(frame) is not None
    for size in range(len(frame)):
        assert parse(frame[:size]) is None


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_frames_never_raise_and_offsets_are_in_order(data: st.DataObject) -> None:
    packet = data.draw(st.sampled_from([ETH / V4 / SEGMENT / b"hi", *(ETH / e / SEGMENT / b"hi" for e in EXTENSIONS)]))
    frame = build(packet)
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(12, len(frame) - 1))] = data.draw(st.integers(0, 255))
    f = parse(frame)
    if f is not None:
        assert 14 == f.l3 < f.l4 < f.payload <= f.end <= len(frame)
        assert f.l4 + 20 <= f.payload


def test_sum16_is_the_sum_of_words() -> None:
    rng = random.Random(3)
    for size in [*range(70), 127, 128, 129, 1447, 1448, 4095, 32767, 32768, 32769, 65535]:
        data = rng.randbytes(size)
        padded = data + bytes(size % 2)
        words = sum(int.from_bytes(padded[at : at + 2], "big") for at in range(0, len(padded), 2))
        assert checksum.sum16(data) == words % 0xFFFF
        assert checksum.sum16(memoryview(bytearray(data))) == words % 0xFFFF
    assert checksum.sum16(b"\xff" * 65535) == (0xFFFF * 32767 + 0xFF00) % 0xFFFF


PACKETS = [
    ETH / V4 / SEGMENT,
    ETH / V4 / SEGMENT / b"odd",
    ETH / V4 / TCP(options=OPTIONS) / bytes(range(200)),
    ETH / V4 / SEGMENT / random.Random(1).randbytes(65535 - 40),
    ETH / V6 / SEGMENT / b"odd",
    ETH / V6 / TCP(options=OPTIONS) / random.Random(2).randbytes(1428),
    ETH / EXTENSIONS[2] / SEGMENT / b"even",
]


@pytest.mark.parametrize("packet", PACKETS, ids=range(len(PACKETS)))
@pytest.mark.parametrize("padding", [b"", b"\xaa\xbb\xcc"])
@pytest.mark.conformance(31)
def test_checksums_agree_with_scapy(packet: Ether, padding: bytes) -> None:
    frame = build(packet) + padding
    f = parsed(frame)
    right = bytes(frame[f.l4 + 16 : f.l4 + 18])
    assert checksum.tcp_checksum(frame, f) == int.from_bytes(right, "big")
    assert checksum.verify_tcp(frame, f)
    frame[f.l4 + 16 : f.l4 + 18] = b"\x12\x34"
    assert not checksum.verify_tcp(frame, f)
    checksum.fill_tcp(frame, f)
    assert frame[f.l4 + 16 : f.l4 + 18] == right
    assert frame[len(frame) - len(padding) :] == padding


@pytest.mark.parametrize("packet", PACKETS, ids=range(len(PACKETS)))
def test_partial_checksum_is_what_finish_partial_completes(packet: Ether) -> None:
    frame = build(packet)
    f = parsed(frame)
    right = bytes(frame)
    checksum.set_partial(frame, f)
    assert frame != right
    checksum.finish_partial(frame, f.l4, 16)
    assert frame == right


def test_finish_partial_never_writes_zero() -> None:
    frame = build(ETH / V4 / UDP(sport=1, dport=2, chksum=0) / b"\0\0")
    words = [int.from_bytes(frame[at : at + 2], "big") for at in range(34, len(frame), 2)]
    frame[-2:] = (0xFFFF - sum(words)).to_bytes(2, "big")  # now the words add up to 0xFFFF
    checksum.finish_partial(frame, 34, 6)
    assert frame[40:42] == b"\xff\xff"


def test_verify_sees_every_flipped_bit_of_headers_and_payload() -> None:
    for packet in (ETH / V4 / SEGMENT / b"payload", ETH / V6 / SEGMENT / b"payload"):
        frame = build(packet)
        f = parsed(frame)
        covered = range(14, f.end) if f.family == 4 else range(22, f.end)
        for at in covered:
            for bit in range(8):
                frame[at] ^= 1 << bit
                damaged = parse(frame)
                assert damaged is None or not checksum.verify_tcp(frame, damaged)
                frame[at] ^= 1 << bit


@pytest.mark.parametrize("packet", [PACKETS[2], PACKETS[3], PACKETS[5], PACKETS[6]], ids=["v4", "64k", "v6", "ext"])
@pytest.mark.parametrize("mss", [1, 7, 536, 1448, 65535])
def test_segments_are_what_scapy_would_send(packet: Ether, mss: int) -> None:
    if mss < 536:
        packet = packet.copy()
        packet[TCP].payload = Raw(bytes(packet[TCP].payload)[:40])
        del packet[TCP].chksum
    packet[TCP].flags = "FPACE"
    packet[TCP].seq = 0xFFFFFF00
    frame = build(packet)
    f = parsed(frame)
    payload = bytes(frame[f.payload : f.end])
    checksum.set_partial(frame, f)
    pieces = segment(frame + b"pad", f, mss)
    assert len(pieces) == -(-len(payload) // mss)
    for index, piece in enumerate(pieces):
        want = Ether(bytes(frame))
        want[TCP].remove_payload()
        chunk = payload[index * mss : (index + 1) * mss]
        want = want / Raw(chunk)
        want[TCP].seq = (0xFFFFFF00 + index * mss) % 2**32
        del want[TCP].chksum
        if IP in want:
            want[IP].id = (frame[18] * 256 + frame[19] + index) & 0xFFFF
            del want[IP].len
            del want[IP].chksum
        else:
            del want[IPv6].plen
        flags = int(want[TCP].flags)
        if index:
            flags &= ~TCP_CWR
        if index < len(pieces) - 1:
            flags &= ~(TCP_FIN | TCP_PSH)
        want[TCP].flags = flags
        assert bytes(piece) == bytes(want)
        if index > 3:
            break
    assert b"".join(bytes(piece[f.payload :]) for piece in pieces) == payload
    assert all(checksum.verify_tcp(piece, parsed(piece)) for piece in pieces)
    assert parsed(pieces[-1]).tcp_flags & (TCP_FIN | TCP_PSH) == TCP_FIN | TCP_PSH


def test_segment_without_payload_comes_back_whole() -> None:
    frame = build(ETH / V4 / SEGMENT)
    assert segment(frame, parsed(frame), 1448) == [frame]
