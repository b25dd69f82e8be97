"""Connections whose packets take another NIC than the one that offloads them: routes, rules, marks, and back.

What leaves by another device the kernel encrypts; the device that keeps the context finds its place again when packets
come back to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.bed import Bed
from testbed.setup import Assets
from tests.guest.conftest import assert_settled
from tests.guest.exchange import Running, exchange, tx_personality
from tests.guest.rounds import RECORDS_PER_ROUND, Rounds, echo_cases, offloaded_again
from tests.guest.twonics import received_by, sent_by, shell, two_nics

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

LOSSY = """
seed = 7
[tx]
segments = "wire"
drop = 0.02
"""
RULE = "ip rule add to 198.51.100.1 lookup 100", "ip -6 rule add to 2001:db8:1::1 lookup 100"
NO_RULE = "ip rule del lookup 100; ip -6 rule del lookup 100"
TABLE = (
    "ip route add 198.51.100.1/32 dev eth1 src 198.51.100.2 table 100",
    "ip -6 route add 2001:db8:1::1/128 dev eth1 src 2001:db8:1::2 table 100",
)


@pytest.fixture(scope="module")
def two(assets: Assets) -> Iterator[Bed]:
    with two_nics(assets, "test-topology") as bed:
        yield bed


@pytest.fixture
def bed(two: Bed) -> Iterator[Bed]:
    yield two
    assert_settled(two)
    assert two.others[0].contexts() == []


def other(bed: Bed) -> Counter[str]:
    """The second NIC's counters."""
    return Counter(bed.others[0].stats())


def check_cleanly_in_software(seen_other: Counter[str]) -> None:
    """What the second NIC saw was ordinary packets."""
    assert seen_other["tx_tls_packets"] == seen_other["rx_tls_packets"] == 0
    assert seen_other["ctx_tx_added"] == seen_other["ctx_rx_added"] == 0
    assert not any(count for name, count in seen_other.items() if name.startswith("tx_drop"))


@pytest.mark.conformance(83)
@pytest.mark.conformance(84)
@pytest.mark.conformance(127)
@pytest.mark.parametrize("personality", ["rebuild", "next-record"])
def test_the_route_changes_and_changes_back(bed: Bed, capture_path: Path, personality: str) -> None:
    """Sending by the other NIC, where packets are lost: software encrypts them, and what TCP repeats."""
    before = other(bed)

    def meanwhile(run: Running) -> None:
        rounds = Rounds(run)
        for _ in range(2):
            rounds.begin()
            with sent_by(bed, "eth1"), bed.others[0].faults(LOSSY):
                rounds.end()
                away = rounds.whole()
                assert away["tx_tls_packets"] == away["tx_tls_records"] == 0
                assert away["rx_tls_records"] >= 2 * RECORDS_PER_ROUND  # the other direction has not moved
                rounds.begin()
            rounds.end()
            assert rounds.whole()["tx_tls_records"] >= 2 * RECORDS_PER_ROUND
        run.go_on()

    with tx_personality(bed, personality):
        seen = exchange(bed, echo_cases("route", 10), capture_path, meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    assert seen.driver["tx_drop"] == seen.driver["tx_tls_device_drop"] == seen.driver["tx_tls_drop_bypass_req"] == 0
    moved = other(bed) - before
    assert moved["fault_dropped"] > 0
    check_cleanly_in_software(moved)


@pytest.mark.conformance(41)
@pytest.mark.conformance(60)
def test_both_directions_move_and_come_back(bed: Bed, capture_path: Path) -> None:
    """What arrives at the other NIC is decrypted in software; the first one finds its place when packets come again."""
    before = other(bed)

    def meanwhile(run: Running) -> None:
        rounds = Rounds(run)
        rounds.begin()
        with sent_by(bed, "eth1"), received_by(bed, "eth1"):
            rounds.end()
            here = bed.nic.stats()
            run.go_on()
            rounds.end()
            away = Counter(bed.nic.stats()) - Counter(here)
            tls = ("rx_tls_packets", "rx_tls_passed")  # a neighbour may ask for an address meanwhile
            assert away["tx_tls_packets"] == sum(away[name] for name in tls) == 0
            run.go_on()
        rounds.end()
        rounds.whole()
        assert offloaded_again(rounds), rounds.account()
        run.go_on()

    seen = exchange(bed, echo_cases("both", 7), capture_path, meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    moved = other(bed) - before
    assert moved["tx_packets"] > RECORDS_PER_ROUND
    assert moved["rx_packets"] > RECORDS_PER_ROUND
    check_cleanly_in_software(moved)


def test_a_rule_that_comes_and_goes_while_data_flows(bed: Bed, capture_path: Path) -> None:
    """Policy routing, back and forth many times within one stretch of data."""
    before = other(bed)

    def meanwhile(run: Running) -> None:
        rounds = Rounds(run)
        flip = f"{NO_RULE}; sleep 0.05; {'; '.join(RULE)}; sleep 0.05"
        shell(bed, *TABLE, *RULE)
        try:
            run.go_on()
            shell(bed, f"for i in 1 2 3 4 5 6 7 8; do {flip}; done")
        finally:
            shell(bed, NO_RULE, "ip route flush table 100; ip -6 route flush table 100")
        rounds.end()
        assert rounds.whole()["tx_tls_records"] >= 2 * RECORDS_PER_ROUND
        run.go_on()

    seen = exchange(bed, echo_cases("rule", 4), capture_path, meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    moved = other(bed) - before
    assert moved["tx_packets"] > 0
    check_cleanly_in_software(moved)
    assert seen.driver["tx_drop"] == seen.driver["tx_tls_device_drop"] == 0


@pytest.mark.conformance(28)
@pytest.mark.parametrize("personality", ["rebuild", "next-record"])
def test_every_other_packet_by_the_other_nic(bed: Bed, capture_path: Path, personality: str) -> None:
    """A mark that netfilter sets sends single packets of a stream elsewhere: to the driver a stream full of gaps."""
    before = other(bed)
    mark = "OUTPUT -t mangle -p tcp -m statistic --mode nth --every 2 --packet 0 -j MARK --set-mark 1"
    rule = "ip rule add fwmark 1 lookup 100; ip -6 rule add fwmark 1 lookup 100"
    shell(bed, *TABLE, rule)

    def meanwhile(run: Running) -> None:
        rounds = Rounds(run)
        rounds.begin()
        shell(bed, f"iptables -I {mark}; ip6tables -I {mark}")
        rounds.end()
        rounds.whole()
        shell(bed, f"iptables -D {mark}; ip6tables -D {mark}")
        rounds.whole()
        assert rounds.whole()["tx_tls_records"] >= 2 * RECORDS_PER_ROUND
        run.go_on()

    try:
        with tx_personality(bed, personality):
            seen = exchange(bed, echo_cases("marks", 6), capture_path, meanwhile)
    finally:
        shell(
            bed,
            NO_RULE,
            "ip route flush table 100; ip -6 route flush table 100; iptables -t mangle -F; ip6tables -t mangle -F",
        )
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    assert seen.driver["tx_tls_ooo"] > 50, seen.account("gaps")
    assert seen.driver["tx_drop"] == seen.driver["tx_tls_device_drop"] == 0
    moved = other(bed) - before
    assert moved["tx_packets"] > 50
    check_cleanly_in_software(moved)


def test_new_connections_are_offloaded_where_they_leave(bed: Bed, capture_path: Path) -> None:
    """Contexts of both NICs live at the same time, each of connections of its own."""

    def meanwhile(run: Running) -> None:
        rounds = Rounds(run)
        before = other(bed)
        with sent_by(bed, "eth1"), received_by(bed, "eth1"):
            new = exchange(bed, echo_cases("new", 1), capture_path.with_name("new.pcap"))
        new.arrived()
        new.wire_is_encrypted()
        assert new.tls_stat["TlsTxDevice"] == new.tls_stat["TlsRxDevice"] == 2
        moved = other(bed) - before
        assert moved["ctx_tx_added"] == moved["ctx_rx_added"] == 2
        assert moved["tx_tls_records"] >= 2 * RECORDS_PER_ROUND
        assert moved["rx_tls_records"] >= 2 * RECORDS_PER_ROUND
        assert offloaded_again(rounds)
        run.go_on()

    seen = exchange(bed, echo_cases("old", 3), capture_path, meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
