"""How each rx personality finds its place again, and what kernel, driver and device say of it.

The helper's text (resync_rx.py) explains lockstep. Every flow forgets its place before record LOST.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.bed import QUEUES, Bed
from tests.guest.cases import install, rx_flow
from tests.guest.exchange import ASK, ASKED, EOF, SHUTDOWN, WAIT, Case, Running, exchange, rx_case, rx_personality, send
from tests.guest.resync_rx import (
    LENGTH,
    SIZE,
    consistent,
    desync,
    lockstep,
    lockstep_case,
    lockstep_flows,
    resyncing,
    rule,
)

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

LOST, RECORDS = 10, 30
# Which records the kernel has to decrypt, and of which it tells the device.
#   driver-req        asks with the record that it cannot read, and is told before the next one comes
#   driver-req-async  opens an attempt with it, submits it with the third, and is told with that one
#   core-next-hint    is told of the next record after three that the kernel decrypted, the first of which only
#                     starts the count
#   ideal             asks about the next header it foresees; the first answer is a place to verify from, and the
#                     second, to a question about the record after that, one to mark from
COURSE = {
    "driver-req": ([10], [10]),
    "driver-req-async": ([10, 11, 12], [10]),
    "core-next-hint": ([10, 11, 12], [13]),
    "ideal": ([10, 11, 12, 13], [11, 12]),
}
# Driver's counters per flow: packets with a question, attempts
QUESTIONS = {"driver-req": (1, 0), "driver-req-async": (1, 1), "core-next-hint": (0, 0), "ideal": (2, 0)}
EACH = pytest.mark.parametrize("personality", COURSE)


@EACH
@pytest.mark.conformance(10)
@pytest.mark.conformance(11)
@pytest.mark.conformance(15)
@pytest.mark.conformance(43)
@pytest.mark.conformance(66)
@pytest.mark.conformance(68)
@pytest.mark.conformance(69)
@pytest.mark.conformance(73)
@pytest.mark.conformance(75)
@pytest.mark.conformance(78)
@pytest.mark.conformance(79)
@pytest.mark.conformance(102)
@pytest.mark.conformance(103)
@pytest.mark.conformance(104)
@pytest.mark.conformance(105)
@pytest.mark.conformance(106)
def test_a_lost_place_is_found(bed: Bed, capture_path: Path, personality: str) -> None:
    """IPv4, IPv6 and IPv4-mapped at once: each flow gets answers about its own records and goes on exactly there."""
    cases = lockstep_flows(personality, RECORDS)
    with resyncing(bed, personality, desync(LOST)) as flows:
        seen = exchange(bed, cases, capture_path)
    consistent(seen, flows)
    by_software, answers = COURSE[personality]
    for case in cases:
        assert flows[case.rec_seq].by_software == by_software, case.seed
        assert flows[case.rec_seq].answers(personality) == answers, case.seed
        assert len(flows[case.rec_seq].records(decrypted=1)) == RECORDS - len(by_software), case.seed
    packets, attempts = (len(cases) * n for n in QUESTIONS[personality])
    driver, nic = seen.driver, seen.nic
    assert driver["rx_tls_resync_req_pkt"] == nic["rx_tls_asked"] + nic["rx_tls_resync_started"] == packets
    assert driver["rx_tls_resync_req_start"] == nic["rx_tls_resync_started"] == attempts
    assert driver["rx_tls_resync_req_end"] == nic["rx_tls_resync_guessed"] == attempts
    assert nic["fault_desynced"] == nic["rx_tls_resynced"] == len(cases)
    assert bed.ethtool()["rx_tls_ctx"] - bed.ethtool()["rx_tls_del"] == 0


@pytest.mark.conformance(78)
def test_the_personality_changes_under_live_contexts(bed: Bed, capture_path: Path) -> None:
    """A context keeps the way of the time when it was made; four of different times find their places side by side."""
    cases = []
    for n, personality in enumerate(COURSE):
        guest, peer = lockstep(RECORDS)
        waits = [*[WAIT] * (n + 1), install("rx"), *[WAIT] * (len(COURSE) - n)]
        cases.append(Case(personality, [*waits, ASK, *guest, EOF], [ASKED, *peer, SHUTDOWN], ("rx",), rec_seq=n << 20))

    def change(run: Running) -> None:
        run.guest_waits()
        for personality in COURSE:
            with rx_personality(bed, personality):
                run.go_on()
                run.guest_waits()
        run.go_on()

    with resyncing(bed, "ideal", desync(LOST)) as flows:
        seen = exchange(bed, cases, capture_path, change)
    consistent(seen, flows)
    for case in cases:
        assert (flows[case.rec_seq].by_software, flows[case.rec_seq].answers(case.seed)) == COURSE[case.seed]


@pytest.mark.conformance(102)
@pytest.mark.parametrize("personality", ["driver-req", "driver-req-async"])
def test_questions_through_every_queue(bed: Bed, capture_path: Path, personality: str) -> None:
    """Sixteen flows spread over both queues; answers leave by one of them.

    So the answer of a flow on the other one may be overtaken by the request for the next record, which is then left
    to software as well.
    """
    cases = [lockstep_case(f"{personality} {n}", RECORDS, n << 20) for n in range(16)]
    before = bed.ethtool()
    with resyncing(bed, personality, desync(LOST), QUEUES) as flows:
        seen = exchange(bed, cases, capture_path)
    consistent(seen, flows)
    by_software, answers = COURSE[personality]
    overtaken = [*by_software, by_software[-1] + 1]
    for flow in flows.values():
        assert flow.by_software in (by_software, overtaken)
        assert flow.answers(personality) == answers
    assert sum(flow.by_software == overtaken for flow in flows.values()) <= len(flows) // 4
    after = bed.ethtool()
    assert min(after[f"rx{queue}_packets"] - before[f"rx{queue}_packets"] for queue in (0, 1)) >= RECORDS


@pytest.mark.conformance(8)
@pytest.mark.conformance(42)
@EACH
def test_a_socket_without_context_asks_for_nothing(bed: Bed, capture_path: Path, personality: str) -> None:
    """The table is full: software decrypts, segments are lost, and nobody talks of resync."""
    size = 400 * SIZE
    how = {"records": [SIZE], "writes": [LENGTH], "apart": True}
    scenario = rule("refuse-add", direction="rx", status="table-full")
    alone = rx_case("refused", send(size, **how), size=size)
    loss = '\n[rx]\nsegments = "wire"\ndrop = 0.02\n'
    with rx_personality(bed, personality), bed.nic.faults(loss + scenario):
        seen = exchange(bed, [alone], capture_path)
    seen.arrived()
    assert seen.guest[0]["rxconf"] == "sw"
    assert seen.nic["fault_dropped"] > 0
    assert seen.tls_stat["TlsRxDeviceResync"] == 0
    assert {name: n for name, n in (seen.driver + seen.nic).items() if n and "rx_tls" in name} == {}


@EACH
@pytest.mark.conformance(5)
@pytest.mark.conformance(40)
@pytest.mark.conformance(60)
@pytest.mark.conformance(90)
def test_a_verdict_that_is_withheld(bed: Bed, capture_path: Path, personality: str) -> None:
    """One of a record's packets is handed over as on the wire: the kernel mends the record, nothing is asked."""
    half = LENGTH // 2 + 1
    case = rx_flow("withheld", *lockstep(RECORDS, writes=[half], apart=True), rec_seq=1 << 40)
    scenario = rule("withhold-verdict", name="first", record=4) + rule("withhold-verdict", record=8, nth=2)
    with resyncing(bed, personality, scenario) as flows:
        seen = exchange(bed, [case], capture_path)
    seen.arrived()
    seen.kernel_offloads()
    assert seen.nic["fault_verdicts"] == 2
    assert flows[case.rec_seq].mixed == [4, 8]
    assert flows[case.rec_seq].by_software == []
    assert seen.tls_stat["TlsRxDeviceResync"] == seen.driver["rx_tls_resync_req_pkt"] == 0
