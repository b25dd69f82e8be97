"""What the benchmark's groups without a guest reckon with: the driver's chains, the proof, rates."""

from __future__ import annotations

import struct
from array import array

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from bench.device_rx import sealed_lap
from bench.device_two import together
from bench.evp import Evp
from bench.proof import check_flows, check_stream
from bench.rig import Run
from bench.work import (
    INDIRECT,
    KEYS,
    SALT,
    SEALED,
    START_SEQ,
    TSO,
    Flows,
    Plain,
    Stream,
    Work,
    stream_lap,
    text,
)
from testbed.errors import BedError

EXTENDED = 12 + 32  # virtio_net_hdr and TX_TLS


def chain(ram: memoryview, work: Work, index: int) -> bytes:
    """The bytes of a chain, as a device reads them."""
    address, length, flags = work.descriptor(index)
    if not flags & INDIRECT:
        return bytes(ram[address : address + length])
    found = b""
    for at in range(address, address + length, 16):
        where, size, _, _ = struct.unpack_from("<QIHH", ram, at)
        found += bytes(ram[where : where + size])
    return found


def encrypted(frame: bytes, headers: int, number: int, key: bytes) -> bytes:
    """A frame with one record, encrypted as it should be."""
    aad = number.to_bytes(8, "big") + b"\x17\x03\x03\x40\x00"
    start = headers + 13
    sealed = AESGCM(key).encrypt(SALT + frame[headers + 5 : start], frame[start:-16], aad)
    return frame[:start] + sealed


@pytest.fixture
def ram() -> memoryview:
    return memoryview(bytearray(8 << 20))


def test_plain_frames_are_frames(ram: memoryview) -> None:
    frame = chain(ram, Plain(ram, 4096, 4), 3)[12:]
    parsed = Ether(frame)
    assert len(frame) == 64
    assert parsed[UDP].dport == 9
    given = parsed[IP].chksum
    del parsed[IP].chksum
    assert Ether(bytes(parsed))[IP].chksum == given


def test_a_lap_of_a_stream_is_whole_records(ram: memoryview) -> None:
    """In packets whose sequence numbers go on from lap to lap, here and in the next round of the ring."""
    work = Stream(ram, 4096, 64, TSO, 32)
    records, size = stream_lap(32, TSO)
    for lap in range(3):
        work.prepare(32 * lap, 32)
        packets = [Ether(chain(ram, work, (32 * lap + index) % 64)[EXTENDED:]) for index in range(32)]
        data = b"".join(bytes(packet[TCP].payload) for packet in packets)
        assert packets[0][TCP].seq == (START_SEQ + lap * size) & 0xFFFFFFFF
        assert packets[31][TCP].seq == (START_SEQ + lap * size + 31 * TSO) & 0xFFFFFFFF
        assert all(packet[IP].len == len(packet) - 14 <= 65535 for packet in packets)
        assert len(data) == size == records * SEALED
        assert data[5 * SEALED + 13 : 6 * SEALED - 16] == text(5)


def test_a_lap_that_would_leave_a_packet_over_is_refused() -> None:
    with pytest.raises(AssertionError):
        stream_lap(32, SEALED // 3)


def test_flows_take_turns(ram: memoryview) -> None:
    """Each packet is the next record of the flow whose turn it is; the proof holds with those keys and no others."""
    work = Flows(ram, 4096, 4, [70, 3, 70], array("I", bytes(400)))
    work.prepare(0, 4)
    frames = [chain(ram, work, index)[EXTENDED:] for index in range(4)]
    numbers = [0, 0, 1, 2]
    for frame, slot, number in zip(frames, (70, 3, 70, 70), numbers, strict=True):
        packet = Ether(frame)
        assert packet[IPv6].src == f"2001:db8::{slot:x}"
        assert packet[TCP].seq == (START_SEQ + number * SEALED) & 0xFFFFFFFF
    keys = [KEYS[slot % len(KEYS)] for slot in (70, 3, 70, 70)]
    sealed = [encrypted(*some) for some in zip(frames, [86] * 4, numbers, keys, strict=True)]
    check_flows(sealed)
    with pytest.raises(BedError):
        check_flows([*sealed[:3], encrypted(frames[3], 86, 2, KEYS[3])])
    with pytest.raises(BedError):
        check_flows(frames)


def test_the_proof_of_a_stream() -> None:
    """Frames that were sealed without the engine pass; a byte, a place or a lap that is wrong does not."""
    frames = [frame for _, frame in sealed_lap(4, TSO)]
    records, _ = stream_lap(4, TSO)
    check_stream(frames, 0, records)
    check_stream(frames[:2], 0, records)
    spoiled = bytearray(frames[1])
    spoiled[1000] ^= 1
    for wrong in ([frames[0], bytes(spoiled)], [frames[1]], [frames[0], frames[2]], []):
        with pytest.raises(BedError):
            check_stream(wrong, 0, records)
    with pytest.raises(BedError):
        check_stream(frames, 1, records)


def test_pieces_of_a_run() -> None:
    run = Run([(10, 1_000), (30, 2_000), (40, 4_000)], 40, 0.5, 0)
    assert run.pieces == [pytest.approx(20e6), pytest.approx(5e6)]
    assert run.by_processor == 80


def test_rates_of_processes_at_work_together() -> None:
    """Only the time that both were at work counts; between two marks a process is taken to be steady."""
    first = [(0, 0), (100, 1_000), (300, 2_000)]
    second = [(5, 500), (15, 1_500), (20, 2_500)]
    assert together([first, second], 3) == [pytest.approx(rate) for rate in (0.11e9, 0.21e9, 0.205e9)]


def test_the_libcrypto_of_the_device_is_the_one_that_is_called() -> None:
    """The loop compares its first record with cryptography's own; a rate is bytes over seconds."""
    assert Evp(1024).rate(10) > 0
    assert Evp(1024).rate(10, records=False) > 0
