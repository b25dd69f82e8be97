"""The NIC without rings: chains in, packets out; frames in, verdicts out. The oracle is one-shot AESGCM."""

from __future__ import annotations

import struct
from itertools import count

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from nicdev import abi
from nicdev.control import Control, Identity
from nicdev.nic import Nic, Outcome, View
from nicdev.stats import Counter, Stats
from nicdev.tls.table import ContextTable
from nicdev.virtio.features import OFFERED

GUEST, PEER = "198.51.100.2", "198.51.100.1"
KEY, SALT = bytes(range(16)), b"salt"
START = 1000
NEEDS_CSUM = struct.pack("<BBHHHHH", 1, 0, 54, 0, 34, 16, 0)
PLAIN = bytes(12)


def make_nic(**identity: object) -> Nic:
    stats = Stats()
    table = ContextTable(8)
    boots = count(100)
    nic = Nic(stats, table, Control(Identity("1.2", **identity), table, stats), lambda: next(boots))  # type: ignore[arg-type]
    nic.features = OFFERED
    return nic


def hello(flags: int = 0, nonce: int = 7, magic: bytes = abi.HELLO_MAGIC, version: int = abi.ABI_VERSION) -> bytearray:
    ext = abi.HELLO.pack(abi.HELLO_DST, b"\x02\0\0\0\0\1", b"\x88\xb5", version, magic, nonce, flags)
    return bytearray(bytes((abi.HDR_F_EXT,)) + bytes(11) + ext)


def command(opcode: int, slot: int = 0, generation: int = 1, body: bytes = b"", lie: int = 0) -> bytearray:
    header = abi.COMMAND.pack(abi.ExtType.COMMAND, opcode, abi.COMMAND.size + len(body) + lie, slot, generation)
    return bytearray(bytes((abi.HDR_F_EXT,)) + bytes(11) + header + body)


def ctx_add(
    direction: abi.Direction,
    flags: int = 0,
    key_len: int = 16,
    rx_personality: int = abi.RxPersonality.IDEAL,
    port: int = 4000,
) -> bytes:
    addresses = (bytes([198, 51, 100, 2]) + bytes(12), bytes([198, 51, 100, 1]) + bytes(12))
    return abi.CTX_ADD.pack(
        direction, 4, 0x0303, 51, flags, rx_personality, START, key_len, 8, 4, 8,
        bytes(8), SALT, bytes(8), KEY, port, 443, *addresses,
    )  # fmt: skip


def status(outcome: Outcome) -> int:
    return abi.Reply._make(abi.REPLY.unpack_from(outcome.reply)).status


def add(nic: Nic, direction: abi.Direction, slot: int = 0, generation: int = 1, **fields: int) -> None:
    body = ctx_add(direction, **fields)
    assert status(nic.transmit(0, command(abi.Opcode.CTX_ADD, slot, generation, body))) == abi.Status.OK


def record(text: bytes, number: int = 0, sealed: bool = False) -> bytes:
    """One TLS 1.2 AES-GCM record, in clear with an unwritten tag or sealed."""
    header = struct.pack(">BHH", 23, 0x0303, 8 + len(text) + 16)
    explicit = struct.pack(">Q", number + 1000)
    if not sealed:
        return header + explicit + text + b"\xee" * 16
    aad = struct.pack(">QBHH", number, 23, 0x0303, len(text))
    return header + explicit + AESGCM(KEY).encrypt(SALT + explicit, text, aad)


def segment(payload: bytes, seq: int = START, outgoing: bool = True) -> bytes:
    ends = (GUEST, PEER, 4000, 443) if outgoing else (PEER, GUEST, 443, 4000)
    src, dst, sport, dport = ends
    frame = Ether() / IP(src=src, dst=dst) / TCP(sport=sport, dport=dport, seq=seq, flags="PA") / payload
    return bytes(frame)


def marked(frame: bytes, slot: int = 0, generation: int = 1, header: bytes = NEEDS_CSUM, **ext: int) -> bytearray:
    fields = {"flags": 0, "len": 32, "prefix_len": 0, "resync_seq": 0, "resync_rcd_sn": 0} | ext
    packed = abi.TX_TLS.pack(
        abi.ExtType.TX_TLS, fields["flags"], fields["len"], slot, generation,
        fields["prefix_len"], fields["resync_seq"], fields["resync_rcd_sn"],
    )  # fmt: skip
    return bytearray(bytes((header[0] | abi.HDR_F_EXT,)) + header[1:] + packed + frame)


def messages(nic: Nic, kind: abi.ExtType) -> list[bytes]:
    return [m[12:] for m in nic.messages if m[12] == kind]


def receive(nic: Nic, frame: bytes, header: bytes = PLAIN) -> tuple[bytes, bytes]:
    """Header with extension, and the frame that the guest gets."""
    buffer = bytearray(frame)
    packets = nic.receive(memoryview(bytearray(header)), memoryview(buffer))
    assert len(packets) == 1
    return bytes(packets[0][1].header), bytes(packets[0][1].frame)


def test_plain_frame_passes_with_its_header() -> None:
    nic = make_nic()
    frame = segment(b"hello")
    packet = nic.transmit(0, bytearray(NEEDS_CSUM + frame)).packet
    assert packet is not None
    assert bytes(packet.header) == NEEDS_CSUM
    assert bytes(packet.frame) == frame
    assert nic.stats[Counter.TX_PACKETS] == 1


@pytest.mark.conformance(125)
@pytest.mark.conformance(125)
def test_marked_frame_leaves_encrypted_and_only_payload_differs() -> None:
    nic = make_nic()
    add(nic, abi.Direction.TX)
    frame = segment(record(b"secret" * 100))
    packet = nic.transmit(0, marked(frame)).packet
    assert packet is not None
    assert bytes(packet.header) == NEEDS_CSUM
    assert bytes(packet.frame) == frame[:54] + record(b"secret" * 100, sealed=True)
    assert nic.stats[Counter.TX_TLS_PACKETS] == nic.stats[Counter.TX_TLS_RECORDS] == 1


@pytest.mark.conformance(31)
@pytest.mark.conformance(31)
def test_full_checksum_is_recomputed() -> None:
    nic = make_nic()
    add(nic, abi.Direction.TX)
    packet = nic.transmit(0, marked(segment(record(b"secret")), header=PLAIN)).packet
    assert packet is not None
    parsed = Ether(bytes(packet.frame))
    written = parsed[TCP].chksum
    del parsed[TCP].chksum
    assert Ether(bytes(parsed))[TCP].chksum == written


DROPS = {
    "unknown": (marked(segment(record(b"x")), slot=5), Counter.TX_DROP_UNKNOWN_CONTEXT),
    "beyond table": (marked(segment(record(b"x")), slot=1 << 31), Counter.TX_DROP_UNKNOWN_CONTEXT),
    "stale": (marked(segment(record(b"x")), generation=2), Counter.TX_DROP_STALE_CONTEXT),
    "rx handle": (marked(segment(record(b"x")), slot=1), Counter.TX_DROP_WRONG_DIRECTION),
    "old": (marked(segment(record(b"x"), seq=START - 1)), Counter.TX_DROP_WRONG_SEQ),
    "future": (marked(segment(record(b"x"), seq=START + 1)), Counter.TX_DROP_WRONG_SEQ),
    "no payload": (marked(segment(b"")), Counter.TX_DROP_NOT_TCP),
    "not tcp": (marked(bytes(60)), Counter.TX_DROP_NOT_TCP),
    "no record": (marked(segment(b"GET / HTTP/1.1\r\n\r\n")), Counter.TX_DROP_BAD_RECORD),
    "unknown flag": (marked(segment(record(b"x")), flags=2), Counter.TX_DROP_BAD_EXTENSION),
    "short extension": (marked(segment(record(b"x")), len=31), Counter.TX_DROP_BAD_EXTENSION),
    "prefix without resync": (marked(segment(record(b"x")), prefix_len=4), Counter.TX_DROP_BAD_EXTENSION),
    "prefix beyond chain": (
        marked(segment(record(b"x")), flags=1, prefix_len=9999, resync_seq=START),
        Counter.TX_DROP_BAD_HEADER,
    ),
    "unknown type": (bytearray(b"\x80" + bytes(11) + b"\x44" + bytes(99)), Counter.TX_DROP_BAD_EXTENSION),
    "flag and nothing else": (bytearray(b"\x80" + bytes(11)), Counter.TX_DROP_BAD_EXTENSION),
    "cut extension": (marked(segment(record(b"x")))[:30], Counter.TX_DROP_BAD_EXTENSION),
}


@pytest.mark.parametrize("name", DROPS)
@pytest.mark.conformance(85)
@pytest.mark.conformance(29)
@pytest.mark.conformance(85)
def test_marked_frame_that_cannot_be_encrypted_never_leaves(name: str) -> None:
    nic = make_nic()
    add(nic, abi.Direction.TX, slot=0)
    add(nic, abi.Direction.RX, slot=1)
    chain, counter = DROPS[name]
    assert nic.transmit(0, bytearray(chain)) == Outcome(None, b"")
    assert nic.stats[counter] == 1


def test_drop_is_told_and_repeats_merge() -> None:
    nic = make_nic()
    add(nic, abi.Direction.TX)
    for _ in range(3):
        nic.transmit(0, marked(segment(record(b"x"), seq=START + 9)))
    nic.transmit(0, marked(segment(record(b"x")), slot=3))
    dropped, unknown = (abi.Event._make(abi.EVENT.unpack(m)) for m in messages(nic, abi.ExtType.EVENT))
    assert (dropped.code, dropped.slot, dropped.reason, dropped.value) == (
        abi.EventCode.TX_DROPPED, 0, Counter.TX_DROP_WRONG_SEQ, START + 9,
    )  # fmt: skip
    assert (unknown.code, unknown.slot) == (abi.EventCode.UNKNOWN_CONTEXT, 3)


def test_dropped_packet_does_not_move_the_context() -> None:
    nic = make_nic()
    add(nic, abi.Direction.TX)
    assert nic.transmit(0, marked(segment(record(b"x"), seq=START + 9))).packet is None
    packet = nic.transmit(0, marked(segment(record(b"x")))).packet
    assert packet is not None
    assert bytes(packet.frame[54:]) == record(b"x", sealed=True)


@pytest.mark.conformance(46)
def test_resync_with_prefix_repeats_the_same_bytes() -> None:
    nic = make_nic()
    add(nic, abi.Direction.TX)
    clear, sealed = record(b"0123456789" * 40), record(b"0123456789" * 40, sealed=True)
    first = nic.transmit(0, marked(segment(clear))).packet
    assert first is not None
    assert bytes(first.frame[54:]) == sealed
    again = clear[:200] + segment(clear[200:], seq=START + 200)
    packet = nic.transmit(0, marked(again, flags=1, prefix_len=200, resync_seq=START)).packet
    assert packet is not None
    assert bytes(packet.frame[54:]) == sealed[200:]
    assert nic.stats[Counter.TX_TLS_RESYNC] == 1


def test_hello_is_answered_with_its_nonce_and_keeps_or_drops_contexts() -> None:
    nic = make_nic()
    nic.transmit(0, hello(flags=abi.HelloFlag.RESET, nonce=99))
    add(nic, abi.Direction.TX)
    nic.transmit(0, hello(nonce=100))
    assert len(nic.table) == 1
    nic.transmit(0, hello(flags=abi.HelloFlag.RESET, nonce=101))
    assert len(nic.table) == 0
    (reply,) = (abi.HelloReply._make(abi.HELLO_REPLY.unpack(m)) for m in messages(nic, abi.ExtType.HELLO_REPLY))
    assert reply.nonce == 101
    assert reply.boot_id == 102  # one at start, two resets
    assert reply.device_version.rstrip(b"\0") == b"1.2"
    assert reply.max_contexts == 8
    assert reply.stat_count == len(Counter)


@pytest.mark.parametrize("version", [0, 1, abi.ABI_VERSION + 1, 65535])
def test_hello_in_another_version_is_answered_in_ours_and_that_is_all(version: int) -> None:
    nic = make_nic()
    nic.transmit(0, hello(version=version))
    (reply,) = (abi.HelloReply._make(abi.HELLO_REPLY.unpack(m)) for m in messages(nic, abi.ExtType.HELLO_REPLY))
    assert reply.version == abi.ABI_VERSION
    add(nic, abi.Direction.RX)
    wire = segment(record(b"reply", sealed=True), outgoing=False)
    assert receive(nic, wire) == (PLAIN, wire)


def test_hello_of_something_else_is_dropped() -> None:
    nic = make_nic()
    nic.transmit(0, hello(magic=b"NOTOURS!"))
    assert not nic.messages
    assert nic.stats[Counter.TX_DROP_BAD_EXTENSION] == 1


def test_frames_of_the_hello_ethertype_are_ordinary_frames() -> None:
    nic = make_nic()
    lookalike = bytes(hello()[12:])
    packet = nic.transmit(0, bytearray(PLAIN + lookalike)).packet
    assert packet is not None
    assert bytes(packet.frame) == lookalike
    header, frame = receive(nic, lookalike, header=bytes((abi.HDR_F_EXT,)) + bytes(11))
    assert not header[0] & abi.HDR_F_EXT
    assert frame == lookalike
    assert not nic.messages


@pytest.mark.conformance(37)
@pytest.mark.conformance(38)
def test_rx_record_is_decrypted_in_place_and_framing_stays() -> None:
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


def test_rx_verdicts_only_for_a_driver_that_said_hello() -> None:
    nic = make_nic()
    add(nic, abi.Direction.RX)
    wire = segment(record(b"reply", sealed=True), outgoing=False)
    assert receive(nic, wire) == (PLAIN, wire)


def damaged(frame: bytes, at: int) -> bytes:
    return frame[:at] + bytes((frame[at] ^ 1,)) + frame[at + 1 :]


@pytest.mark.conformance(33)
@pytest.mark.conformance(92)
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
@pytest.mark.conformance(86)
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


def test_a_driver_whose_device_was_reset_under_it_is_told() -> None:
    """QEMU resets the device of a machine that it pauses; the same driver goes on afterwards."""
    nic = make_nic()
    nic.resumed()
    assert not nic.messages
    nic.transmit(0, hello())
    nic.reset()
    nic.resumed()
    (event,) = (abi.Event._make(abi.EVENT.unpack(m)) for m in messages(nic, abi.ExtType.EVENT))
    assert event.code == abi.EventCode.CONFIG_CHANGED
    nic.transmit(0, hello())
    nic.messages.clear()
    nic.resumed()
    assert not nic.messages


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
        wire = bytes(Ether() / IP(src=ends["src"], dst=ends["dst"]) / ports / reply)
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


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        (command(99), abi.Status.UNSUPPORTED),
        (command(abi.Opcode.CTX_DEL, lie=1), abi.Status.BAD_REQUEST),
        (command(abi.Opcode.CTX_DEL, body=b"x"), abi.Status.BAD_REQUEST),
        (command(abi.Opcode.CTX_DEL, slot=4), abi.Status.STALE),
        (command(abi.Opcode.RX_RESYNC, slot=4, body=bytes(16)), abi.Status.STALE),
        (command(abi.Opcode.CTX_ADD, body=ctx_add(abi.Direction.TX, key_len=15)), abi.Status.BAD_REQUEST),
        (command(abi.Opcode.CTX_ADD, slot=8, body=ctx_add(abi.Direction.TX)), abi.Status.BAD_REQUEST),
        (command(abi.Opcode.CTX_ADD, body=b""), abi.Status.BAD_REQUEST),
    ],
)
def test_bad_commands_get_a_status_and_change_nothing(chain: bytearray, expected: abi.Status) -> None:
    nic = make_nic()
    assert status(nic.transmit(0, bytearray(chain))) == expected
    assert len(nic.table) == 0
    assert nic.stats[Counter.CMD_FAILED] == 1


def test_no_tls_capability_refuses_contexts() -> None:
    nic = make_nic(caps=abi.Cap(0))
    assert (
        status(nic.transmit(0, command(abi.Opcode.CTX_ADD, body=ctx_add(abi.Direction.TX)))) == abi.Status.UNSUPPORTED
    )


def test_key_is_wiped_from_the_command() -> None:
    nic = make_nic()
    chain = command(abi.Opcode.CTX_ADD, body=ctx_add(abi.Direction.TX))
    assert KEY in chain
    nic.transmit(0, chain)
    assert KEY not in chain


def test_counters_can_be_read_with_their_names() -> None:
    nic = make_nic()
    nic.transmit(0, bytearray(PLAIN + segment(b"x")))
    names = nic.transmit(0, command(abi.Opcode.GET_STAT_NAMES)).reply[8:]
    values = nic.transmit(0, command(abi.Opcode.GET_STATS)).reply[8:]
    assert names[:32] == b"tx_packets".ljust(32, b"\0")
    assert struct.unpack(f"<{len(Counter)}Q", values)[Counter.TX_PACKETS] == 1
    assert len(names) == 32 * len(Counter)
    assert all(len(c.name) <= 27 for c in Counter)


def test_observer_sees_both_views_of_a_packet() -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen: list[tuple[int, View, str, bytes]] = []

        def packet(self, packet_id: int, view: View, direction: str, frame: bytes, comment: str) -> None:
            self.seen.append((packet_id, view, direction, frame))

    nic = make_nic()
    nic.observer = recorder = Recorder()
    add(nic, abi.Direction.TX)
    frame = segment(record(b"secret"))
    packet = nic.transmit(0, marked(frame)).packet
    assert packet is not None
    nic.transmit(0, marked(segment(record(b"drop"), seq=1)))
    assert recorder.seen[:2] == [(1, View.HOST, "tx", frame), (1, View.WIRE, "tx", bytes(packet.frame))]
    assert [view for _, view, _, _ in recorder.seen[2:]] == [View.HOST]


def test_flow_is_received_where_it_transmitted() -> None:
    nic = make_nic()
    nic.transmit(3, bytearray(PLAIN + segment(b"x")))
    ((queue, _),) = nic.receive(memoryview(bytearray(12)), memoryview(bytearray(segment(b"y", outgoing=False))))
    assert queue == 3
