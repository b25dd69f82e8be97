"""Rx resync in a stream that flows: segments are lost, decoys pass, and afterwards all is the device's again."""

from __future__ import annotations

import re
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from testbed.bed import GUEST6, Bed
from testbed.peers.flowkeys import FlowKeys
from testbed.peers.rawtls import Sealer
from testbed.peers.stream import stream
from tests.guest.cases import rx_flow
from tests.guest.exchange import (
    CIPHERS,
    EOF,
    RECORD_OVERHEAD,
    SHUTDOWN,
    WAIT,
    Case,
    Running,
    exchange,
    recv,
    rx_case,
    rx_personality,
    send,
)
from tests.guest.resync_rx import HARDWARE, LENGTH, SIZE, desync, lockstep, resyncing, rule, tracing

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

EACH = pytest.mark.parametrize("personality", [*HARDWARE, "ideal"])
CUT = 700  # bytes on the wire: packets do not begin with records
_LOOKS_LIKE_A_HEADER = re.compile(rb"[\x14-\x18]\x03\x03([\x00-\x40].)", re.DOTALL)


def streamed_then_lockstep(seed: str, streamed: int, size: int, how: dict[str, Any], **options: Any) -> Case:
    """A flow of `streamed` records that the peer sends without waiting, and a hundred in lockstep."""
    guest, peer = lockstep(100, size)
    return rx_flow(
        seed,
        [recv(streamed * size), send(1), *guest],
        [send(streamed * size, records=[size], **how), recv(1), *peer],
        **options,
    )


def decoy(cipher: str, records: int) -> tuple[str, int]:
    """A seed and a record in whose ciphertext something looks like a header.

    It lies in one packet, behind the first that begins in this record, and claims a record that ends in a later
    packet: whoever begins to look for headers there finds it first, and cannot tell yet.
    """
    for number in count():
        seed = f"decoy {number}"
        sealer = Sealer(FlowKeys.from_seed(cipher, seed).rx)
        text = stream(seed, records * SIZE)
        wire = b"".join(sealer.seal(text[at : at + SIZE]) for at in range(0, len(text), SIZE))
        for found in _LOOKS_LIKE_A_HEADER.finditer(wire):
            record, length = found.start() // LENGTH, int.from_bytes(found[1], "big")
            first = -(-(record * LENGTH + 1) // CUT) * CUT
            packet_end = (found.start() // CUT + 1) * CUT
            inside = first <= found.start() and found.end() <= min(packet_end, (record + 1) * LENGTH)
            if inside and 24 <= length <= 16408 and found.end() + length > packet_end and record >= 5:
                return seed, record
    raise AssertionError


@EACH
@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.conformance(63)
@pytest.mark.conformance(65)
@pytest.mark.conformance(70)
@pytest.mark.conformance(76)
def test_a_decoy(bed: Bed, capture_path: Path, personality: str, cipher: str) -> None:
    """The first thing the lost device finds is ciphertext: the kernel says nothing to that, and the device goes on."""
    seed, record = decoy(cipher, 40)
    case = streamed_then_lockstep(seed, 60, SIZE, {"writes": [CUT], "apart": True}, cipher=cipher)
    with resyncing(bed, personality, desync(record)) as flows:
        seen = exchange(bed, [case], capture_path)
    seen.arrived()
    seen.kernel_offloads()
    (flow,) = flows.values()
    answers = flow.answers(personality)  # to true record starts alone
    assert flow.records()[-30:] == flow.records(decrypted=1)[-30:]
    nic, driver = seen.nic, seen.driver
    assert nic["rx_tls_auth_fail"] == 0
    assert nic["rx_tls_resynced"] == 1
    if personality == "driver-req-async":
        assert (nic["rx_tls_resync_started"], nic["rx_tls_resync_cancelled"]) == (2, 1)
        assert [driver[f"rx_tls_resync_req_{what}"] for what in ("start", "end", "skip")] == [2, 1, 1]
        assert len(answers) == 1
    elif personality != "core-next-hint":
        assert nic["rx_tls_asked"] == driver["rx_tls_resync_req_pkt"] > len(answers) > 0


BIG = 6000  # plaintext of a record that takes five segments
HOLED: dict[str, Any] = {"name": "lost", "direction": "rx", "local": f"[{GUEST6}]:*", "record": 20}


@EACH
@pytest.mark.conformance(56)
@pytest.mark.conformance(57)
@pytest.mark.conformance(59)
@pytest.mark.conformance(60)
def test_a_lost_segment_without_header(bed: Bed, capture_path: Path, personality: str) -> None:
    """Of one of two flows: nothing is asked, the kernel mends that record, and the next ones are the device's."""
    cases = [
        rx_case(f"payload {family}", send(60 * BIG, records=[BIG]), size=60 * BIG, family=family, rec_seq=n << 32)
        for n, family in enumerate("46")
    ]
    faults = '[rx]\nsegments = "wire"\n' + rule("drop", **HOLED, part="payload", byte=3000)
    with rx_personality(bed, personality), bed.nic.faults(faults), tracing(bed) as flows:
        seen = exchange(bed, cases, capture_path)
        assert bed.nic.fault_rules() == {"lost": 1}
    seen.arrived()
    seen.kernel_offloads()
    whole, holed = flows[0], flows[1 << 32]
    assert whole.by_software == whole.mixed == []
    # the packet behind the hole that ends the record may begin the next one
    spoiled = set(holed.by_software + holed.mixed)
    assert spoiled == set() if personality == "ideal" else 20 in spoiled and spoiled <= {20, 21}
    assert seen.nic["rx_tls_lost_sync"] == seen.tls_stat["TlsRxDeviceResync"] == 0
    assert seen.driver["rx_tls_resync_req_pkt"] == 0


@EACH
@pytest.mark.parametrize("part", ["header", "tag"])
@pytest.mark.conformance(41)
@pytest.mark.conformance(61)
@pytest.mark.conformance(62)
@pytest.mark.conformance(75)
def test_a_lost_segment_with_a_header(bed: Bed, capture_path: Path, personality: str, part: str) -> None:
    """Of one of two flows, together with what TCP repeats, for a while: only that flow asks, and comes back."""
    cases = [
        streamed_then_lockstep(f"{part} {family}", 100, BIG, {}, family=family, rec_seq=n << 32)
        for n, family in enumerate("46")
    ]
    lost = rule("drop", **HOLED, part=part, retransmissions=True, count=2)
    with (
        rx_personality(bed, personality),
        bed.nic.faults('[rx]\nsegments = "wire"\n' + lost),
        tracing(bed) as flows,
    ):
        seen = exchange(bed, cases, capture_path)
        assert bed.nic.fault_rules() == {"lost": 2}
    seen.arrived()
    seen.kernel_offloads()
    whole, holed = flows[0], flows[1 << 32]
    assert whole.by_software == whole.mixed == whole.answers(personality) == []
    holed.answers(personality, BIG + RECORD_OVERHEAD)
    assert holed.records()[-30:] == holed.records(decrypted=1)[-30:]
    assert seen.nic["rx_tls_auth_fail"] == 0
    if personality != "ideal":
        assert seen.nic["rx_tls_lost_sync"] > 0
        assert holed.by_software + holed.mixed


DISTURBED, SETTLING, AFTERWARDS = 300_000, 256, 300  # bytes, records, records


@EACH
@pytest.mark.parametrize("record", [700, 4000, 16384])
@pytest.mark.conformance(41)
@pytest.mark.conformance(75)
@pytest.mark.conformance(81)
def test_back_within_256_records(bed: Bed, capture_path: Path, personality: str, record: int) -> None:
    """One segment in twenty is lost; when no more are, at most 256 records pass until the device has every one."""
    disturbed = -(-DISTURBED // record)
    stretches = [disturbed * record, SETTLING * record, AFTERWARDS * record]
    guest = [step for size in stretches for step in (WAIT, send(1), recv(size))]
    peer = [step for size in stretches for step in (recv(1), send(size, records=[record]))]
    cases = [
        Case(f"{cipher} {family}", [*guest, EOF], [*peer, SHUTDOWN], ("rx",), cipher, family, rec_seq=n << 32)
        for n, (cipher, family) in enumerate(zip(CIPHERS, "46", strict=True))
    ]

    def lossy(run: Running) -> None:
        run.guest_waits()
        with bed.nic.faults('seed = 3\n[rx]\nsegments = "wire"\ndrop = 0.05'):
            run.go_on()
            run.guest_waits()
        run.go_on()
        run.guest_waits()
        run.go_on()

    with rx_personality(bed, personality), tracing(bed) as flows:
        seen = exchange(bed, cases, capture_path, lossy)
    seen.arrived()
    seen.kernel_offloads()
    assert seen.nic["fault_dropped"] > 0
    for flow in flows.values():
        flow.answers(personality, record + RECORD_OVERHEAD)
        afterwards = flow.records()[-AFTERWARDS:]
        assert len(afterwards) == AFTERWARDS
        own = set(flow.records(decrypted=1))
        assert len(own.intersection(afterwards)) >= 0.99 * AFTERWARDS, seen.account("afterwards")


@EACH
@pytest.mark.conformance(74)
@pytest.mark.conformance(75)
def test_a_stream_without_pause(bed: Bed, capture_path: Path, personality: str) -> None:
    """Packets pass while question and answer are on their way: the device is back all the same, within 256 records."""
    lost, records, record = 50, 500, 4000
    steps = send(records * record, records=[record], writes=[1100], apart=True)
    cases = [
        rx_case(f"{personality} {cipher}", steps, size=records * record, cipher=cipher, rec_seq=n << 32)
        for n, cipher in enumerate(CIPHERS)
    ]
    with resyncing(bed, personality, desync(lost)) as flows:
        seen = exchange(bed, cases, capture_path)
    seen.arrived()
    seen.kernel_offloads()
    assert seen.nic["rx_tls_auth_fail"] == seen.nic["rx_tls_lost_sync"] == 0
    for flow in flows.values():
        flow.answers(personality, record + RECORD_OVERHEAD)
        assert lost <= max(flow.by_software) <= lost + 256, seen.account("stream")
        assert max(flow.mixed, default=0) <= lost + 256
