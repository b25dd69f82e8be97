"""What the NIC does with frames that must not reach the guest."""

from __future__ import annotations

import struct

from scapy.layers.inet import IP, fragment
from scapy.layers.l2 import Dot1Q, Ether

from nicdev import abi
from nicdev.nic import Nic
from nicdev.stats import Counter
from tests.support.ether import ETH
from tests.support.nic_chains import PLAIN, START, add, hello, make_nic, receive, record, segment


def wire() -> bytes:
    return b"".join(record(b"x" * 66, number, sealed=True) for number in range(8))  # of 95 bytes


def put(nic: Nic, low: int, high: int, data: bytes | None = None) -> int:
    """Flags of the verdict on bytes low..high of the stream."""
    header, _ = receive(nic, segment(data or wire()[low:high], seq=START + low, outgoing=False))
    return header[13]


def swallowed(nic: Nic, frame: bytes) -> bool:
    before = nic.stats[Counter.RX_DROP_INCONSISTENT]
    packets = nic.receive(memoryview(bytearray(PLAIN)), memoryview(bytearray(frame)))
    return not packets and nic.stats[Counter.RX_DROP_INCONSISTENT] == before + 1


def in_debt() -> Nic:
    """A NIC that has marked record 3, while a part of record 2 is missing."""
    nic = make_nic()
    nic.transmit(0, hello())
    add(nic, abi.Direction.RX)
    assert put(nic, 0, 220) == abi.RxTlsFlag.DECRYPTED
    assert put(nic, 285, 380) == abi.RxTlsFlag.DECRYPTED
    return nic


def test_another_copy_of_a_header_is_dropped_and_counted() -> None:
    nic = in_debt()
    forged = bytearray(wire()[190:220])
    struct.pack_into(">H", forged, 3, 200)
    assert swallowed(nic, segment(bytes(forged), seq=START + 190, outgoing=False))
    assert put(nic, 220, 285) == abi.RxTlsFlag.DECRYPTED


def test_fragments_and_tags_are_dropped_while_in_debt() -> None:
    nic = in_debt()
    missing = Ether(segment(wire()[220:285], seq=START + 220, outgoing=False))
    first, *_ = fragment(missing[IP], fragsize=40)
    hiding = [bytes(ETH / first), bytes(ETH / Dot1Q(vlan=7) / missing[IP])]
    assert [swallowed(nic, frame) for frame in hiding] == [True, True]
    assert put(nic, 220, 285) == abi.RxTlsFlag.DECRYPTED
    assert [swallowed(nic, frame) for frame in hiding] == [False, False]


def test_poisoned_flow_lets_nothing_through_and_others_live() -> None:
    nic = in_debt()
    assert put(nic, 500, 530, bytes(30)) == 0
    assert swallowed(nic, segment(b"\x17\x02\x03\x00\x40", seq=START + 380, outgoing=False))
    assert swallowed(nic, segment(wire()[220:285], seq=START + 220, outgoing=False))
    plain = bytes(ETH / IP(src="192.0.2.77", dst="192.0.2.78") / b"hello")
    assert not swallowed(nic, plain)
