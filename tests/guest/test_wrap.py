"""Sequence numbers that pass 2^32 during a transfer: on every byte of interest, in order and in disorder."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from testbed.bed import GUEST4, WIRE4, Bed
from testbed.wire.pcapfile import frames
from testbed.wire.reassembly import parse
from tests.guest.exchange import (
    CIPHERS,
    RECORD_OVERHEAD,
    Case,
    disturbed,
    exchange,
    netem,
    rx_case,
    rx_personality,
    send,
    tx_case,
    tx_personality,
)

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

SPACE = 1 << 32
RECORD = 3000
ON_WIRE = RECORD + RECORD_OVERHEAD
SIZE = 40 * RECORD
# how many bytes of TLS come before sequence number 0: none at all, and up to each part of a record
BEFORE = {
    "the first byte": 0,
    "the second byte": 1,
    "a record's start": 10 * ON_WIRE,
    "a header": 10 * ON_WIRE + 3,
    "a header's last byte": 10 * ON_WIRE + 4,
    "a nonce": 10 * ON_WIRE + 9,
    "data": 10 * ON_WIRE + 1500,
    "a tag": 11 * ON_WIRE - 7,
}
DISORDER = """
seed = 11
[{direction}]
segments = "wire"
drop = 0.03
reorder = 0.02
"""


def tx_wrap(name: str, before: int, size: int) -> Case:
    """The guest connects, and sends so many bytes before its sequence numbers wrap."""
    job = {"first_seq": (SPACE - 1 - before) % SPACE}
    cipher = CIPHERS[before % 2]
    return tx_case(f"tx {name}", send(size, write=RECORD), size=size, cipher=cipher, guest_job=job)


def rx_wrap(name: str, before: int, size: int, port: int) -> Case:
    """Likewise the peer."""
    job = {"first_seq": (SPACE - 1 - before) % SPACE}
    cipher = CIPHERS[before % 2]
    return rx_case(f"rx {name}", send(size, records=[RECORD]), size=size, cipher=cipher, listen=port, peer_job=job)


def wraps(path: Path, source: str) -> int:
    """How many connections have data of `source` on both sides of sequence number 0."""
    low, high = set(), set()
    for frame in frames(path):
        segment = parse(frame)
        if segment and segment.payload and segment.source == bytes(map(int, source.split("."))):
            end = segment.sequence + len(segment.payload)
            ports = (segment.source_port, segment.destination_port)
            if segment.sequence > SPACE // 2:
                high.add(ports)
            if segment.sequence < SPACE // 2 or end > SPACE:
                low.add(ports)
    return len(low & high)


@pytest.mark.conformance(27)
@pytest.mark.conformance(35)
def test_in_order_at_every_part_of_a_record(bed: Bed, capture_path: Path) -> None:
    cases = [tx_wrap(name, before, SIZE) for name, before in BEFORE.items()]
    cases += [rx_wrap(name, before, SIZE, 7000 + n) for n, (name, before) in enumerate(BEFORE.items())]
    seen = exchange(bed, cases, capture_path)
    seen.offloaded()
    for source in (GUEST4, WIRE4):
        # the one that begins with 0 does not wrap
        assert wraps(capture_path, source) == len(BEFORE) - 1


def disorderly(direction: str) -> list[Case]:
    """Connections that wrap early, in the middle, and after the last byte but one."""
    size = 300 * RECORD
    places = {"early": 5 * ON_WIRE + 3, "middle": 150 * ON_WIRE, "late": 299 * ON_WIRE + 70}
    if direction == "tx":
        return [tx_wrap(name, before, size) for name, before in places.items()]
    return [rx_wrap(name, before, size, 7100 + n) for n, (name, before) in enumerate(places.items())]


@pytest.mark.conformance(44)
@pytest.mark.conformance(47)
@pytest.mark.parametrize("personality", ["rebuild", "next-record"])
def test_tx_in_disorder(bed: Bed, capture_path: Path, personality: str) -> None:
    """Above the driver and behind the device: what TCP repeats lies before 0, what follows behind it."""
    cases = disorderly("tx")
    above, behind = disturbed(bed, netem("loss 3%")), bed.nic.faults(DISORDER.format(direction="tx"))
    with tx_personality(bed, personality), above, behind:
        seen = exchange(bed, cases, capture_path)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    assert wraps(capture_path, GUEST4) == len(cases)
    assert seen.nic["fault_dropped"] > 20
    driver = seen.driver
    for name in ("tx_drop", "tx_tls_device_drop", "tx_tls_drop_bypass_req"):
        assert driver[name] == 0, seen.account(name)
    assert driver["tx_tls_resync"] > 0
    assert (driver["tx_tls_fallback"] == 0) is (personality == "rebuild")
    assert seen.nic["tx_tls_records"] > 100


@pytest.mark.conformance(41)
@pytest.mark.conformance(56)
@pytest.mark.parametrize("personality", ["ideal", "driver-req", "core-next-hint"])
def test_rx_in_disorder(bed: Bed, capture_path: Path, personality: str) -> None:
    cases = disorderly("rx")
    with ExitStack() as stack:
        if personality != "ideal":
            stack.enter_context(rx_personality(bed, personality))
        stack.enter_context(bed.nic.faults(DISORDER.format(direction="rx")))
        seen = exchange(bed, cases, capture_path)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    assert wraps(capture_path, WIRE4) == len(cases)
    assert seen.nic["fault_dropped"] > 20
    assert seen.nic["rx_tls_records"] > 0
    if personality == "ideal":
        assert seen.nic["rx_tls_records"] > 0.8 * sum(stream.records for stream in seen.streams("rx"))
    else:
        assert seen.tls_stat["TlsRxDeviceResync"] > 0
