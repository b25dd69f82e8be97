"""Disorder on the way out: gaps and repetitions between TCP and the driver, made by netem in the guest.

Personality next-record: the driver encrypts in software what the device cannot take, and the device comes back at a
record that driver and stack agree on. The peer and the decoder must not see any of it. Rebuild: see test_resync_tx.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from testbed.bed import Bed
from tests.guest.exchange import (
    CIPHERS,
    REORDER,
    WAIT,
    Case,
    Running,
    Seen,
    Step,
    disturbed,
    exchange,
    netem,
    recv,
    send,
    traced,
    tx_case,
    tx_personality,
)

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

ROUND = 250_000
ROUNDS = 3
AFTERWARDS = 300_000
REPLY = 1
DISORDERS = {
    "loss": netem("loss 3%"),
    "bursts of loss": netem("loss gemodel 1% 30%"),
    "reorder": REORDER,
    "duplicates": netem("duplicate 10%"),
}
LOST_BEHIND = """
seed = 5
[tx]
segments = "wire"
drop = 0.05
"""
ROOMY = {"options": {"SO_RCVBUF": 4 * ROUND, "SO_SNDBUF": 4 * ROUND}}


def disorderly_case(cipher: str, write: int) -> Case:
    """An echo in disorder, then a few records in order, then the data that must be the device's again."""
    guest: list[Step] = [WAIT]
    for _ in range(ROUNDS):
        guest += [send(ROUND, write=write), recv(ROUND)]
    guest += [WAIT, *[step for _ in range(3) for step in (send(10), recv(10))], WAIT, send(AFTERWARDS, write=write)]
    peer: list[Step] = [{"do": "echo", "size": ROUNDS * ROUND + 30}, recv(AFTERWARDS)]
    return Case(f"{cipher} {write}", guest, peer, cipher=cipher, guest_job=ROOMY, peer_job=ROOMY)


def through_disorder(
    bed: Bed, capture_path: Path, disorder: Sequence[str], cases: list[Case]
) -> tuple[Seen, Counter[str]]:
    """What was seen, and the device's counters when everything was in order again."""
    in_order = Counter[str]()

    def disturb(running: Running) -> None:
        running.guest_waits()
        with disturbed(bed, disorder):
            running.go_on()
            running.guest_waits()
        running.go_on()
        running.guest_waits()
        in_order.update(bed.nic.stats())
        running.go_on()

    seen = exchange(bed, cases, capture_path, disturb)
    after = Counter(bed.nic.stats())
    after.subtract(in_order)
    return seen, after


@pytest.mark.conformance(55)
@pytest.mark.conformance(27)
@pytest.mark.conformance(44)
@pytest.mark.conformance(47)
@pytest.mark.conformance(48)
@pytest.mark.conformance(49)
@pytest.mark.conformance(54)
@pytest.mark.conformance(84)
@pytest.mark.conformance(112)
@pytest.mark.conformance(127)
@pytest.mark.parametrize("segments", [65535, 1], ids=["large packets", "single segments"])
@pytest.mark.parametrize("name", DISORDERS)
def test_the_device_comes_back(bed: Bed, capture_path: Path, name: str, segments: int) -> None:
    """All data arrives, all of it encrypted, the device drops nothing, and in the end it does all the work again."""
    cases = [disorderly_case(cipher, write) for cipher in CIPHERS for write in (700, 16384)]
    limit = ["ip", "link", "set", "dev", "eth0", "gso_max_segs"]
    bed.agent.run([*limit, str(segments)])
    try:
        with tx_personality(bed, "next-record"), traced(bed, "tls:tls_device_tx_resync_send") as sent:
            seen, after = through_disorder(bed, capture_path, DISORDERS[name], cases)
    finally:
        bed.agent.run([*limit, "65535"])
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    driver = seen.driver
    for counter in ("tx_tls_device_drop", "tx_tls_drop_bypass_req", "tx_drop"):
        assert driver[counter] == 0
    # A packet that others overtook may come when its data was repeated and acknowledged, and so may a repetition that
    # was not needed: there is nothing to encrypt.
    assert driver["tx_tls_drop_no_sync_data"] <= seen.tcp["TcpRetransSegs"]
    if name != "duplicates":  # the kernel drops a copy that belongs to no socket before the driver sees it
        assert driver["tx_tls_ooo"] >= driver["tx_tls_fallback"] > 0
        assert len(sent) == driver["tx_tls_resync_req"] >= driver["tx_tls_resync"]
        if segments == 1:  # of a few large packets chance may take only ones that are sent again
            assert driver["tx_tls_resync"] > 0
        assert seen.nic["tx_tls_resync"] == driver["tx_tls_resync"]
    records = sum(-(-AFTERWARDS // case.guest[1]["write"]) for case in cases)
    assert after["tx_tls_records"] == records
    assert driver["tx_tls_encrypted_bytes"] == seen.nic["tx_tls_bytes"]
    assert driver["tx_tls_encrypted_bytes"] <= sum(stream.bytes for stream in seen.streams("tx"))


@pytest.mark.conformance(48)
@pytest.mark.conformance(49)
def test_repetitions_leave_the_device_where_it_is(bed: Bed, capture_path: Path) -> None:
    """Segments are lost behind the device: software encrypts them again, the device all that is new, as if in order."""
    size = 1 << 20
    cases = [tx_case(f"behind {cipher}", send(size, write=4000), size=size, cipher=cipher) for cipher in CIPHERS]
    with tx_personality(bed, "next-record"), bed.nic.faults(LOST_BEHIND):
        seen = exchange(bed, cases, capture_path)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    driver = seen.driver
    assert driver["tx_tls_ooo"] == driver["tx_tls_fallback"] > 10
    assert driver["tx_tls_resync_req"] == driver["tx_tls_resync"] == driver["tx_tls_device_drop"] == 0
    assert seen.nic["tx_tls_bytes"] == sum(stream.bytes for stream in seen.streams("tx"))
