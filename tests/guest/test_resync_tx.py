"""Personality rebuild: the device encrypts retransmissions too, told by the driver where in which record they begin.

On each kernel, since driver and kernel meet here at the list of unacknowledged records. test_disorder.py is about
next-record, the other personality.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.assets.image import KERNELS
from testbed.bed import Bed, running
from testbed.setup import prepare
from tests.guest.cases import DEAF, install, recv_clear, send_clear
from tests.guest.conftest import assert_settled, wait_until
from tests.guest.exchange import (
    CIPHERS,
    EOF,
    REORDER,
    WAIT,
    Case,
    Running,
    Seen,
    disturbed,
    exchange,
    netem,
    recv,
    send,
    tx_case,
    tx_personality,
)
from tests.guest.test_disorder import disorderly_case, through_disorder

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

SIZE = 1 << 20
LOSS = """
seed = 5
[tx]
segments = "wire"
drop = 0.05
[rx]
drop = 0.02
"""
FORGETS = """
[[rule]]
action = "desync"
direction = "tx"
record = 20
count = "all"
"""
CLEAR = bytes.fromhex("c1ea") * 400


@pytest.fixture(scope="module", params=KERNELS)
def kernel_bed(request: pytest.FixtureRequest) -> Iterator[Bed]:
    with running(prepare(request.param), name=f"test-resync-{request.param}") as bed:
        yield bed


@pytest.fixture
def bed(kernel_bed: Bed) -> Iterator[Bed]:
    yield kernel_bed
    assert_settled(kernel_bed, drops=("tx_drop_wrong_seq",))


def flows(name: str, size: int = SIZE) -> list[Case]:
    """One flow per cipher and size of records; four, so that packets hold many records, and records many packets."""
    return [
        tx_case(f"{name} {cipher} {write}", send(size, write=write), size=size, cipher=cipher, family=family)
        for cipher, family in zip(CIPHERS, "46", strict=True)
        for write in (700, 16384)
    ]


def by_the_device_alone(seen: Seen) -> None:
    """All data arrived, encrypted once and by the device; every packet out of order came with a resync."""
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    driver, nic = seen.driver, seen.nic
    for counter in ("tx_tls_fallback", "tx_tls_resync_req", "tx_tls_device_drop", "tx_tls_drop_bypass_req", "tx_drop"):
        assert driver[counter] == 0, counter
    assert {name for name, n in nic.items() if name.startswith("tx_drop") and n} == set()
    assert driver["tx_tls_resync"] == nic["tx_tls_resync"] == driver["tx_tls_ooo"] - driver["tx_tls_drop_no_sync_data"]
    assert driver["tx_tls_encrypted_bytes"] == nic["tx_tls_bytes"]
    assert driver["tx_tls_encrypted_bytes"] >= sum(stream.bytes for stream in seen.streams("tx"))


@pytest.mark.conformance(44)
@pytest.mark.conformance(45)
@pytest.mark.conformance(46)
@pytest.mark.conformance(47)
@pytest.mark.conformance(85)
@pytest.mark.conformance(112)
@pytest.mark.conformance(127)
def test_five_percent_of_wire_segments_are_lost(bed: Bed, capture_path: Path) -> None:
    """Segments are lost behind the device: TCP repeats single ones out of the middle of packets and of records."""
    with bed.nic.faults(LOSS):
        seen = exchange(bed, flows("lossy"), capture_path)
    by_the_device_alone(seen)
    assert seen.nic["fault_dropped"] > 50
    assert seen.driver["tx_tls_resync"] > 50
    assert seen.driver["tx_tls_resync_bytes"] > 50 * 1000
    assert seen.driver["tx_tls_drop_no_sync_data"] == 0


@pytest.mark.conformance(45)
@pytest.mark.conformance(46)
def test_what_is_sent_twice_is_the_same_twice(bed: Bed, capture_path: Path) -> None:
    """Nothing is acknowledged for a while, so TCP repeats what has arrived: the wire shows the copies, all equal."""
    cases = [
        tx_case(f"twice {cipher} {write}", WAIT, send(SIZE // 4, write=write), size=SIZE // 4, cipher=cipher)
        for cipher in CIPHERS
        for write in (100, 16384)
    ]

    def meanwhile(run: Running) -> None:
        run.guest_waits()
        before = bed.nic.stats()["tx_tls_resync"]
        with bed.nic.faults(DEAF):
            run.go_on()
            wait_until(lambda: bed.nic.stats()["tx_tls_resync"] >= before + 4 * len(cases), "TCP repeats")

    seen = exchange(bed, cases, capture_path, meanwhile)
    by_the_device_alone(seen)
    # that they are equal is part of wire_is_encrypted()
    assert all(stream.retransmitted_bytes > 0 for stream in seen.streams("tx"))
    assert all(stream.errors == [] for stream in seen.streams("tx"))


@pytest.mark.conformance(44)
@pytest.mark.conformance(47)
@pytest.mark.parametrize("segments", [65535, 1], ids=["large packets", "single segments"])
@pytest.mark.parametrize("disorder", [netem("loss 5%"), REORDER], ids=["loss", "reorder"])
def test_disorder_above_the_driver(bed: Bed, capture_path: Path, disorder: tuple[str, ...], segments: int) -> None:
    """Gaps and jumps before the device: the next packet comes with a resync, and nothing is asked of the stack."""
    limit = ["ip", "link", "set", "dev", "eth0", "gso_max_segs"]
    bed.agent.run([*limit, str(segments)])
    try:
        cases = [disorderly_case(CIPHERS[0], write) for write in (700, 16384)]
        seen, _ = through_disorder(bed, capture_path, disorder, cases)
    finally:
        bed.agent.run([*limit, "65535"])
    by_the_device_alone(seen)
    assert seen.driver["tx_tls_ooo"] > 0
    # a packet that others overtook may come when its data was repeated and acknowledged: there is nothing to encrypt
    assert seen.driver["tx_tls_drop_no_sync_data"] == 0 or disorder is REORDER


@pytest.mark.conformance(17)
@pytest.mark.conformance(113)
def test_bytes_from_before_the_offload_go_out_as_they_are(bed: Bed, capture_path: Path) -> None:
    """Bytes sent before the offload and lost: TCP repeats them when the context is there already."""
    guest = [WAIT, send_clear(CLEAR), install("tx"), send(SIZE, write=5000)]
    peer = [recv_clear(len(CLEAR)), recv(SIZE), EOF]
    case = Case("before", guest, peer, dirs=("tx",), tx_start=len(CLEAR))

    def lose_them(run: Running) -> None:
        run.guest_waits()
        made = bed.ethtool()["tx_tls_ctx"]
        with disturbed(bed, netem("loss 100%")):
            run.go_on()
            wait_until(lambda: bed.ethtool()["tx_tls_ctx"] > made, "the context is there")

    seen = exchange(bed, [case], capture_path, lose_them)
    seen.arrived()
    seen.wire_is_encrypted()
    assert CLEAR in capture_path.read_bytes()
    driver = seen.driver
    assert driver["tx_tls_skip_no_sync_data"] >= 1
    assert driver["tx_tls_ooo"] == driver["tx_tls_skip_no_sync_data"] + driver["tx_tls_resync"]
    assert driver["tx_tls_fallback"] == driver["tx_tls_drop_bypass_req"] == driver["tx_tls_drop_no_sync_data"] == 0


@pytest.mark.conformance(27)
@pytest.mark.conformance(29)
def test_a_device_that_forgets_its_place_is_put_back(bed: Bed, capture_path: Path) -> None:
    """It drops what it cannot encrypt and says so; what TCP repeats puts it back, at once."""
    with bed.nic.faults(FORGETS):
        seen = exchange(bed, flows("forgets"), capture_path)
        assert bed.nic.fault_rules() == {"desync 1": 4}
    seen.arrived()
    seen.wire_is_encrypted()
    assert seen.nic["fault_desynced"] == 4
    assert 4 <= seen.driver["tx_tls_device_drop"] <= seen.nic["tx_drop_wrong_seq"]
    assert seen.driver["tx_tls_fallback"] == seen.driver["tx_tls_resync_req"] == 0
    assert seen.driver["tx_tls_resync"] >= 4


@pytest.mark.conformance(48)
def test_the_personality_changes_under_a_live_connection(bed: Bed, capture_path: Path) -> None:
    """Software encrypts while the device says next-record, and only then."""
    part = send(SIZE, write=4000)
    cases = [
        tx_case(f"changes {cipher}", part, WAIT, part, WAIT, part, WAIT, part, size=4 * SIZE, cipher=cipher)
        for cipher in CIPHERS
    ]
    fallbacks: list[int] = []

    def meanwhile(run: Running) -> None:
        fallbacks.append(bed.ethtool()["tx_tls_fallback"])
        for name in ("rebuild", "next-record", "rebuild"):
            run.guest_waits()
            fallbacks.append(bed.ethtool()["tx_tls_fallback"])
            if name == "next-record":
                with tx_personality(bed, name):
                    run.go_on()
                    run.guest_waits()
                fallbacks.append(bed.ethtool()["tx_tls_fallback"])
                run.go_on()
                return
            run.go_on()

    with bed.nic.faults(LOSS):
        seen = exchange(bed, cases, capture_path, meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    before, first, second, third = fallbacks
    assert before == first == second
    assert third > second
    assert seen.driver["tx_tls_fallback"] == third - before
    assert seen.driver["tx_tls_device_drop"] == 0


def test_payload_that_is_not_in_fragments(bed: Bed, capture_path: Path) -> None:
    """Without scatter/gather every packet of a live connection is one piece of memory: encrypted once all the same."""
    half = send(SIZE // 2, write=3000)
    case = tx_case("linear", half, WAIT, half, WAIT, half, size=3 * SIZE // 2)

    def meanwhile(run: Running) -> None:
        for state in ("off", "on"):
            run.guest_waits()
            bed.agent.run(["ethtool", "-K", "eth0", "sg", state])
            run.go_on()

    try:
        with bed.nic.faults(LOSS):
            seen = exchange(bed, [case], capture_path, meanwhile)
    finally:
        bed.agent.run(["ethtool", "-K", "eth0", "sg", "on", "tso", "on"])
    by_the_device_alone(seen)
