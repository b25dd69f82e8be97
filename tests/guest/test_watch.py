"""Every personality can be watched at work: a flow's history in the device and the kernel's tracepoints tell one story.

The fault director takes the place away, or a segment, by address: flow, record, part. In lockstep (resync_rx.py) each
event has one place among the records; what is lost from a stream is told in the order in which it happens. On the
device's side only `tlsnic-ctl history` is asked, on the kernel's side only its tracepoints and counters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nicdev.tls.history import MAX_EVENTS
from testbed.bed import Bed, running
from testbed.setup import prepare
from tests.guest.cases import rx_flow, tx_flow
from tests.guest.conftest import assert_settled
from tests.guest.exchange import (
    WAIT,
    Case,
    Running,
    Seen,
    disturbed,
    exchange,
    netem,
    recv,
    rx_personality,
    send,
    traced,
    tx_personality,
)
from tests.guest.resync_rx import LENGTH, SIZE, TracedFlow, consistent, desync, lockstep, rule, tracing

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

LOST, RECORDS = 10, 30
STREAM, MISSING = 600, 200  # records
WIRE = 1448  # bytes of a segment
MOST_BETWEEN_HINTS = 140  # records: twice as many each time up to 128, then that
FIRST = 7 << 32
PERSONALITIES = ("ideal", "driver-req", "driver-req-async", "core-next-hint")
Place = tuple[int, int]  # TCP sequence number, TLS record number


@pytest.fixture(scope="module")
def own_bed() -> Iterator[Bed]:
    """A device that drops here may not spoil the others' counters."""
    with running(prepare(), name="test-watch") as bed:
        yield bed


@pytest.fixture
def bed(own_bed: Bed) -> Iterator[Bed]:
    yield own_bed
    assert_settled(own_bed, drops=("tx_drop_wrong_seq",))


class History:
    """What the device tells about the one flow of a test."""

    def __init__(self, bed: Bed) -> None:
        self._bed = bed
        self.context: dict[str, Any] = {}

    def look(self, running: Running) -> None:
        """When the guest's connection waits; then it may go on."""
        running.guest_waits()
        (self.context,) = self._bed.nic.history()
        running.go_on()

    @property
    def kinds(self) -> list[str]:
        """The kinds of events, in order."""
        return [event["what"] for event in self.context["events"]]

    def of(self, *kinds: str) -> list[Place]:
        """The places of the events of these kinds."""
        return [(event["seq"], event["record"]) for event in self.context["events"] if event["what"] in kinds]


def place(start: int, record: int, first: int = FIRST) -> Place:
    """Where the flow's `record` starts, counted from its first, and its TLS record number."""
    return (start + record * LENGTH) % 2**32, first + record


def one_story(history: History, flow: TracedFlow, personality: str) -> None:
    """Answers, the way back and the records of either side are the same in device and kernel."""
    assert flow.first == FIRST
    said = [place(flow.start, record) for record in flow.answers(personality)]
    assert history.of("answer", "refused") == said
    context = history.context
    assert context["answered"] == len(history.of("answer"))
    assert context["requested"] == len(history.of("asked", "opened"))
    # a record of which some packets were marked counts where its last one went
    assert 0 <= context["records"] - len(flow.records(decrypted=1)) <= len(flow.mixed)
    assert context["records"] + context["records_software"] == len(flow.records())


@pytest.mark.conformance(68)
@pytest.mark.conformance(69)
@pytest.mark.conformance(73)
@pytest.mark.conformance(80)
@pytest.mark.conformance(102)
@pytest.mark.conformance(103)
@pytest.mark.conformance(104)
@pytest.mark.conformance(106)
@pytest.mark.parametrize("personality", PERSONALITIES)
def test_rx_place_forgotten(bed: Bed, capture_path: Path, personality: str) -> None:
    """The device forgets its place before record LOST; questions, answers and the way back agree record by record."""
    guest, peer = lockstep(RECORDS)
    case = rx_flow("watched", [*guest, WAIT], peer, rec_seq=FIRST)
    history = History(bed)
    with rx_personality(bed, personality), bed.nic.faults(desync(LOST)), tracing(bed) as flows:
        seen = exchange(bed, [case], capture_path, history.look)
    flow, driver = flows[FIRST], seen.driver
    consistent(seen, flows)
    one_story(history, flow, personality)
    assert history.of("forced") == [place(flow.start, LOST)]
    assert flow.by_software[0] == LOST
    assert history.of("in_sync") == [place(flow.start, flow.by_software[-1] + 1)]
    assert history.context["state"] == "in_sync"
    attempts, guesses = driver["rx_tls_resync_req_start"], driver["rx_tls_resync_req_end"]
    questions = driver["rx_tls_resync_req_pkt"] - attempts
    assert [history.kinds.count(kind) for kind in ("asked", "opened", "submitted")] == [questions, attempts, guesses]
    assert driver["rx_tls_resync_res_ok"] == history.kinds.count("answer")


@pytest.mark.conformance(61)
@pytest.mark.conformance(73)
@pytest.mark.conformance(106)
@pytest.mark.parametrize("personality", PERSONALITIES)
def test_rx_header_segment_lost(bed: Bed, capture_path: Path, personality: str) -> None:
    """In a stream, the wire-size segment with the header of record MISSING comes when TCP repeats it.

    A hint that meets a stream may be behind it (and the kernel takes longer and longer between two), so records in
    lockstep follow, more than it ever lets pass.
    """
    guest, peer = lockstep(MOST_BETWEEN_HINTS)
    behind = [send(STREAM * SIZE, records=[SIZE]), *peer]
    case = rx_flow("stream", [recv(STREAM * SIZE), *guest, WAIT], behind, rec_seq=FIRST)
    scenario = '[rx]\nsegments = "wire"\n' + rule("drop", direction="rx", record=MISSING, part="header")
    history = History(bed)
    with rx_personality(bed, personality), bed.nic.faults(scenario), tracing(bed) as flows:
        seen = exchange(bed, [case], capture_path, history.look)
    flow, driver = flows[FIRST], seen.driver
    seen.arrived()
    seen.kernel_offloads()
    assert seen.nic["fault_dropped"] == 1
    one_story(history, flow, personality)
    expected, record = history.of("gap" if personality == "ideal" else "lost")[0]
    assert 0 <= (place(flow.start, MISSING)[0] - expected) % 2**32 < WIRE
    assert 0 <= MISSING - (record - FIRST) <= 2
    assert (history.context["state"], history.context["losses"] > 0) == ("in_sync", personality != "ideal")
    assert driver["rx_tls_resync_res_ok"] == history.kinds.count("answer")
    assert driver["rx_tls_resync_res_skip"] == history.kinds.count("refused")
    assert len(flow.of("rx_resync_nh_schedule")) <= len(history.of("answer", "refused"))


def tx_case(name: str) -> Case:
    """The guest sends records of SIZE in two halves, and waits for the peer's word that they arrived.

    A place is agreed upon with the next record that is written, so there must be one.
    """
    half = STREAM // 2 * SIZE
    guest = [WAIT, *[send(half, write=SIZE), recv(1)] * 2, WAIT]
    return tx_flow(name, guest, [recv(half), send(1)] * 2, rec_seq=FIRST)


@dataclass
class TracedTx:
    """What the kernel traced about the one tx context of a test."""

    lines: list[str]

    def of(self, name: str) -> list[dict[str, int]]:
        """Fields of the events of one name."""
        found = [line for line in self.lines if f" tls_device_{name}: " in line]
        return [{key: int(value) for key, value in re.findall(r"(\w+)=(\d+)\b", line)} for line in found]

    @property
    def start(self) -> int:
        """TCP sequence number of the first record."""
        (added,) = self.of("offload_set")
        assert (added["direction"], added["ret"]) == (1, 0)
        return added["tcp_seq"]

    @property
    def agreed(self) -> list[Place]:
        """The records at which the device is to go on."""
        return [(event["tcp_seq"], event["rec_no"]) for event in self.of("tx_resync_send")]


def watched_tx(bed: Bed, name: str, capture_path: Path, disorder: Sequence[str] = ()) -> tuple[Seen, History, TracedTx]:
    """A transfer, what the device tells of it before the connection ends, and the kernel's trace."""
    history = History(bed)

    def meanwhile(running: Running) -> None:
        running.guest_waits()
        with disturbed(bed, disorder) if disorder else nullcontext():
            running.go_on()
            running.guest_waits()
        (history.context,) = bed.nic.history()
        running.go_on()

    with traced(bed, "tls:*") as lines:
        seen = exchange(bed, [tx_case(name)], capture_path, meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    trace = TracedTx(lines)
    assert all(at == place(trace.start, at[1] - FIRST) for at in history.of("rebuilt"))
    assert history.context["resyncs"] == seen.driver["tx_tls_resync"] == seen.nic["tx_tls_resync"]
    return seen, history, trace


@pytest.mark.conformance(45)
@pytest.mark.conformance(47)
def test_tx_rebuild(bed: Bed, capture_path: Path) -> None:
    """A segment is lost on the wire: what TCP repeats, and what follows it, comes with the start of its record."""
    scenario = '[tx]\nsegments = "wire"\n' + rule("drop", direction="tx", record=MISSING, part="header")
    with bed.nic.faults(scenario):
        seen, history, trace = watched_tx(bed, "rebuild", capture_path)
    assert seen.nic["fault_dropped"] == 1
    rebuilt = history.of("rebuilt")
    assert 0 <= MISSING - (rebuilt[0][1] - FIRST) <= 2
    assert len(rebuilt) == history.context["resyncs"]
    prefixes = [int(event["why"].split()[2]) for event in history.context["events"] if event["what"] == "rebuilt"]
    assert sum(prefixes) == seen.driver["tx_tls_resync_bytes"]
    assert not trace.of("tx_resync_req") + trace.of("tx_resync_send")  # the stack is asked for nothing


@pytest.mark.conformance(54)
def test_tx_next_record_place_forgotten(bed: Bed, capture_path: Path) -> None:
    """The device forgets its place and drops: the stack is asked, and names the record at which the device goes on."""
    with tx_personality(bed, "next-record"), bed.nic.faults(rule("desync", direction="tx", record=MISSING)):
        seen, history, trace = watched_tx(bed, "forgotten", capture_path)
    (forced,) = history.of("forced")
    assert 0 <= (forced[0] - place(trace.start, forced[1] - FIRST)[0]) % 2**32 < LENGTH
    assert forced[1] - FIRST >= MISSING
    assert history.of("dropped")[0][0] == forced[0]
    assert history.kinds.count("dropped") == seen.nic["tx_drop_wrong_seq"]
    assert set(history.of("rebuilt")) <= set(trace.agreed)
    assert history.of("rebuilt")[-1] == trace.agreed[-1]
    assert len(trace.of("tx_resync_req")) == len(trace.agreed) == seen.driver["tx_tls_resync_req"]


@pytest.mark.conformance(50)
@pytest.mark.conformance(51)
@pytest.mark.conformance(54)
def test_tx_next_record_lost_above_the_driver(bed: Bed, capture_path: Path) -> None:
    """Segments are lost between TCP and driver: each gap is asked about once, and ends at a record both sides name."""
    limit = ["ip", "link", "set", "dev", "eth0", "gso_max_segs"]
    bed.agent.run([*limit, "1"])
    try:
        with tx_personality(bed, "next-record"):
            seen, history, trace = watched_tx(bed, "above", capture_path, netem("loss 5%"))
    finally:
        bed.agent.run([*limit, "65535"])
    asked = trace.of("tx_resync_req")
    assert asked
    assert all(0 < (event["tcp_seq"] - event["exp_tcp_seq"]) % 2**32 < STREAM * LENGTH for event in asked)
    assert len(asked) == seen.driver["tx_tls_resync_req"]
    assert len(asked) - len(trace.agreed) in (0, 1)  # no record may follow the last gap
    assert history.kinds.count("dropped") == 0
    assert set(history.of("rebuilt")) <= set(trace.agreed)
    assert len(history.of("rebuilt")) == min(history.context["resyncs"], MAX_EVENTS)
