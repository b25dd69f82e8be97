"""Frames in which a TCP segment could hide from the device."""

from __future__ import annotations

import struct

import pytest

from nicdev.wire.frame import parse
from nicdev.wire.hidden import hides_tcp

HERE, THERE = b"\x0a\x00\x00\x02", b"\x0a\x00\x00\x01"
HERE6, THERE6 = bytes(15) + b"\x02", bytes(15) + b"\x01"
PAIR, PAIR6 = (HERE, THERE), (HERE6, THERE6)
SEGMENT = struct.pack(">HHIIBBHHH", 50001, 4433, 1, 1, 0x50, 0x10, 1000, 0, 0) + b"data"


def ipv4(payload: bytes, protocol: int = 6, fragment: int = 0, src: bytes = THERE, dst: bytes = HERE) -> bytes:
    return struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 1, fragment, 64, protocol, 0) + src + dst + payload


def ipv6(payload: bytes, protocol: int = 6) -> bytes:
    return struct.pack(">IHBB", 6 << 28, len(payload), protocol, 64) + THERE6 + HERE6 + payload


def ethernet(packet: bytes, ethertype: int = 0x0800) -> bytes:
    return bytes(12) + ethertype.to_bytes(2, "big") + packet


def tagged(packet: bytes) -> bytes:
    return ethernet(b"\x00\x07\x08\x00" + packet, 0x8100)


@pytest.mark.parametrize(
    "frame",
    [
        ethernet(ipv4(SEGMENT, fragment=0x2000)),
        ethernet(ipv4(SEGMENT[:8], fragment=0x0001)),
        tagged(ipv4(SEGMENT)),
        ethernet(ipv4(ipv4(SEGMENT), protocol=4, src=b"\x01\x01\x01\x01", dst=b"\x02\x02\x02\x02")),
        ethernet(ipv4(ipv4(SEGMENT), protocol=4)),
        ethernet(ipv4(b"\x00\x00\x08\x00" + ipv4(SEGMENT), protocol=47)),
        ethernet(ipv4(bytes(16) + ethernet(ipv4(SEGMENT)), protocol=17)),
        ethernet(ipv6(ipv4(SEGMENT), protocol=4), 0x86DD),
    ],
    ids=["first fragment", "later fragment", "VLAN", "IPIP", "IPIP, same addresses", "GRE", "VXLAN", "4in6"],
)
def test_hidden(frame: bytes) -> None:
    assert parse(bytearray(frame)) is None
    assert hides_tcp(memoryview(frame), PAIR)
    assert not hides_tcp(frame, (HERE, b"\x0a\x00\x00\x03"))


def test_hidden_ipv6_fragment() -> None:
    frame = ethernet(ipv6(b"\x06\x00\x00\x01" + bytes(4) + SEGMENT, protocol=44), 0x86DD)
    assert parse(bytearray(frame)) is None
    assert hides_tcp(frame, PAIR6)


@pytest.mark.parametrize(
    "frame",
    [
        ethernet(ipv4(bytes(40), protocol=17)),
        ethernet(ipv4(bytes(40), protocol=1)),
        ethernet(ipv4(SEGMENT, fragment=0x2000, src=HERE, dst=THERE)),
        ethernet(bytes(8) + THERE + bytes(6) + HERE, 0x0806),
    ],
    ids=["UDP", "ICMP", "the other direction", "ARP"],
)
def test_nothing_to_hide(frame: bytes) -> None:
    assert not hides_tcp(frame, PAIR)


@pytest.mark.parametrize("protocol", [17, 58])
def test_nothing_to_hide_in_ipv6(protocol: int) -> None:
    assert not hides_tcp(ethernet(ipv6(bytes(40), protocol), 0x86DD), PAIR6)
