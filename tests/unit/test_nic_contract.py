"""What the kernel's document asks of the device where wire and guest meet, driven without either.

Frames are scapy's, records one-shot AESGCM's; the NIC is asked for one frame or chain at a time.
"""

from __future__ import annotations

import random
import struct
from itertools import pairwise

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrHopByHop
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from nicdev import abi
from nicdev.nic import Nic
from nicdev.stats import Counter
from tests.support.nic_chains import (
    GUEST,
    KEY,
    NEEDS_CSUM,
    PEER,
    PLAIN,
    SALT,
    START,
    add,
    command,
    ctx_add,
    hello,
    make_nic,
    marked,
    receive,
    record,
    reply,
    segment,
    sent,
    status,
)

GUEST6, PEER6 = "2001:db8:1::2", "2001:db8:1::1"
RX, TX = abi.Direction.RX, abi.Direction.TX
DECRYPTED = abi.RxTlsFlag.DECRYPTED
TEXT = bytes(range(250))
OPTIONS = [("NOP", None), ("NOP", None), ("Timestamp", (12345, 67890)), ("SAckOK", b"")]
# What stands between Ethernet and payload, from the guest to the peer.
SHAPES: dict[str, Packet] = {
    "plain": IP(src=GUEST, dst=PEER) / TCP(),
    "dscp, ecn, ttl": IP(src=GUEST, dst=PEER, tos=0xBB, ttl=3, id=0xBEEF, flags="DF") / TCP(),
    "ip options": IP(src=GUEST, dst=PEER, options=b"\x94\x04\0\0\x01\x01\x01\0") / TCP(),
    "tcp options": IP(src=GUEST, dst=PEER) / TCP(options=OPTIONS, window=7, ack=99, reserved=5),
    "tcp flags": IP(src=GUEST, dst=PEER) / TCP(flags="FPAUCE", urgptr=3),
    "ipv6": IPv6(src=GUEST6, dst=PEER6, tc=0xBB, fl=0x12345, hlim=1) / TCP(options=OPTIONS),
    "extension headers": IPv6(src=GUEST6, dst=PEER6) / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / TCP(),
}


def greeted() -> Nic:
    nic = make_nic()
    nic.transmit(0, hello())
    return nic


def add_for(nic: Nic, direction: abi.Direction, family: int, slot: int = 0) -> None:
    """A context for either family's flow."""
    body = abi.CtxAdd._make(abi.CTX_ADD.unpack(ctx_add(direction)))
    if family == 6:
        ends = (bytes.fromhex(f"20010db800010000{'0' * 15}{end}") for end in "21")
        body = body._replace(family=6, local_addr=next(ends), remote_addr=next(ends))
    chain = command(abi.Opcode.CTX_ADD, slot, body=abi.CTX_ADD.pack(*body))
    assert status(nic.transmit(0, chain)) == abi.Status.OK


def shaped(shape: Packet, payload: bytes, *, outgoing: bool = True) -> tuple[bytes, int]:
    """A frame of this shape, and where its TCP header ends."""
    packet = Ether(src="02:00:00:00:00:07", dst="02:00:00:00:00:09") / shape.copy()
    ip, tcp = packet.payload, packet[TCP]
    tcp.sport, tcp.dport, tcp.seq = 4000, 443, START
    if not outgoing:
        ip.src, ip.dst, tcp.sport, tcp.dport = ip.dst, ip.src, tcp.dport, tcp.sport
    frame = bytes(packet / payload)
    return frame, len(frame) - len(payload)


def without_checksum(frame: bytes) -> bytes:
    """The frame with 0 for its TCP checksum."""
    parsed = Ether(frame)
    parsed[TCP].chksum = 0
    return bytes(parsed)


def right_checksum(frame: bytes) -> int:
    """The TCP checksum as scapy computes it."""
    parsed = Ether(frame)
    del parsed[TCP].chksum
    return int(Ether(bytes(parsed))[TCP].chksum)


def flags_of(header: bytes) -> int:
    """Flags of the frame's RX_TLS extension; -1 without one."""
    return abi.RxTls._make(abi.RX_TLS.unpack(header[12:])).flags if header[0] & abi.HDR_F_EXT else -1


def opened(sealed: bytes, number: int) -> bytes:
    """The record with its text in clear; header, nonce and tag stay."""
    aad = struct.pack(">QBHH", number, 23, 0x0303, len(sealed) - 29)
    return sealed[:13] + AESGCM(KEY).decrypt(SALT + sealed[5:13], sealed[13:], aad) + sealed[-16:]


# -- headers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("header", [NEEDS_CSUM, PLAIN], ids=["partial checksum", "full checksum"])
@pytest.mark.conformance(31)
@pytest.mark.conformance(125)
@pytest.mark.conformance(126)
def test_tx_changes_nothing_but_payload_and_checksum(name: str, header: bytes) -> None:
    nic = make_nic()
    clear, at = shaped(SHAPES[name], record(TEXT))
    add_for(nic, TX, Ether(clear).payload.version)
    packet = sent(nic.transmit(0, marked(clear, header=header)))
    assert packet is not None
    frame = bytes(packet.frame)
    assert frame[at:] == record(TEXT, sealed=True)
    assert without_checksum(frame)[:at] == without_checksum(clear)[:at]
    if header is PLAIN:
        assert Ether(frame)[TCP].chksum == right_checksum(frame)
    else:
        assert frame[:at] == clear[:at]  # the next stage completes it, as the header still says
        assert bytes(packet.header) == NEEDS_CSUM


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.conformance(37)
@pytest.mark.conformance(38)
@pytest.mark.conformance(125)
@pytest.mark.conformance(126)
def test_rx_changes_nothing_but_the_text_of_records(name: str) -> None:
    nic = greeted()
    sealed = record(TEXT, sealed=True)
    wire, at = shaped(SHAPES[name], sealed, outgoing=False)
    add_for(nic, RX, Ether(wire).payload.version)
    header, frame = receive(nic, wire)
    assert flags_of(header) == DECRYPTED
    assert frame == wire[: at + 13] + TEXT + wire[-16:]


# -- which flow --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"), [("src", "198.51.100.3"), ("dst", "198.51.100.3"), ("sport", 444), ("dport", 4001)]
)
@pytest.mark.conformance(34)
@pytest.mark.conformance(116)
@pytest.mark.conformance(119)
def test_rx_of_any_other_tuple_is_nobodys(field: str, value: object) -> None:
    """Translated addresses, say: the records are the flow's, but software has to decrypt them."""
    nic = greeted()
    add(nic, RX)
    wire = segment(record(TEXT, sealed=True), outgoing=False)
    packet = Ether(wire)
    setattr(packet[IP] if field in ("src", "dst") else packet[TCP], field, value)
    del packet[IP].chksum, packet[TCP].chksum
    other = bytes(packet)
    assert receive(nic, other) == (PLAIN, other)
    assert nic.stats[Counter.RX_TLS_PASSED] == nic.stats[Counter.RX_TLS_PACKETS] == 0
    assert flags_of(receive(nic, wire)[0]) == DECRYPTED, "the flow itself stands where it stood"


@pytest.mark.conformance(118)
def test_tx_goes_by_the_handle_whatever_the_tuple() -> None:
    """Below TCP, somebody translates addresses and ports: still the connection's key and number."""
    nic = make_nic()
    add(nic, TX, slot=3)
    packet = Ether(segment(record(TEXT)))
    packet[IP].src, packet[IP].dst, packet[TCP].sport, packet[TCP].dport = "203.0.113.9", "203.0.113.8", 1, 2
    del packet[IP].chksum, packet[TCP].chksum
    out = sent(nic.transmit(0, marked(bytes(packet), slot=3)))
    assert out is not None
    assert bytes(out.frame) == bytes(packet)[:54] + record(TEXT, sealed=True)


@pytest.mark.conformance(42)
def test_a_connection_without_a_context_is_never_resynchronised() -> None:
    """The table is full: however its packets get lost, nothing is asked, told or taken about that connection."""
    nic = greeted()
    for slot in range(8):
        add(nic, TX, slot=slot)
    refused = nic.transmit(0, command(abi.Opcode.CTX_ADD, slot=8, body=ctx_add(RX)))
    assert status(refused) != abi.Status.OK
    nic.messages.clear()
    seq = START
    for number in range(40):
        sealed = record(TEXT, number, sealed=True)
        if number % 3:
            wire = segment(sealed, seq, outgoing=False)
            assert receive(nic, wire) == (PLAIN, wire)
        seq += len(sealed)
    answer = command(abi.Opcode.RX_RESYNC, 8, 1, abi.RX_RESYNC.pack(START, 0))
    assert status(nic.transmit(0, answer)) == abi.Status.STALE
    assert nic.messages == []
    assert nic.stats[Counter.RX_TLS_ASKED] == nic.stats[Counter.RX_TLS_RESYNCED] == 0


@pytest.mark.conformance(43)
def test_a_resync_carries_no_keys() -> None:
    """Of the messages of a resync, none has room for a key, and none that the device sends holds one."""
    assert abi.RxResync._fields == ("tcp_seq", "rcd_sn")
    assert set(abi.TxTls._fields) - {"type", "flags", "len", "slot", "generation"} == {
        "prefix_len",
        "resync_seq",
        "resync_rcd_sn",
    }
    nic = greeted()
    add(nic, RX, rx_personality=abi.RxPersonality.DRIVER_REQ, flags=abi.AddFlag.NO_SYNC)
    add(nic, TX, slot=1)
    first, second, third = (record(TEXT, number, sealed=True) for number in range(3))
    said = [receive(nic, segment(first, outgoing=False))[0]]
    assert flags_of(said[0]) == abi.RxTlsFlag.RESYNC_REQ
    answer = abi.RX_RESYNC.pack(START, 0)
    with_a_key = nic.transmit(0, command(abi.Opcode.RX_RESYNC, body=answer + KEY))
    assert status(with_a_key) == abi.Status.BAD_REQUEST
    said.append(reply(nic.transmit(0, command(abi.Opcode.RX_RESYNC, body=answer))))
    said += [
        receive(nic, segment(r, START + len(first) + at, outgoing=False))[0]
        for r, at in ((second, 0), (third, len(second)))
    ]
    assert flags_of(said[-1]) == DECRYPTED, "the old key went on working"
    again = marked(segment(record(TEXT)), slot=1, flags=abi.TxTlsFlag.RESYNC, resync_seq=START)
    resynced = sent(nic.transmit(0, again))
    assert resynced is not None
    assert bytes(resynced.frame[54:]) == first
    nic.transmit(0, marked(segment(record(TEXT)), slot=1))  # wrong place: an event
    assert nic.messages
    for message in (*said, *nic.messages):
        assert KEY not in message
        assert SALT not in message


# -- one frame, one verdict --------------------------------------------------------------------------------------------


@pytest.mark.conformance(32)
def test_rx_tls_comes_behind_what_else_is_done_to_frames() -> None:
    """A guest takes neither large frames nor partial checksums: frames are cut and completed first, then decrypted."""
    nic = greeted()
    nic.features = 0
    add(nic, RX)
    sealed = b"".join(record(TEXT, number, sealed=True) for number in range(12))
    clear = b"".join(opened(record(TEXT, number, sealed=True), number) for number in range(12))
    large = segment(sealed, outgoing=False)
    header = struct.pack("<BBHHHHH", 1, 1, 54, 1000, 34, 16, 0)  # NEEDS_CSUM, TCPV4, gso_size 1000
    packets = [packet for _, packet in nic.receive(memoryview(bytearray(header)), memoryview(bytearray(large)))]
    assert len(packets) == -(-len(sealed) // 1000)
    for number, packet in enumerate(packets):
        frame = bytes(packet.frame)
        part = slice(1000 * number, 1000 * number + 1000)
        assert flags_of(bytes(packet.header)) == DECRYPTED
        assert frame[54:] == clear[part]
        assert packet.header[0] == abi.HDR_F_EXT, "no checksum is left to do"
        assert Ether(frame)[TCP].chksum == right_checksum(frame[:54] + sealed[part]), "that of the wire"


def disorderly(rng: random.Random, length: int, calm: int) -> list[tuple[int, int]]:
    """Segments of a stream, of any size; behind the first `calm` bytes some are lost, repeated, swapped."""
    edges = sorted({0, length, *rng.sample(range(length), 80)})
    spans = [(a, b) for a, b in pairwise(edges) if a < calm or rng.random() > 0.1]
    first = next(index for index, (a, _) in enumerate(spans) if a >= calm)
    for at in rng.sample(range(first, len(spans) - 1), 10):
        spans[at : at + 2] = [spans[at + 1], spans[at], spans[at + 1]]
    return spans


@pytest.mark.parametrize("personality", list(abi.RxPersonality))
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.conformance(41)
@pytest.mark.conformance(86)
@pytest.mark.conformance(89)
@pytest.mark.conformance(90)
def test_frames_in_disorder_come_out_one_for_one_and_all_or_nothing(personality: abi.RxPersonality, seed: int) -> None:
    """Lost, repeated, swapped, spoiled: a frame is neither split nor held nor decrypted in part."""
    rng = random.Random(seed)
    nic = greeted()
    add(nic, RX, rx_personality=personality)
    sealed = [record(rng.randbytes(rng.randrange(400)), number, sealed=True) for number in range(60)]
    wire = bytearray().join(sealed)
    clear = bytearray().join(map(opened, sealed, range(60)))
    if personality is not abi.RxPersonality.IDEAL:  # which drops what contradicts an earlier copy
        for number in rng.sample(range(20, 60), 5):
            at = sum(map(len, sealed[:number])) + rng.randrange(13, len(sealed[number]))
            wire[at] ^= 0x20
            clear[at] ^= 0x20  # counter mode
    verdicts = set()
    for a, b in disorderly(rng, len(wire), 1000):
        frame = segment(bytes(wire[a:b]), START + a, outgoing=False)
        header, out = receive(nic, frame)  # asserts that there is one
        decrypted = bool(flags_of(header) & DECRYPTED)
        verdicts.add(decrypted)
        assert out == (frame[:54] + clear[a:b] if decrypted else frame)
    assert verdicts == {True, False}
