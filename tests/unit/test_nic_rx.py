"""The NIC without rings: frames in, verdicts out. The oracle is one-shot AESGCM."""

from __future__ import annotations

import struct

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from nicdev import abi
from nicdev.stats import Counter
from tests.support.ether import ETH
from tests.support.nic_chains import (
    GUEST,
    PEER,
    PLAIN,
    START,
    add,
    command,
    hello,
    make_nic,
    receive,
    record,
    segment,
    status,
)


@pytest.mark.conformance(37)
@pytest.mark.conformance(38)
def test_rx_record_is_decrypted_and_framing_stays() -> None:
    nic = make_nic()
    nic.transmit(0, hello())
    add(nic, abi.Direction.RX, slot=3, generation=9)
    sealed = record(b"reply" * 50, sealed=True)
    wire = segment(sealed, outgoing=False)
    header, frame = receive(nic, wire)
    ext = abi.RxTls._make(abi.RX_TLS.unpack(header[12:]))
    assert header[0] & abi.HDR_F_EXT
    assert (ext.type, ext.flags) == (abi.ExtType.RX_TLS, abi.RxTlsFlag.DECRYPTED)
    assert (ext.slot, ext.generation, ext.records, ext.payload) == (3, 9, 1, 250)
    assert frame == wire[:67] + b"reply" * 50 + sealed[-16:]


def test_rx_ethernet_padding_stays_and_what_came_is_not_written_to() -> None:
    nic = make_nic()
    nic.transmit(0, hello())
    add(nic, abi.Direction.RX)
    for number, padding in enumerate((b"padding", b"", b"p")):
        sealed = record(b"reply", number, sealed=True)
        wire = segment(sealed, seq=1000 + number * len(sealed), outgoing=False) + padding
        buffer = bytearray(wire)
        [(_, packet)] = nic.receive(memoryview(bytearray(12)), memoryview(buffer))
        assert packet.header[0] & abi.HDR_F_EXT
        assert packet.frame == wire[:67] + b"reply" + sealed[-16:] + padding
        assert buffer == wire


def test_rx_verdicts_only_for_a_driver_that_said_hello() -> None:
    nic = make_nic()
    add(nic, abi.Direction.RX)
    wire = segment(record(b"reply", sealed=True), outgoing=False)
    assert receive(nic, wire) == (PLAIN, wire)


def damaged(frame: bytes, at: int) -> bytes:
    return frame[:at] + bytes((frame[at] ^ 1,)) + frame[at + 1 :]


@pytest.mark.conformance(33)
@pytest.mark.conformance(92)
def test_rx_wrong_checksum_is_untouched_unmarked_and_moves_nothing() -> None:
    nic = make_nic()
    nic.transmit(0, hello())
    add(nic, abi.Direction.RX)
    wire = segment(record(b"reply", sealed=True), outgoing=False)
    bad = damaged(wire, 70)
    assert receive(nic, bad) == (PLAIN, bad)
    assert nic.stats[Counter.RX_TLS_BAD_CSUM] == 1
    header, _ = receive(nic, wire)
    assert header[13] & abi.RxTlsFlag.DECRYPTED


@pytest.mark.conformance(86)
@pytest.mark.conformance(38)
def test_rx_wrong_tag_is_untouched_and_told() -> None:
    nic = make_nic()
    nic.transmit(0, hello())
    add(nic, abi.Direction.RX)
    wire = segment(damaged(record(b"reply", sealed=True), 15), outgoing=False)
    header, frame = receive(nic, wire)
    assert header[13] == abi.RxTlsFlag.ERROR
    assert frame == wire
    assert nic.stats[Counter.RX_TLS_AUTH_FAIL] == 1


def test_rx_lost_context_asks_the_driver_and_takes_the_answer() -> None:
    nic = make_nic()
    nic.transmit(0, hello())
    add(nic, abi.Direction.RX, slot=2, generation=5)
    first, second, third = (record(b"reply", number, sealed=True) for number in range(3))
    assert len(first) == 34
    header, frame = receive(nic, segment(second, seq=START + 34, outgoing=False))
    ext = abi.RxTls._make(abi.RX_TLS.unpack(header[12:]))
    assert frame == segment(second, seq=START + 34, outgoing=False)
    assert (ext.flags, ext.slot, ext.generation) == (abi.RxTlsFlag.RESYNC_REQ, 2, 5)
    answer = abi.RX_RESYNC.pack(ext.resync_seq, 1 if ext.resync_seq == START + 34 else 2)
    assert status(nic.transmit(0, command(abi.Opcode.RX_RESYNC, 2, 5, answer))) == abi.Status.OK
    header, _ = receive(nic, segment(third, seq=START + 68, outgoing=False))
    assert header[13] == abi.RxTlsFlag.DECRYPTED
    assert nic.stats[Counter.RX_TLS_ASKED] == nic.stats[Counter.RX_TLS_RESYNCED] == 1


@pytest.mark.conformance(34)
@pytest.mark.conformance(116)
def test_rx_for_another_tuple_is_untouched() -> None:
    nic = make_nic()
    nic.transmit(0, hello())
    add(nic, abi.Direction.RX)
    reply = record(b"reply", sealed=True)
    wire = segment(reply)  # from guest to peer: nobody's
    assert receive(nic, wire) == (PLAIN, wire)
    flow = {"src": PEER, "dst": GUEST, "sport": 443, "dport": 4000}
    for other in ({"src": "198.51.100.9"}, {"dst": "198.51.100.9"}, {"sport": 444}, {"dport": 4001}):
        ends = flow | other
        ports = TCP(sport=ends["sport"], dport=ends["dport"], seq=START, flags="PA")
        wire = bytes(ETH / IP(src=ends["src"], dst=ends["dst"]) / ports / reply)
        assert receive(nic, wire) == (PLAIN, wire)
    header, _ = receive(nic, segment(reply, outgoing=False))
    assert header[13] == abi.RxTlsFlag.DECRYPTED


@pytest.mark.conformance(120)
def test_guest_without_offloads_gets_finished_checksums_and_segments() -> None:
    nic = make_nic()
    nic.features = 0
    frame = segment(bytes(3000), outgoing=False)
    header = struct.pack("<BBHHHHH", 1, 1, 54, 1000, 34, 16, 0)  # NEEDS_CSUM, TCPV4, gso_size 1000
    packets = nic.receive(memoryview(bytearray(header)), memoryview(bytearray(frame)))
    assert [len(p.frame) for _, p in packets] == [1054, 1054, 1054]
    assert [Ether(bytes(p.frame))[TCP].seq for _, p in packets] == [START, START + 1000, START + 2000]
    for _, packet in packets:
        assert bytes(packet.header) == PLAIN
        parsed = Ether(bytes(packet.frame))
        written = parsed[TCP].chksum
        del parsed[TCP].chksum
        assert Ether(bytes(parsed))[TCP].chksum == written


def test_flow_is_received_where_it_transmitted() -> None:
    nic = make_nic()
    nic.transmit(3, bytearray(PLAIN + segment(b"x")))
    ((queue, _),) = nic.receive(memoryview(bytearray(12)), memoryview(bytearray(segment(b"y", outgoing=False))))
    assert queue == 3
