"""Everything a guest's configuration may put between a socket and its NIC, or make of a packet before it is there.

Packets are paced, delayed, copied, redirected, translated, turned around. What cannot be encrypted any more because its
socket is lost is dropped, by the kernel or by the driver, and never leaves as it is: TCP repeats it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from testbed.bed import WIRE4, Bed, configure_guest
from testbed.setup import Assets
from tests.guest.bpf import XDP, load, op
from tests.guest.cases import both_ways
from tests.guest.conftest import assert_settled, wait_until
from tests.guest.exchange import Running, Seen, exchange
from tests.guest.rounds import Rounds, echo_cases, offloaded_again
from tests.guest.twonics import shell, two_nics

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

SIZE = 500_000
KERNEL_DROPS = "unencrypted skb with no associated socket - dropping"  # sk_validate_xmit_skb
WIRE_SEGMENTS = """
seed = 1
[rx]
segments = "wire"
"""
NO_QDISC = "tc qdisc del dev eth0 root"
NO_FILTER = "tc qdisc del dev eth0 clsact"


@pytest.fixture(scope="module")
def two(assets: Assets) -> Iterator[Bed]:
    with two_nics(assets, "test-egress") as bed:
        yield bed


@pytest.fixture
def bed(two: Bed) -> Iterator[Bed]:
    yield two
    assert_settled(two)


@contextmanager
def configured(bed: Bed, begin: str, end: str) -> Iterator[None]:
    """Two lines of shell, before and after."""
    try:
        shell(bed, begin)
        yield
    finally:
        shell(bed, end)


def filtered(where: str, action: str) -> str:
    """The command that makes `tc` do something to every packet."""
    return f"tc qdisc add dev eth0 clsact && tc filter add dev eth0 {where} matchall action {action}"


def check_nothing_leaked(seen: Seen) -> None:
    """All data arrived, the wire saw records only, software was never asked to encrypt or decrypt for good."""
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()


QDISCS = {
    "fq": "fq",
    "paced": "fq maxrate 150mbit",
    "tbf": "tbf rate 150mbit burst 100k limit 10m",
    "fair": "sfq perturb 1",
    "codel": "fq_codel quantum 300 limit 1000",
}


@pytest.mark.parametrize("name", QDISCS)
def test_pacing_and_fair_queueing(bed: Bed, capture_path: Path, name: str) -> None:
    """They come and go under live connections; a packet that a queue held is in order when it leaves."""

    def meanwhile(run: Running) -> None:
        rounds = Rounds(run)
        rounds.begin()
        with configured(bed, f"tc qdisc replace dev eth0 root {QDISCS[name]}", NO_QDISC):
            rounds.end()
            assert offloaded_again(rounds), rounds.account()
            rounds.begin()
        rounds.end()
        run.go_on()

    seen = exchange(bed, echo_cases(f"qdisc {name}", 5), capture_path, meanwhile)
    check_nothing_leaked(seen)
    assert seen.driver["tx_tls_fallback"] == seen.driver["tx_drop"] == seen.driver["tx_tls_device_drop"] == 0


def through_a_hole(bed: Bed, capture_path: Path, begin: str, end: str, lost: Callable[[], bool]) -> Seen:
    """Connections under which something is configured that loses their packets, until `lost`."""

    def meanwhile(run: Running) -> None:
        rounds = Rounds(run)
        with configured(bed, begin, end):
            run.go_on()
            wait_until(lost, "packets are lost")
        rounds.end()
        rounds.whole()
        assert offloaded_again(rounds), rounds.account()
        run.go_on()

    seen = exchange(bed, echo_cases(begin, 5), capture_path, meanwhile)
    check_nothing_leaked(seen)
    return seen


def kernel_drops(bed: Bed) -> Callable[[], bool]:
    """Whether since now the kernel has said that it dropped a packet with plaintext."""
    before = bed.guest.agent.kernel_log().count(KERNEL_DROPS)
    return lambda: bed.guest.agent.kernel_log().count(KERNEL_DROPS) > before


@pytest.mark.conformance(85)
def test_packets_that_lose_their_socket_in_a_queue(bed: Bed, capture_path: Path) -> None:
    """The kernel takes the socket from what netem delays: no one can encrypt it then."""
    delay = "tc qdisc replace dev eth0 root netem delay 3ms"
    through_a_hole(bed, capture_path, delay, NO_QDISC, kernel_drops(bed))


@pytest.mark.conformance(85)
def test_packets_that_are_redirected_lose_their_socket(bed: Bed, capture_path: Path) -> None:
    """To the other NIC, which knows nothing of them, and would send them."""
    action = filtered("egress", "mirred egress redirect dev eth1")
    through_a_hole(bed, capture_path, action, NO_FILTER, kernel_drops(bed))


@pytest.mark.conformance(85)
def test_copies_of_packets_do_not_leave(bed: Bed, capture_path: Path) -> None:
    """Mirrored to the other NIC: the originals are encrypted, the copies of those with data are dropped."""
    before = bed.others[0].stats()
    with configured(bed, filtered("egress", "mirred egress mirror dev eth1"), NO_FILTER):
        seen = exchange(bed, echo_cases("mirror", 1), capture_path)
    check_nothing_leaked(seen)
    after = bed.others[0].stats()
    assert after["tx_packets"] > before["tx_packets"]  # acknowledgements have nothing to hide
    assert after["tx_bytes"] - before["tx_bytes"] < 200 * (after["tx_packets"] - before["tx_packets"])


def test_connection_tracking_by_tc(bed: Bed, capture_path: Path) -> None:
    begin = f"{filtered('egress', 'ct')} && tc filter add dev eth0 ingress matchall action ct"
    with configured(bed, begin, NO_FILTER):
        exchange(bed, echo_cases("act_ct", 1), capture_path).offloaded()


SOURCE_NAT = (
    "iptables -t nat -A POSTROUTING -p tcp -j SNAT --to-source 198.51.100.2:20000-20999;"
    "ip6tables -t nat -A POSTROUTING -p tcp -j SNAT --to-source [2001:db8:1::2]:20000-20999"
)
NO_NAT = "iptables -t nat -F; ip6tables -t nat -F"


def check_translated(seen: Seen) -> None:
    """tx is the device's, by the context's handle; rx, which it cannot recognise, is the software's, and no error."""
    check_nothing_leaked(seen)
    sent = sum(stream.bytes for stream in seen.streams("tx"))
    assert seen.nic["tx_tls_bytes"] >= sent
    assert seen.driver["tx_tls_fallback"] == seen.driver["tx_drop"] == 0
    assert seen.nic["rx_tls_packets"] == seen.nic["rx_tls_records"] == seen.nic["rx_tls_auth_fail"] == 0
    assert seen.tls_stat["TlsDecryptError"] == 0


@pytest.mark.conformance(28)
@pytest.mark.conformance(118)
@pytest.mark.conformance(119)
def test_source_nat(bed: Bed, capture_path: Path) -> None:
    """On the wire the guest's port is another."""
    with configured(bed, SOURCE_NAT, NO_NAT):
        seen = exchange(bed, echo_cases("source", 1), capture_path)
    check_translated(seen)
    for wire, guest in zip(seen.wires, seen.guest, strict=True):
        assert 20000 <= wire["tx"].source.port < 21000
        assert guest["local"][1] != wire["tx"].source.port


@pytest.mark.conformance(28)
@pytest.mark.conformance(118)
@pytest.mark.conformance(119)
def test_destination_nat(bed: Bed, capture_path: Path) -> None:
    """The guest speaks to an address and a port that do not exist on the wire."""
    case = both_ways(
        "destination",
        SIZE,
        guest_job={"connect": ["198.51.100.99", 443]},
        peer_job={"listen": [WIRE4, 7400]},
    )
    nat = f"iptables -t nat -A OUTPUT -d 198.51.100.99 -p tcp --dport 443 -j DNAT --to-destination {WIRE4}:7400"
    with configured(bed, nat, NO_NAT):
        seen = exchange(bed, [case], capture_path)
    check_translated(seen)
    assert seen.guest[0]["remote"] == ["198.51.100.99", 443]


def test_arriving_packets_by_way_of_a_virtual_device(bed: Bed, capture_path: Path) -> None:
    """What the device decrypted and the kernel redirects loses its mark or is lost: in either case TCP repeats it."""
    begin = (
        f"ip link add ifb7 type ifb && ip link set ifb7 up && {filtered('ingress', 'mirred egress redirect dev ifb7')}"
    )
    through_a_hole(bed, capture_path, begin, f"{NO_FILTER}; ip link del ifb7", kernel_drops(bed))


def turn_around(bed: Bed) -> str:
    """An XDP program that sends back what arrives, if it is large; returns its path."""
    return load(
        bed,
        XDP,
        op(0x61, 0x12, 4, 0),  # r2 = data_end
        op(0x61, 0x13, 0, 0),  # r3 = data
        op(0xB7, 0x00, 0, 2),  # r0 = XDP_PASS
        op(0xBF, 0x34, 0, 0),  # r4 = r3
        op(0x07, 0x04, 0, 500),  # r4 += 500
        op(0x2D, 0x24, 9, 0),  # if r4 > r2 goto exit
        op(0x61, 0x35, 0, 0),  # swap the Ethernet addresses
        op(0x69, 0x36, 4, 0),
        op(0x61, 0x37, 6, 0),
        op(0x69, 0x38, 10, 0),
        op(0x63, 0x73, 0, 0),
        op(0x6B, 0x83, 4, 0),
        op(0x63, 0x53, 6, 0),
        op(0x6B, 0x63, 10, 0),
        op(0xB7, 0x00, 0, 3),  # r0 = XDP_TX
        op(0x95, 0x00, 0, 0),
        name="turn",
    )


@pytest.mark.conformance(85)
def test_what_was_decrypted_is_not_sent_back(bed: Bed, capture_path: Path) -> None:
    """XDP hands the driver what it received a moment ago; no one in the kernel looks whether it is plaintext."""
    path = turn_around(bed)
    before = bed.ethtool()["tx_drop"]
    with bed.nic.faults(WIRE_SEGMENTS):  # as packets that could leave as they are
        seen = through_a_hole(
            bed,
            capture_path,
            f"ethtool -K eth0 gro off && ip link set dev eth0 xdpgeneric pinned {path}",
            f"ip link set dev eth0 xdpgeneric off; ethtool -K eth0 gro on; rm {path}",
            lambda: bed.ethtool()["tx_drop"] > before,
        )
    assert seen.driver["tx_drop"] > 0


def test_the_interface_moves_to_another_namespace_and_back(bed: Bed, capture_path: Path) -> None:
    """Live sockets stay behind, in software for good; they go on when there is an interface again."""

    def meanwhile(run: Running) -> None:
        rounds = Rounds(run)
        rounds.begin()
        shell(bed, "ip netns add away && ip link set eth0 netns away && ip -n away link set eth0 up")
        wait_until(lambda: not bed.nic.contexts(), "contexts are gone")
        shell(bed, "ip -n away link set eth0 netns 1 && ip netns del away")
        configure_guest(bed.agent)
        shell(bed, "sysctl -qw net.ipv6.conf.eth0.keep_addr_on_down=1")
        rounds.end()
        whole = rounds.whole()
        assert whole["tx_tls_records"] == whole["rx_tls_records"] == 0
        run.go_on()

    seen = exchange(bed, echo_cases("namespace", 4), capture_path, meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    exchange(bed, echo_cases("afterwards", 1), capture_path.with_name("new.pcap")).offloaded()
