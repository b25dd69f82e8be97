"""The decoder against captures made here, with scapy and by hand: it accepts what is right and finds what is wrong."""

from __future__ import annotations

import hashlib
import json
import ssl
import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from pcapng import FileWriter, blocks
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw
from scapy.utils import wrpcap

from testbed.peers.certificate import self_signed
from testbed.peers.flowkeys import FlowKeys
from testbed.peers.rawtls import Sealer
from testbed.peers.stream import sample, sha256_of, stream
from testbed.wire.decoder import Keys, Report, StreamReport, decode, fixed_keys
from testbed.wire.pcapfile import CaptureError
from testbed.wire.plaintext import Canary
from testbed.wire.tls12 import read_keylog

ETHERNET = {"src": "02:00:00:00:00:01", "dst": "02:00:00:00:00:02"}
GUEST, PEER, PORT = "198.51.100.2", "198.51.100.1", 4433
FLOW = FlowKeys.from_seed("aes-128-gcm", "decoder", rec_seq=7)


def segments(data: bytes, first: int = 1000, size: int = 1448) -> list[Packet]:
    """One direction, guest to peer, `first` being the sequence number of the first byte."""
    head = Ether(**ETHERNET) / IP(src=GUEST, dst=PEER)
    return [
        head / TCP(sport=5000, dport=PORT, seq=(first + at) % (1 << 32), flags="PA") / Raw(data[at : at + size])
        for at in range(0, len(data), size)
    ]


def sealed(size: int, record: int = 1000, spoil: dict[int, str] | None = None, seed: str = "s") -> bytes:
    sealer = Sealer(FLOW.tx, spoil)
    data = stream(seed, size)
    return b"".join(sealer.seal(data[at : at + record]) for at in range(0, size, record))


@pytest.fixture
def check(tmp_path: Path) -> Callable[[Iterable[Packet]], Report]:
    """Write packets to a file and decode it with the keys of FLOW and the samples of stream "s"."""

    def run(packets: Iterable[Packet]) -> Report:
        path = tmp_path / "capture.pcap"
        wrpcap(str(path), list(packets))
        return decode(path, Keys(fixed_keys(FLOW, (PEER, PORT)), samples=[sample("s")]))

    return run


Check = Callable[[Iterable[Packet]], Report]


def guest_stream(report: Report) -> StreamReport:
    (found,) = report.find(destination=(PEER, PORT))
    return found


@pytest.mark.parametrize(("size", "cut"), [(500, 1), (10_500, 33), (10_500, 1448), (60_000, 60_000)])
def test_good_records_in_segments_of_any_size(check: Check, size: int, cut: int) -> None:
    report = check(segments(sealed(size), size=cut))
    found = guest_stream(report)
    records = -(-size // 1000)
    assert report.ok
    assert (found.records, found.records_decrypted_ok, found.plaintext_bytes) == (records, records, size)
    assert found.sha256 == sha256_of("s", size)
    assert (found.keys, found.cipher, found.types) == ("fixed", "aes-128-gcm", {23: records})


def test_disorder_overlap_and_sequence_wrap_do_not_matter(check: Check) -> None:
    data = sealed(20_000)
    first = (1 << 32) - 5000
    packets = segments(data, first)
    packets[3:8] = reversed(packets[3:8])
    again = segments(data, first, size=999)[4:9]
    report = check([*packets[:10], *again, *packets[10:]])
    found = guest_stream(report)
    assert report.ok
    assert found.sha256 == sha256_of("s", 20_000)
    assert found.retransmitted_bytes == 5 * 999


@pytest.mark.parametrize("size", [1447, 1448])
def test_a_damaged_segment_is_what_tcp_takes_it_for(check: Check, size: int) -> None:
    """A flipped bit under the checksum of before: the copy that follows counts, and the damage is reported."""
    packets = segments(sealed(10_000), size=size)
    spoiled = bytearray(bytes(packets[2]))
    spoiled[-3] ^= 4
    found = guest_stream(check([*packets[:2], Ether(bytes(spoiled)), *packets[2:]]))
    assert (found.ok, found.damaged, found.retransmitted_bytes) == (True, 1, 0)
    assert found.sha256 == sha256_of("s", 10_000)


def test_a_checksum_that_is_left_to_the_nic_is_no_damage(check: Check) -> None:
    """A tap shows packets before it is made: the field holds the sum of the pseudo-header."""
    packets = segments(sealed(3000), size=1001)
    for packet in packets:
        whole = Ether(bytes(packet))
        length = len(bytes(whole[TCP]))
        words = bytes([198, 51, 100, 2, 198, 51, 100, 1, 0, 6]) + length.to_bytes(2, "big")
        total = sum(struct.unpack(">6H", words))
        packet[TCP].chksum = (total & 0xFFFF) + (total >> 16)
    found = guest_stream(check(packets))
    assert (found.ok, found.damaged, found.records) == (True, 0, 3)


def test_ipv6_vlan_padding_and_other_traffic(check: Check) -> None:
    data = sealed(3000)
    ends = {"sport": 5000, "dport": PORT}
    packets = [
        Ether(**ETHERNET)
        / Dot1Q(vlan=5)
        / IPv6(src="2001:db8::2", dst="2001:db8::1")
        / TCP(seq=1 + at, flags="PA", **ends)
        / data[at : at + 500]
        for at in range(0, len(data), 500)
    ]
    short = (
        Ether(**ETHERNET) / IP(src=GUEST, dst="198.51.100.9") / TCP(sport=1, dport=2, seq=9, flags="PA") / b"x" / Raw()
    )
    padded = Ether(bytes(short) + bytes(5))
    other = Ether(type=0x88B6, **ETHERNET) / Raw(bytes(46))
    report = check([other, *packets, padded])
    # fixed keys name the IPv4 peer: the IPv6 stream is found, but it is not theirs
    assert [item.keys for item in report.find(destination=("2001:db8::1", PORT))] == ["none"]
    assert [item.bytes for item in report.find(destination=("198.51.100.9", 2))] == [1]


def test_a_wrong_tag_is_found_and_the_next_records_still_count(check: Check) -> None:
    report = check(segments(sealed(10_000, spoil={3: "tag"})))
    found = guest_stream(report)
    assert not report.ok
    assert (found.records, found.records_decrypted_ok) == (10, 9)
    assert found.failures == [{"record": 10, "offset": 3 * 1029, "reason": "the tag does not verify"}]


@pytest.mark.parametrize("spot", ["ciphertext", "nonce", "type"])
def test_any_flipped_bit_is_found(check: Check, spot: str) -> None:
    found = guest_stream(check(segments(sealed(3000, spoil={1: spot}))))
    assert found.records_decrypted_ok < found.records or found.errors


def test_a_plaintext_record_is_found_twice(check: Check) -> None:
    data = bytearray(sealed(4096, record=4096))
    data[13 : 13 + 4096] = stream("s", 4096)
    report = check(segments(bytes(data)))
    assert guest_stream(report).failures[0]["reason"] == "it is in plaintext"
    assert report.plaintext_hits == 3  # 4096 bytes in segments of 1448
    assert not report.ok


def test_a_nonce_used_again_is_found_even_in_another_connection(check: Check) -> None:
    first = segments(sealed(1000))
    second = segments(sealed(1000, seed="other"))
    for packet in second:
        packet[TCP].sport = 5001
    report = check([*first, *second])
    assert report.records == report.records_decrypted_ok == 2
    assert not report.ok
    assert "again" in report.find(source=(GUEST, 5001))[0].errors[0]


def test_a_retransmission_with_other_bytes_is_found(check: Check) -> None:
    data = sealed(5000)
    other = bytearray(data)
    other[2000] ^= 0x80
    report = check([*segments(data), segments(bytes(other))[1]])
    assert report.records == report.records_decrypted_ok
    assert not report.ok
    assert guest_stream(report).errors == ["bytes 1448 to 2896 were sent again with other contents"]


def test_a_gap_and_a_cut_record_are_found(check: Check) -> None:
    packets = segments(sealed(9000))
    assert "never seen" in guest_stream(check(packets[:2] + packets[3:])).errors[0]
    packets[4][TCP].flags = "FPA"
    assert "into a record" in guest_stream(check(packets[:5])).errors[0]


def test_the_first_keys_that_fit_are_taken(tmp_path: Path) -> None:
    """Whichever of addresses and ports an entry names."""
    path = tmp_path / "capture.pcap"
    wrpcap(str(path), segments(sealed(1000)))
    right, wrong = FLOW, FlowKeys.from_seed("aes-128-gcm", "another")
    ends = [
        ((PEER, PORT), (GUEST, 5000)),
        ((None, PORT), (None, None)),
        ((None, None), (None, 5000)),
        ((None, None),) * 2,
    ]
    for one in ends:
        for other in ends:
            for keys, good in (((right, wrong), True), ((wrong, right), False)):
                fixed = [*fixed_keys(keys[0], *one), *fixed_keys(keys[1], *other)]
                assert decode(path, Keys(fixed)).ok is good


def test_clear_bytes_before_the_first_record(tmp_path: Path) -> None:
    path = tmp_path / "late.pcap"
    wrpcap(str(path), segments(bytes(777) + sealed(5000)))
    found = guest_stream(decode(path, Keys(fixed_keys(FLOW, guest=(GUEST, 5000), tx_start=777))))
    assert found.ok
    assert (found.clear_bytes, found.plaintext_bytes) == (777, 5000)


def test_bytes_that_are_no_record_are_found(check: Check) -> None:
    report = check(segments(sealed(2000) + b"GET / HTTP/1.0\r\n\r\n"))
    assert guest_stream(report).errors == ["no TLS record header at byte 2058: 474554202f"]


def test_ports_used_again_are_another_connection(check: Check) -> None:
    def connection(isn: int, seed: str) -> list[Packet]:
        head = Ether(**ETHERNET) / IP(src=GUEST, dst="198.51.100.9")
        syn = head / TCP(sport=1, dport=2, seq=isn, flags="S")
        return [syn, syn, head / TCP(sport=1, dport=2, seq=isn + 1, flags="PA") / Raw(stream(seed, 100))]

    report = check([*connection(5, "a"), *connection(900_000, "b")])
    assert [item.bytes for item in report.find(destination=("198.51.100.9", 2))] == [100, 100]


@pytest.mark.parametrize("alignment", range(8))
def test_the_canary_sees_eight_bytes_anywhere(alignment: int) -> None:
    canary = Canary([sample("s")])
    noise = hashlib.shake_128(b"noise").digest(5000)
    for at in (0, alignment, 1001 + alignment, 4988 + alignment - 4):
        secret = sample("s")[377 + alignment : 385 + alignment]
        frame = bytearray(noise)
        frame[at : at + 8] = secret
        assert canary.find(memoryview(bytes(frame))) == at
        frame[at + 7] ^= 1
        assert canary.find(memoryview(bytes(frame))) is None
    assert canary.find(memoryview(noise)) is None


def keylog_capture(tmp_path: Path, cipher: str) -> tuple[Path, Path, bytes]:
    """A session between two OpenSSLs, and packets made of the bytes they exchanged; (capture, keylog, data sent)."""
    keylog = tmp_path / "keylog"
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.maximum_version = ssl.TLSVersion.TLSv1_2
    server.keylog_filename = str(keylog)
    server.set_ciphers(cipher)
    pem = tmp_path / "cert.pem"
    pem.write_bytes(self_signed())
    server.load_cert_chain(pem)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE

    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True))
    packets: list[Packet] = []
    sequences = {"c": 100, "s": 200}

    def relay(bio: ssl.MemoryBIO, side: str) -> None:
        data = bio.read()
        addresses = {"src": GUEST, "dst": PEER} if side == "c" else {"src": PEER, "dst": GUEST}
        ports = {"sport": 5000, "dport": PORT} if side == "c" else {"sport": PORT, "dport": 5000}
        for at in range(0, len(data), 500):
            payload = data[at : at + 500]
            packets.append(
                Ether(**ETHERNET) / IP(**addresses) / TCP(seq=sequences[side], flags="PA", **ports) / Raw(payload)
            )
            sequences[side] += len(payload)
        bio.write(data)

    done = [False, False]
    while not all(done):
        for index, end in enumerate(ends):
            try:
                end.do_handshake()
                done[index] = True
            except ssl.SSLWantReadError:
                pass
            relay((to_server, to_client)[index], "cs"[index])
    data = stream("s", 40_000)
    for end, bio, side in ((ends[0], to_server, "c"), (ends[1], to_client, "s")):
        end.write(data)
        relay(bio, side)
    path = tmp_path / "session.pcap"
    wrpcap(str(path), packets)
    return path, keylog, data


@pytest.mark.parametrize(
    ("cipher", "name"),
    [("ECDHE-RSA-AES128-GCM-SHA256", "aes-128-gcm"), ("ECDHE-RSA-AES256-GCM-SHA384", "aes-256-gcm")],
)
def test_a_real_handshake_is_read_with_the_key_log(tmp_path: Path, cipher: str, name: str) -> None:
    path, keylog, data = keylog_capture(tmp_path, cipher)
    report = decode(path, Keys(keylog=read_keylog(keylog.read_text()), samples=[sample("s")]))
    assert report.ok
    for found in report.streams:
        assert (found.keys, found.cipher) == ("keylog", name)
        assert found.sha256 == hashlib.sha256(data).hexdigest()
        assert found.records == found.types[22] + found.types[23] == 4  # Finished and three of data
        assert found.clear_bytes > 0


def test_a_session_without_its_secret_is_not_ok(tmp_path: Path) -> None:
    path, _, _ = keylog_capture(tmp_path, "ECDHE-RSA-AES128-GCM-SHA256")
    report = decode(path, Keys())
    assert not report.ok
    assert (report.records, report.records_decrypted_ok) == (8, 0)
    assert report.streams[0].errors == ["the key log has no secret for this session"]


def test_one_interface_of_a_pcapng(tmp_path: Path) -> None:
    path = tmp_path / "both.pcapng"
    with open(path, "wb") as file:
        section = blocks.SectionHeader()
        for name in ("host0", "wire0"):
            section.new_member(blocks.InterfaceDescription, link_type=1, options={"if_name": name})
        writer = FileWriter(file, section)
        for number, data in enumerate((stream("s", 2000), sealed(2000))):
            for packet in segments(data):
                block = section.new_member(blocks.EnhancedPacket, interface_id=number, packet_data=bytes(packet))
                writer.write_block(block)
    keys = Keys(fixed_keys(FLOW, (PEER, PORT)), samples=[sample("s")])
    wire = decode(path, keys, "wire0")
    assert wire.ok
    assert wire.records == 2
    assert decode(path, keys, "host0").plaintext_hits == 2


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a capture at all",
        struct.pack("<IHHIIII", 0xA1B2C3D4, 2, 4, 0, 0, 99, 113),
        struct.pack("<IHHIIII", 0xA1B2C3D4, 2, 4, 0, 0, 99, 1) + b"half a header",
        struct.pack("<IHHIIII", 0xA1B2C3D4, 2, 4, 0, 0, 99, 1) + struct.pack("<IIII", 0, 0, 20, 30) + bytes(20),
    ],
)
def test_an_unfit_capture_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.pcap"
    path.write_bytes(content)
    with pytest.raises(CaptureError):
        decode(path, Keys())


def test_the_command_line(tmp_path: Path) -> None:
    path, keylog, _ = keylog_capture(tmp_path, "ECDHE-RSA-AES128-GCM-SHA256")
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keylog": str(keylog), "seeds": ["s"]}))
    command = [sys.executable, "-m", "testbed.wire.decoder", str(path)]
    done = subprocess.run([*command, "--keys", str(keys)], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert (report["ok"], report["records"], report["records_decrypted_ok"]) == (True, 8, 8)
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    done = subprocess.run([*command, "--keys", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("module", ["testbed.wire.decoder", "testbed.peers.program"])
def test_the_oracle_shares_no_code_with_the_nic(module: str) -> None:
    code = f"import {module}, sys; print(sorted(name for name in sys.modules if name.startswith('nicdev')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
