"""Questions and answers of rx resync that come late, twice or never, and sockets that are gone by then.

Software must always be right, the device must come back whatever happened, and never take an answer for another's.
In lockstep as in test_resync_rx.py, where the plain course of each personality is.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.bed import Bed
from tests.guest.cases import rx_flow
from tests.guest.conftest import wait_until
from tests.guest.exchange import (
    RECORD_OVERHEAD,
    WAIT,
    Case,
    Running,
    exchange,
    recv,
    rx_personality,
    send,
)
from tests.guest.resync_rx import (
    behind_case,
    consistent,
    desync,
    go_on_when_passed,
    lockstep,
    lockstep_case,
    lockstep_flows,
    resyncing,
    rule,
)

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

REQ, ASYNC, IDEAL = "driver-req", "driver-req-async", "ideal"
LOST = 10
# With the record that is lost, or (async: three records that prove a guess) two later, the kernel answers.
ANSWERED = {REQ: LOST, ASYNC: LOST + 2}


@pytest.mark.parametrize("late", [1, 5, 12, 20, 200])
@pytest.mark.parametrize("personality", [REQ, ASYNC])
@pytest.mark.conformance(74)
@pytest.mark.conformance(75)
def test_an_answer_that_is_late(bed: Bed, capture_path: Path, personality: str, late: int) -> None:
    """The device has counted the records since, and goes on with the right number."""
    cases = lockstep_flows(f"{personality} {late}", LOST + late + 20)
    faults = desync(LOST) + rule("delay-answer", records=late, count="all")
    with resyncing(bed, personality, faults) as flows:
        seen = exchange(bed, cases, capture_path)
    consistent(seen, flows)
    for flow in flows.values():
        assert flow.answers(personality) == [LOST]
        # it takes effect before the record that makes the delay full is looked at
        assert flow.by_software == list(range(LOST, ANSWERED[personality] + late))
    assert seen.nic["fault_answers_delayed"] == seen.nic["rx_tls_resynced"] == len(cases)


@pytest.mark.parametrize("late", [1, 5, 12, 14, 40])
@pytest.mark.conformance(67)
@pytest.mark.conformance(71)
@pytest.mark.conformance(72)
@pytest.mark.conformance(77)
def test_a_guess_that_is_late(bed: Bed, capture_path: Path, late: int) -> None:
    """The kernel has read the record long before it is named, but noted it, and counted the records since."""
    cases = lockstep_flows(f"guess {late}", 80)
    ends = [rule("delay-request", name=f"end {flow}", flow=flow, records=late, nth=2) for flow in (1, 2, 3)]
    faults = "".join([desync(LOST), *ends])
    with resyncing(bed, ASYNC, faults) as flows:
        seen = exchange(bed, cases, capture_path)
    consistent(seen, flows)
    assert seen.nic["fault_requests_delayed"] == seen.driver["rx_tls_resync_req_end"] == len(cases)
    for flow in flows.values():
        assert flow.answers(ASYNC) == [LOST]
        assert flow.by_software == list(range(LOST, LOST + 3 + late))


@pytest.mark.parametrize("late", [0, 40])
@pytest.mark.conformance(71)
@pytest.mark.conformance(72)
def test_more_records_than_the_kernel_notes(bed: Bed, capture_path: Path, late: int) -> None:
    """The attempt opens with a packet of twenty records: the kernel notes thirteen of them, and counts all."""
    size, together = 30, 20
    peer = [send(size * together, records=[size], writes=[1 << 16]), recv(1)] * 12
    case = rx_flow(f"twenty {late}", [recv(size * together), send(1)] * 12, peer, rec_seq=1 << 41)
    lost = 5 * together
    faults = desync(lost) + (rule("delay-request", records=late, nth=2) if late else "")
    with resyncing(bed, ASYNC, faults) as flows:
        seen = exchange(bed, [case], capture_path)
    consistent(seen, flows, size=size)
    (flow,) = flows.values()
    assert flow.answers(ASYNC, size + RECORD_OVERHEAD) == [lost]
    assert flow.by_software == list(range(lost, lost + 2 * together + late))


@pytest.mark.parametrize("personality", [REQ, ASYNC, IDEAL])
@pytest.mark.conformance(73)
@pytest.mark.conformance(74)
def test_a_host_that_is_behind(bed: Bed, capture_path: Path, personality: str) -> None:
    """The application reads nothing while 40 records arrive: asked about one the kernel has yet to come to."""
    waiting = 50
    case = behind_case(f"behind {personality}", waiting, waiting + 20, 1 << 34)
    meanwhile = go_on_when_passed(bed, waiting - LOST)
    with resyncing(bed, personality, desync(LOST)) as flows:
        seen = exchange(bed, [case], capture_path, meanwhile)
    consistent(seen, flows)
    (flow,) = flows.values()
    if personality == IDEAL:  # a second question, about the first record of the next round, confirms
        assert flow.by_software == [*range(LOST, waiting), waiting, waiting + 1]
        assert flow.answers(personality)[0] < waiting
        return
    assert flow.answers(personality) == [LOST]
    assert flow.by_software == list(range(LOST, waiting))


@pytest.mark.parametrize("personality", [REQ, ASYNC])
@pytest.mark.parametrize("what", ["lose-answer", "lose-request", "delay-request"])
@pytest.mark.conformance(76)
@pytest.mark.conformance(77)
def test_what_is_never_answered_is_asked_anew(bed: Bed, capture_path: Path, personality: str, what: str) -> None:
    """Lost, or asked about a record that the kernel has read: the device gives up after 256 records, and comes back."""
    records = 300
    case = lockstep_case(f"{what} {personality}", records, 1 << 36)
    how = {"records": 3} if what == "delay-request" else {}
    count = 2 if personality == ASYNC and what != "lose-answer" else 1  # start and end
    faults = desync(LOST) + rule(what, count=count, **how)
    with resyncing(bed, personality, faults) as flows:
        seen = exchange(bed, [case], capture_path)
    consistent(seen, flows)
    (flow,) = flows.values()
    *first, last = flow.answers(personality)
    assert first == ([LOST] if what == "lose-answer" else [])
    assert LOST + 256 <= last <= LOST + 258
    assert len(flow.by_software) == len(range(LOST, ANSWERED[personality] + 1)) + last - LOST
    assert seen.nic["rx_tls_resynced"] == 1


@pytest.mark.conformance(76)
def test_ideal_asks_again(bed: Bed, capture_path: Path) -> None:
    """An answer is lost: the next question comes long before a hundred records have passed."""
    case = lockstep_case("ideal again", 150, 1 << 37)
    faults = desync(LOST) + rule("lose-answer")
    with resyncing(bed, IDEAL, faults) as flows:
        seen = exchange(bed, [case], capture_path)
    consistent(seen, flows)
    (flow,) = flows.values()
    assert len(flow.answers(IDEAL)) == 3
    assert LOST < max(flow.by_software) < 110
    assert seen.nic["fault_answers_lost"] == seen.nic["rx_tls_resynced"] == 1


@pytest.mark.conformance(70)
@pytest.mark.conformance(105)
def test_an_attempt_that_starts_while_another_is_open(bed: Bed, capture_path: Path) -> None:
    """The end of the first one is lost: the driver cancels it when the device starts a second."""
    case = lockstep_case("second start", 300, 1 << 38)
    faults = desync(LOST) + rule("lose-request", nth=2)
    with resyncing(bed, ASYNC, faults) as flows:
        seen = exchange(bed, [case], capture_path)
    consistent(seen, flows)
    (flow,) = flows.values()
    assert len(flow.answers(ASYNC)) == 1
    counts = [seen.driver[f"rx_tls_resync_req_{what}"] for what in ("start", "end", "skip")]
    assert counts == [2, 1, 1]


@pytest.mark.parametrize("personality", [REQ, ASYNC, IDEAL])
@pytest.mark.conformance(13)
@pytest.mark.conformance(70)
@pytest.mark.conformance(101)
@pytest.mark.conformance(105)
def test_a_socket_that_closes_in_the_middle(bed: Bed, capture_path: Path, personality: str) -> None:
    """Closed with an answer on its way, or (async) an attempt without end: nothing of it meets the slot's next flow."""

    def case(seed: str, records: int, number: int) -> Case:
        guest, peer = lockstep(records)
        return rx_flow(seed, [*guest, WAIT], peer, rec_seq=number)

    slots: list[tuple[int, int]] = []

    def look(run: Running) -> None:
        run.guest_waits()
        slots.extend((context["slot"], context["generation"]) for context in bed.nic.contexts())
        run.go_on()

    faults = desync(LOST) + rule("delay-answer", records=5, count="all")
    with resyncing(bed, personality, faults) as closed:
        before = exchange(bed, [case("closes", LOST + 2, 1 << 39)], capture_path, look)
    with resyncing(bed, personality, "") as following:
        after = exchange(bed, [case("follows", 60, 2)], capture_path, look)
    consistent(before, closed)
    consistent(after, following)
    assert slots[0][0] == slots[1][0]
    assert slots[0][1] != slots[1][1]
    assert before.nic["rx_tls_resynced"] == after.nic["rx_tls_resynced"] == 0
    assert following[2].by_software == following[2].answers(personality) == []
    if personality == ASYNC:
        assert before.driver["rx_tls_resync_req_start"] == before.driver["rx_tls_resync_req_skip"] == 1
    else:
        assert before.nic["fault_answers_delayed"] == before.driver["rx_tls_resync_res_ok"] == 1


@pytest.mark.conformance(70)
@pytest.mark.conformance(105)
def test_a_device_that_never_ends_an_attempt(bed: Bed, capture_path: Path) -> None:
    """The kernel would complain about 65535 records in an attempt; as many wait when the application begins to read."""
    records = 70_000
    bed.agent.run(["sh", "-c", "echo 16777216 >/proc/sys/net/core/rmem_max"])
    peer = [send(records, records=[1], writes=[30_000])]
    roomy = {"options": {"SO_RCVBUF": 12 << 20}}
    case = rx_flow("endless", [WAIT, recv(records)], peer, guest_job=roomy)
    before = bed.nic.stats()["rx_bytes"]

    def meanwhile(run: Running) -> None:
        run.guest_waits()
        wait_until(
            lambda: bed.nic.stats()["rx_bytes"] - before > records * RECORD_OVERHEAD,
            "all that is sent has arrived",
        )
        run.go_on()

    faults = desync(1000) + rule("lose-request", nth=2, count="all")
    with rx_personality(bed, ASYNC), bed.nic.faults(faults):
        seen = exchange(bed, [case], capture_path, meanwhile)
    seen.arrived()
    seen.kernel_offloads()
    assert seen.nic["rx_tls_records"] < records / 2
    assert seen.nic["fault_requests_lost"] > 0
    assert seen.tls_stat["TlsRxDeviceResync"] == 0
    counts = [seen.driver[f"rx_tls_resync_req_{what}"] for what in ("start", "end", "skip")]
    assert counts == [1, 0, 1], seen.account("attempts")
    assert bed.guest.kernel_complaints() == []
