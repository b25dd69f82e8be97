"""What the NIC can do is measured (`make bench ARGS="--only capacity"`), and too much of it harms nobody else."""

from __future__ import annotations

import re

import pytest

from bench.guest_capacity import RECORDS, SEGMENTS, figures
from bench.registry import Session
from testbed.bed import WIRE4, Bed
from tests.guest.conftest import wait_until
from tests.guest.exchange import BOTH, exchanging, rx_case, send, tx_case

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

LARGE = 64 << 20
PINGS = 100


@pytest.mark.conformance(93)
@pytest.mark.conformance(94)
@pytest.mark.conformance(96)
def test_the_benchmark_tells_what_the_nic_can_do(bed: Bed) -> None:
    """Contexts, installation and throughput, for each direction and over sizes; offload is proven on the way."""
    measured = {figure.name: figure for figure in figures(Session(smoke=True), bed)}
    assert measured["contexts_max"].value == bed.nic.ask("info")["max_contexts"]
    names = {f"{direction}_install_{what}" for direction in BOTH for what in ("rate", "latency")}
    names |= {
        f"{direction}_throughput_{record}_byte_records_{segments}_packets"
        for direction in BOTH
        for record in RECORDS
        for segments in SEGMENTS
    }
    assert set(measured) == {"contexts_max", *names}
    assert all(min(figure.samples) > 0 for figure in measured.values())


@pytest.mark.conformance(97)
def test_other_packets_get_through_beside_as_much_tls_as_there_can_be(bed: Bed) -> None:
    """Eight connections keep the device's one processor busy; of small packets beside them hardly any is lost."""
    busy = [tx_case(f"busy out {number}", send(LARGE), size=LARGE) for number in range(4)]
    busy += [rx_case(f"busy in {number}", send(LARGE), size=LARGE) for number in range(4)]

    def moved(names: tuple[str, ...], since: dict[str, int]) -> bool:
        now = bed.nic.stats()
        return all(now[name] > since[name] for name in names)

    both = ("tx_tls_packets", "rx_tls_packets")
    with exchanging(bed, busy):
        wait_until(lambda: len(bed.nic.contexts()) == len(busy), "all are there")
        before = bed.nic.stats()
        wait_until(lambda: moved(both, before), "records move both ways")
        before = bed.nic.stats()
        said = bed.agent.run(["ping", "-q", "-c", str(PINGS), "-i", "0.002", "-W", "10", WIRE4], timeout=60).text
        assert moved(both, before)
    found = re.search(r"(\d+) packets transmitted, (\d+) received", said)
    assert found, said
    sent, received = map(int, found.groups())
    assert sent == PINGS
    assert received >= 0.99 * PINGS
