"""The NIC without rings: chains in, packets and answers out. The oracle is one-shot AESGCM."""

from __future__ import annotations

import struct

import pytest
from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether

from nicdev import abi
from nicdev.observer import View
from nicdev.stats import Counter
from tests.support.nic_chains import (
    KEY,
    NEEDS_CSUM,
    PLAIN,
    START,
    add,
    command,
    ctx_add,
    hello,
    make_nic,
    marked,
    messages,
    receive,
    record,
    reply,
    segment,
    sent,
    status,
)


def test_plain_frame_passes_with_its_header() -> None:
    nic = make_nic()
    frame = segment(b"hello")
    packet = sent(nic.transmit(0, bytearray(NEEDS_CSUM + frame)))
    assert packet is not None
    assert bytes(packet.header) == NEEDS_CSUM
    assert bytes(packet.frame) == frame
    assert nic.stats[Counter.TX_PACKETS] == 1


@pytest.mark.conformance(125)
def test_marked_frame_leaves_encrypted_and_only_payload_differs() -> None:
    nic = make_nic()
    add(nic, abi.Direction.TX)
    frame = segment(record(b"secret" * 100))
    packet = sent(nic.transmit(0, marked(frame)))
    assert packet is not None
    assert bytes(packet.header) == NEEDS_CSUM
    assert bytes(packet.frame) == frame[:54] + record(b"secret" * 100, sealed=True)
    assert nic.stats[Counter.TX_TLS_PACKETS] == nic.stats[Counter.TX_TLS_RECORDS] == 1


@pytest.mark.conformance(31)
def test_full_checksum_is_recomputed() -> None:
    nic = make_nic()
    add(nic, abi.Direction.TX)
    packet = sent(nic.transmit(0, marked(segment(record(b"secret")), header=PLAIN)))
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
def test_marked_frame_that_cannot_be_encrypted_never_leaves(name: str) -> None:
    nic = make_nic()
    add(nic, abi.Direction.TX, slot=0)
    add(nic, abi.Direction.RX, slot=1)
    chain, counter = DROPS[name]
    assert nic.transmit(0, bytearray(chain)) == b""
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
    assert sent(nic.transmit(0, marked(segment(record(b"x"), seq=START + 9)))) is None
    packet = sent(nic.transmit(0, marked(segment(record(b"x")))))
    assert packet is not None
    assert bytes(packet.frame[54:]) == record(b"x", sealed=True)


@pytest.mark.conformance(46)
def test_resync_with_prefix_repeats_the_same_bytes() -> None:
    nic = make_nic()
    add(nic, abi.Direction.TX)
    clear, sealed = record(b"0123456789" * 40), record(b"0123456789" * 40, sealed=True)
    first = sent(nic.transmit(0, marked(segment(clear))))
    assert first is not None
    assert bytes(first.frame[54:]) == sealed
    again = clear[:200] + segment(clear[200:], seq=START + 200)
    packet = sent(nic.transmit(0, marked(again, flags=1, prefix_len=200, resync_seq=START)))
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
    packet = sent(nic.transmit(0, bytearray(PLAIN + lookalike)))
    assert packet is not None
    assert bytes(packet.frame) == lookalike
    header, frame = receive(nic, lookalike, header=bytes((abi.HDR_F_EXT,)) + bytes(11))
    assert not header[0] & abi.HDR_F_EXT
    assert frame == lookalike
    assert not nic.messages


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
    names = reply(nic.transmit(0, command(abi.Opcode.GET_STAT_NAMES)))[8:]
    values = reply(nic.transmit(0, command(abi.Opcode.GET_STATS)))[8:]
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
    packet = sent(nic.transmit(0, marked(frame)))
    assert packet is not None
    nic.transmit(0, marked(segment(record(b"drop"), seq=1)))
    assert recorder.seen[:2] == [(1, View.HOST, "tx", frame), (1, View.WIRE, "tx", bytes(packet.frame))]
    assert [view for _, view, _, _ in recorder.seen[2:]] == [View.HOST]
