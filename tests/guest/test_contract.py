"""The agreement between kernel, driver and device, point by point: what each is told, and what follows from it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from testbed.bed import GUEST4, WIRE4, Bed
from testbed.peers.peer import Peer
from testbed.wire.pcapfile import frames
from testbed.wire.reassembly import Stream, reassemble
from tests.guest.cases import AWAITED, CLOSE_NOTIFY, egress, install, recv_clear, send_clear, tx_flow
from tests.guest.conftest import wait_until
from tests.guest.exchange import (
    BOTH,
    CIPHERS,
    EOF,
    RECORD_OVERHEAD,
    WAIT,
    Case,
    Running,
    Step,
    exchange,
    recv,
    rx_case,
    send,
    traced,
    tx_case,
    tx_personality,
)

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

SIZE = 200_000
RECORD = 1000
# enum tls_offload_ctx_dir (include/net/tls.h)
DIRECTIONS = {"rx": 0, "tx": 1}

# -- contexts ----------------------------------------------------------------------------------------------------------

NOT_CONNECTED = f"""
import errno, json, socket
def attempt(s):
    try: s.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
    except OSError as error: return errno.errorcode[error.errno]
    return "accepted"
connecting = socket.socket()
connecting.setblocking(False)
connecting.connect_ex(("198.51.100.77", 9))
print(json.dumps([attempt(s) for s in (socket.socket(), socket.create_server(("{GUEST4}", 0)), connecting)]))
"""


@pytest.mark.conformance(1)
def test_a_socket_without_a_connection_gets_no_tls(bed: Bed) -> None:
    """New, listening, still connecting: the kernel refuses, and the device hears nothing of it."""
    before = bed.nic.stats()
    answers = bed.agent.run(["python3", "-c", NOT_CONNECTED]).text
    assert json.loads(answers) == ["ENOTCONN"] * 3
    after = bed.nic.stats()
    assert (after["ctx_tx_added"], after["ctx_rx_added"]) == (before["ctx_tx_added"], before["ctx_rx_added"])


def streams_of(path: Path) -> dict[int, Stream]:
    """All streams of a capture, by the port of their sender."""
    return {stream.source.port: stream for connection in reassemble(frames(path)) for stream in connection.streams}


@pytest.mark.conformance(9)
@pytest.mark.conformance(11)
@pytest.mark.conformance(14)
@pytest.mark.conformance(16)
def test_contexts_begin_where_the_stream_turns_into_records(bed: Bed, capture_path: Path) -> None:
    """The kernel names direction, first record and its place; the wire agrees; the device needs no other word."""
    out, back = bytes.fromhex("c1ea") * 150, bytes.fromhex("ea5e") * 250
    guest: list[Step] = [
        send_clear(out),
        recv_clear(len(back)),
        install(*BOTH),
        send(SIZE, write=3000),
        recv(SIZE),
    ]
    peer: list[Step] = [
        recv_clear(len(out)),
        send_clear(back),
        recv(SIZE),
        send(SIZE, records=[3000]),
    ]
    cases = [
        Case(f"begins {family} {cipher}", guest, peer, cipher=cipher, family=family, rec_seq=number,
             tx_start=len(out), rx_start=len(back))
        for number, (family, cipher) in enumerate((f, c) for f in ("4", "6", "mapped") for c in CIPHERS)
    ]  # fmt: skip
    with traced(bed, "tls:tls_device_offload_set") as lines:
        seen = exchange(bed, cases, capture_path)
    seen.offloaded()
    told: list[tuple[int, int, int | None]] = []
    for line in lines:
        match = re.search(r"direction=(\d+) tcp_seq=(\d+) rec_no=(\d+) ret=(-?\d+)", line)
        assert match
        direction, place, number, refused = map(int, match.groups())
        assert refused == 0
        # for rx the tracepoint takes any key for one of 128 bits: its number may be part of the key
        told.append((direction, place, number if direction == DIRECTIONS["tx"] else None))
    streams = streams_of(capture_path)
    expected: list[tuple[int, int, int | None]] = []
    for case, tool in zip(cases, seen.guest, strict=True):
        tx, rx = (streams[tool[end][1]].first for end in ("local", "remote"))
        assert tx is not None
        assert rx is not None
        expected.append((DIRECTIONS["tx"], (tx + len(out)) % 2**32, case.rec_seq))
        expected.append((DIRECTIONS["rx"], (rx + len(back)) % 2**32, None))
    assert set(told) == set(expected)
    assert len(told) == len(expected)
    # A first packet elsewhere would have come with a resync.
    again = sum(stream.retransmitted_bytes for stream in seen.streams("tx"))
    assert seen.driver["tx_tls_resync"] == 0 or again > 0
    assert seen.nic["ctx_deleted"] == 2 * len(cases)


INSTALL_TWICE = """
import errno, json, socket, struct, sys
version, address = json.loads(sys.argv[1])
def install(which, key):
    info = struct.pack("=HH", version, 51) + bytes(8) + key * 16 + b"salt" + bytes(8)
    try: s.setsockopt(282, which, info)
    except OSError as error: return errno.errorcode[error.errno]
    return "accepted"
s = socket.create_connection(tuple(address))
s.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
print(json.dumps([install(which, key) for key in (b"1", b"2") for which in (1, 2)]))
"""


@pytest.mark.parametrize("version", [0x0303, 0x0304], ids=["1.2", "1.3"])
@pytest.mark.conformance(82)
def test_no_offloaded_socket_gets_another_key(bed: Bed, version: int) -> None:
    """TLS 1.2: refused. TLS 1.3, where some kernels take one, stays with the software from the start."""
    before, stat = bed.nic.stats(), bed.tls_stat()
    with bed.nic.faults(AWAITED), Peer(bed.wire, "raw", {"listen": [WIRE4, 0], "steps": [EOF]}) as peer:
        done = bed.agent.run(["python3", "-c", INSTALL_TWICE, json.dumps([version, [WIRE4, peer.port]])])
        assert peer.result()["ok"]
    answers = json.loads(done.text)
    after = bed.nic.stats()
    added = [after[name] - before[name] for name in ("ctx_tx_added", "ctx_rx_added")]
    told = {name: count - stat[name] for name, count in bed.tls_stat().items() if count != stat[name]}
    assert answers[:2] == ["accepted", "accepted"]
    if version == 0x0303:
        assert answers[2:] == ["EBUSY", "EBUSY"]
        assert added == [1, 1]
        assert told["TlsTxDevice"] == told["TlsRxDevice"] == 1
    else:
        assert added == [0, 0]
        assert told["TlsTxSw"] == told["TlsRxSw"] == 1
        assert "TlsTxDevice" not in told
        assert "TlsRxDevice" not in told


TABLE_FULL = """
seed = 3
[tx]
segments = "wire"
drop = 0.03
[rx]
segments = "wire"
drop = 0.03
[[rule]]
action = "refuse-add"
status = "table-full"
direction = "tx"
count = "all"
[[rule]]
action = "refuse-add"
status = "table-full"
direction = "rx"
count = "all"
"""


@pytest.mark.parametrize("personality", ["rebuild", "next-record"])
@pytest.mark.conformance(8)
@pytest.mark.conformance(42)
def test_a_connection_that_the_table_had_no_room_for_is_never_resynchronised(
    bed: Bed, capture_path: Path, personality: str
) -> None:
    """Segments are lost in both directions, and nobody asks or tells anything about it."""
    cases = [
        tx_case("full out", send(2 * SIZE, write=5000), size=2 * SIZE),
        rx_case("full in", send(2 * SIZE, records=[5000]), size=2 * SIZE),
    ]
    with tx_personality(bed, personality), bed.nic.faults(TABLE_FULL):
        seen = exchange(bed, cases, capture_path)
    seen.arrived()
    seen.wire_is_encrypted()
    assert seen.tls_stat["TlsTxSw"] == seen.tls_stat["TlsRxSw"] == 1
    assert seen.nic["fault_dropped"] > 0
    assert seen.nic["fault_adds_refused"] == seen.driver["tls_add_failed"] == 2
    resyncs = {name: n for counts in (seen.driver, seen.nic) for name, n in counts.items() if "resync" in name and n}
    assert resyncs == {}
    assert seen.nic["rx_tls_asked"] == seen.driver["tx_tls_ooo"] == 0


# -- the wire ----------------------------------------------------------------------------------------------------------

REFUSE_ALL = "".join(
    f'[[rule]]\naction = "refuse-add"\ndirection = "{direction}"\ncount = "all"\n' for direction in BOTH
)


def manners(path: Path) -> set[tuple[object, ...]]:
    """How the guest's segments look besides numbers, sizes and times: type of service, TTL, flags, options."""
    packets = [Ether(bytes(frame)) for frame in frames(path)]
    return {
        (packet[IP].tos, packet[IP].ttl, str(packet[IP].flags), "S" in packet[TCP].flags,
         tuple(name for name, _ in packet[TCP].options if name not in ("NOP", "SAck")))
        for packet in packets
        if TCP in packet and IP in packet and packet[IP].src == GUEST4
    }  # fmt: skip


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.conformance(124)
def test_the_wire_does_not_tell_who_encrypts(bed: Bed, tmp_path: Path, cipher: str) -> None:
    """The same connections twice, with the device and without: the same bytes, in segments that look the same."""
    cases = [
        tx_case("small", send(SIZE, write=100), size=SIZE, cipher=cipher, rec_seq=7),
        tx_case("large", send(SIZE, write=16384), size=SIZE, cipher=cipher, rec_seq=1 << 40),
        tx_case("larger than records", send(SIZE), size=SIZE, cipher=cipher),
        tx_case("more", send(SIZE, write=999, more=True), CLOSE_NOTIFY, send(10), size=SIZE + 10, cipher=cipher),
    ]
    offloaded = exchange(bed, cases, tmp_path / "offloaded.pcap")
    offloaded.offloaded()
    with bed.nic.faults(REFUSE_ALL):
        software = exchange(bed, cases, tmp_path / "software.pcap")
    software.arrived()
    assert software.tls_stat["TlsTxSw"] == len(cases)
    assert software.nic["tx_tls_packets"] == 0
    streams = [streams_of(tmp_path / f"{name}.pcap") for name in ("offloaded", "software")]
    for case, first, second in zip(cases, offloaded.guest, software.guest, strict=True):
        assert streams[0][first["local"][1]].data == streams[1][second["local"][1]].data, case.seed
    assert manners(tmp_path / "offloaded.pcap") == manners(tmp_path / "software.pcap")


# -- marks -------------------------------------------------------------------------------------------------------------

WITHHELD = 7
WITHHOLD = f"""
[[rule]]
action = "withhold-verdict"
record = {WITHHELD}
count = "all"
"""


@pytest.mark.conformance(5)
@pytest.mark.conformance(39)
def test_a_packet_is_marked_if_and_only_if_the_device_says_so(bed: Bed, capture_path: Path) -> None:
    """One record to a packet. The device is silent about one, and that one alone the kernel decrypts itself."""
    size = 20 * RECORD
    steps = send(size, records=[RECORD], writes=[RECORD + RECORD_OVERHEAD], apart=True)
    cases = [rx_case(f"marks {cipher}", steps, size=size, cipher=cipher) for cipher in CIPHERS]
    with bed.nic.faults(WITHHOLD), traced(bed, "tls:tls_device_decrypted") as lines:
        seen = exchange(bed, cases, capture_path)
    seen.arrived()
    seen.kernel_offloads()
    found = [re.search(r"rec_no=(\d+) len=(\d+) encrypted=(\d) decrypted=(\d)", line) for line in lines]
    told = sorted(tuple(int(number) for number in match.groups()) for match in found if match)
    length = RECORD + RECORD_OVERHEAD
    assert told == sorted(
        (number, length, int(number == WITHHELD), int(number != WITHHELD)) for number in range(20) for _ in cases
    )
    assert seen.driver["rx_tls_decrypted_packets"] == 19 * len(cases)


# -- gaps, and packets that no lawful stack sends ----------------------------------------------------------------------

SEQ_AT = 24  # of the TCP sequence number in an IPv4 packet without options
TCP4 = "u32 match u8 6 0xff at 9"


@pytest.mark.conformance(50)
@pytest.mark.conformance(51)
@pytest.mark.conformance(52)
@pytest.mark.conformance(53)
@pytest.mark.conformance(54)
@pytest.mark.conformance(55)
def test_between_a_gap_and_the_answer_the_device_is_left_alone(bed: Bed, capture_path: Path) -> None:
    """Of one record's segments the first gets lost above the driver. Every other one is a gap, and one asks.

    The kernel answers with the next record. Until then all is software's, also the lost segment when TCP repeats it:
    it is what the device expects, but the stack has been asked.
    """
    first, large, last = 5 * RECORD, 16384, 16000
    guest = [send(first, write=RECORD), recv(1), WAIT, send(large), recv(1), WAIT, send(last)]
    peer = [recv(first), send(1), recv(large), send(1), recv(last)]
    place: list[int] = []

    def meanwhile(running: Running) -> None:
        running.guest_waits()
        (context,) = bed.nic.contexts()
        place.append(context["seq"])
        before, device = bed.ethtool(), bed.nic.stats()
        with egress(bed, f"{TCP4} match u32 {context['seq']} 0xffffffff at {SEQ_AT} action trap"):
            running.go_on()
            wait_until(lambda: bed.ethtool()["tx_tls_resync_req"] > before["tx_tls_resync_req"], "the gap is seen")
        running.guest_waits()
        after = bed.ethtool()
        assert bed.nic.stats()["tx_tls_packets"] == device["tx_tls_packets"]
        (context,) = bed.nic.contexts()
        assert context["seq"] == place[0]
        assert after["tx_tls_fallback"] - before["tx_tls_fallback"] >= large // 1500
        assert after["tx_tls_resync_req"] == before["tx_tls_resync_req"] + 1
        running.go_on()

    case = tx_flow("gap", guest, peer)
    limit = ["ip", "link", "set", "dev", "eth0", "gso_max_segs"]
    bed.agent.run([*limit, "1"])
    try:
        with tx_personality(bed, "next-record"), traced(bed, "tls:*") as lines:
            seen = exchange(bed, [case], capture_path, meanwhile)
    finally:
        bed.agent.run([*limit, "65535"])
    seen.arrived()
    seen.wire_is_encrypted()
    request, answer = (dict(re.findall(r"(\w+)=(\d+)", line)) for line in lines if "tx_resync" in line)
    assert int(request["exp_tcp_seq"]) == place[0]
    assert 0 < (int(request["tcp_seq"]) - place[0]) % 2**32 < large
    assert int(answer["tcp_seq"]) == (place[0] + large + RECORD_OVERHEAD) % 2**32
    assert int(answer["rec_no"]) == first // RECORD + 1
    assert seen.driver["tx_tls_resync"] == seen.nic["tx_tls_resync"] == 1
    assert seen.nic["tx_tls_records"] == first // RECORD + 1


def moved(bed: Bed, capture_path: Path, shift: int, before: int, counter: str) -> None:
    """`before` bytes are acknowledged; then packets come `shift` bytes from the expected place, until `counter` counts.

    They are dropped. What TCP repeats afterwards makes everything good.
    """
    first = [send(before, write=5000), recv(1)] if before else []
    answer = [recv(before), send(1)] if before else []
    guest = [install("tx"), *first, WAIT, send(SIZE, write=5000)]
    case = tx_flow(f"moved {shift}", guest, [*answer, recv(SIZE)])

    def meanwhile(running: Running) -> None:
        running.guest_waits()
        (context,) = bed.nic.contexts()
        count = bed.ethtool()[counter]
        with egress(bed, f"{TCP4} action pedit munge offset {SEQ_AT} u32 set {(context['seq'] + shift) % 2**32}"):
            running.go_on()
            wait_until(lambda: bed.ethtool()[counter] > count, counter)

    with bed.nic.faults(AWAITED):
        seen = exchange(bed, [case], capture_path, meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    assert seen.driver["tx_tls_skip_no_sync_data"] == 0


@pytest.mark.parametrize("personality", ["rebuild", "next-record"])
@pytest.mark.conformance(85)
@pytest.mark.conformance(114)
def test_a_packet_whose_record_is_gone_is_dropped(bed: Bed, capture_path: Path, personality: str) -> None:
    """Its place was acknowledged long ago: there is nothing left to encrypt it with."""
    with tx_personality(bed, personality):
        moved(bed, capture_path, -SIZE // 2, SIZE, "tx_tls_drop_no_sync_data")


@pytest.mark.parametrize("personality", ["rebuild", "next-record"])
@pytest.mark.conformance(85)
@pytest.mark.conformance(115)
def test_a_packet_that_begins_before_the_offload_is_dropped(bed: Bed, capture_path: Path, personality: str) -> None:
    """Half of it would be data from before, half records: no software sends that, and it cannot be told apart."""
    with tx_personality(bed, personality):
        moved(bed, capture_path, -10, 0, "tx_tls_drop_bypass_req")
