"""Packets of 576, 1500 and 9000 bytes, both ways, and a size that changes while data flows.

"Wire" segments are what a network would carry: the device cuts what the peer's kernel leaves whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from testbed.bed import GUEST6, WIRE6, Bed, running
from testbed.setup import Assets
from testbed.wire.pcapfile import frames
from tests.guest.conftest import assert_settled
from tests.guest.exchange import CIPHERS, Case, Running, exchange, rx_case, send, tx_case
from tests.guest.rounds import RECORDS_PER_ROUND, Rounds, echo_cases

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

MTUS = (576, 1500, 9000)
IPV6_LEAST = 1280  # RFC 8200 section 5
LARGEST = max(MTUS)
ETHERNET = 14
WIRE_SEGMENTS = """
seed = 1
[tx]
segments = "wire"
[rx]
segments = "wire"
"""
LOSSY = WIRE_SEGMENTS.replace('"wire"', '"wire"\ndrop = 0.01')


@pytest.fixture(scope="module")
def large_bed(assets: Assets) -> Iterator[Bed]:
    with running(assets, name="test-mtu", mtu=LARGEST) as bed:
        yield bed


@pytest.fixture
def bed(large_bed: Bed) -> Iterator[Bed]:
    yield large_bed
    assert_settled(large_bed)


def set_mtu(bed: Bed, size: int) -> None:
    """On both ends. IPv6 leaves an interface with too small an MTU, and takes its addresses along."""
    bed.agent.run(["ip", "link", "set", "eth0", "mtu", str(size)])
    bed.wire.run(["ip", "link", "set", bed.wire.interface, "mtu", str(size)])
    if size >= IPV6_LEAST:
        bed.agent.run(["ip", "-6", "addr", "replace", f"{GUEST6}/64", "dev", "eth0", "nodad"])
        bed.wire.run(["ip", "-6", "addr", "replace", f"{WIRE6}/64", "dev", bed.wire.interface, "nodad"])


@contextmanager
def mtu(bed: Bed, size: int) -> Iterator[None]:
    set_mtu(bed, size)
    try:
        yield
    finally:
        set_mtu(bed, LARGEST)


def both_ways(size: int) -> list[Case]:
    """Small records, records larger than any packet, in each direction, of each family that there is."""
    cases = []
    for family, cipher in zip("46" if size >= IPV6_LEAST else "44", CIPHERS, strict=True):
        for record, total in ((100, 60_000), (16384, 500_000)):
            name = f"{family} {cipher} {record}"
            how = {"family": family, "cipher": cipher}
            cases.append(tx_case(f"tx {name}", send(total, write=record), size=total, **how))
            cases.append(rx_case(f"rx {name}", send(total, records=[record]), size=total, **how))
    return cases


@pytest.mark.conformance(20)
@pytest.mark.conformance(31)
@pytest.mark.parametrize("size", MTUS)
def test_records_small_and_large_both_ways(bed: Bed, capture_path: Path, size: int) -> None:
    with mtu(bed, size), bed.nic.faults(WIRE_SEGMENTS):
        seen = exchange(bed, both_ways(size), capture_path)
    seen.offloaded()
    from_guest = [len(frame) for frame in frames(capture_path) if frame[6:12] == bytes.fromhex("525400123456")]
    assert max(from_guest) == size + ETHERNET
    # the last segments of large records are full ones
    large = sum(stream.bytes for stream in seen.streams("rx"))
    assert seen.nic["rx_tls_packets"] > large / size


@pytest.mark.conformance(45)
@pytest.mark.parametrize("size", MTUS)
def test_loss_at_every_size(bed: Bed, capture_path: Path, size: int) -> None:
    with mtu(bed, size), bed.nic.faults(LOSSY):
        seen = exchange(bed, both_ways(size), capture_path)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    assert seen.nic["fault_dropped"] > 0
    assert seen.driver["tx_tls_fallback"] == seen.driver["tx_drop"] == seen.driver["tx_tls_device_drop"] == 0
    assert seen.nic["rx_tls_records"] > 0.8 * sum(stream.records for stream in seen.streams("rx"))


def test_the_size_changes_under_live_connections(bed: Bed, capture_path: Path) -> None:
    """Up and down while data is under way: TCP cuts again what it had cut, and no packet stays without its record."""

    def meanwhile(run: Running) -> None:
        rounds = Rounds(run)
        for size in (1500, LARGEST, 1400, LARGEST):
            rounds.begin()
            set_mtu(bed, size)
            rounds.end()
        whole = rounds.whole()
        assert whole["tx_tls_records"] >= 2 * RECORDS_PER_ROUND, rounds.account()
        assert whole["rx_tls_records"] >= 2 * RECORDS_PER_ROUND, rounds.account()
        run.go_on()

    with bed.nic.faults(WIRE_SEGMENTS):
        seen = exchange(bed, echo_cases("mtu", 7), capture_path, meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    assert seen.driver["tx_tls_fallback"] == seen.driver["tx_drop"] == seen.driver["tx_tls_device_drop"] == 0
