"""Devices on top of a NIC: macvlan, ipvlan, VLAN, tunnels. New connections through them are not offloaded; what the
route of a live one leads there arrives encrypted once, or not at all.

The core encrypts at every device on the way that is not the context's own: by two of them, it is not encrypted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.bed import GUEST4, WIRE4, Bed
from testbed.setup import Assets
from testbed.wire.namespace import Wire
from tests.guest.conftest import assert_settled, wait_until
from tests.guest.exchange import (
    CIPHERS,
    EOF,
    SHUTDOWN,
    WAIT,
    Case,
    Running,
    exchange,
    recv,
    send,
    tx_personality,
)
from tests.guest.twonics import WIRE_MAC, shell, two_nics

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

SIZE = 300_000
UPPER = {
    "macvlan": "ip link add top link {lower} type macvlan mode bridge",
    "ipvlan": "ip link add top link {lower} type ipvlan mode l2",
    "vlan": "ip link add top link {lower} type vlan id 7",
    "tunnel": "ip link add top type vxlan id 7 local 2001:db8:1::2 remote 2001:db8:1::1 dstport 4789 dev {lower}",
}
NOBODY = "02:00:00:00:00:09"
TUNNEL_END = f"ip link add top address {WIRE_MAC} type vxlan id 7 local 2001:db8:1::1 remote 2001:db8:1::2 dstport 4789"


@pytest.fixture(scope="module")
def two(assets: Assets) -> Iterator[Bed]:
    with two_nics(assets, "test-stacked") as bed:
        yield bed


@pytest.fixture
def bed(two: Bed) -> Iterator[Bed]:
    yield two
    assert_settled(two)


def stretches(name: str, count: int) -> list[Case]:
    """Data in pieces that the peer answers, so that each has arrived when the next may begin."""
    guest, peer = [send(SIZE, write=5000), recv(1)], [recv(SIZE), send(1)]
    return [
        Case(
            f"{name} {cipher}",
            [*guest, *[WAIT, *guest] * (count - 1), SHUTDOWN, EOF],
            [*peer * count, EOF, SHUTDOWN],
            dirs=("tx",),
            cipher=cipher,
        )
        for cipher in CIPHERS
    ]


@contextmanager
def led_by(bed: Bed, upper: str, lower: str, to: str = WIRE_MAC) -> Iterator[None]:
    """An upper device on a lower one, and the guest's route; to the wire's interface, or to a MAC address of nobody."""
    try:
        shell(
            bed,
            UPPER[upper].format(lower=lower),
            f"ip link set top up && ip route add {WIRE4}/32 dev top src {GUEST4}",
            f"ip neigh replace {WIRE4} lladdr {to} dev top nud permanent",
        )
        yield
    finally:
        shell(bed, "ip link del top")


@pytest.mark.conformance(83)
@pytest.mark.conformance(85)
@pytest.mark.parametrize("personality", ["rebuild", "next-record"])
@pytest.mark.parametrize("lower", ["eth0", "eth1"])
@pytest.mark.parametrize("upper", ["macvlan", "ipvlan"])
def test_a_route_over_two_devices(bed: Bed, capture_path: Path, upper: str, lower: str, personality: str) -> None:
    """The upper device stands on the context's own NIC, or on the other one."""

    def meanwhile(run: Running) -> None:
        run.guest_waits()
        with led_by(bed, upper, lower):
            run.go_on()
            run.guest_waits()
        run.go_on()
        run.guest_waits()  # with next-record, this is where stack and device agree again
        before = bed.nic.stats()["tx_tls_bytes"]
        run.go_on()
        run.guest_waits()
        assert bed.nic.stats()["tx_tls_bytes"] >= before + SIZE
        run.go_on()

    with tx_personality(bed, personality):
        seen = exchange(bed, stretches(f"{upper} {lower}", 5), capture_path, meanwhile)
    seen.wire_is_encrypted()
    seen.arrived()
    seen.kernel_offloads()
    assert seen.driver["tx_drop"] == seen.driver["tx_tls_device_drop"] == 0


@pytest.mark.conformance(85)
@pytest.mark.parametrize("upper", ["macvlan", "ipvlan"])
def test_a_route_over_two_devices_after_the_own_one_was_down(bed: Bed, capture_path: Path, upper: str) -> None:
    """Its sockets are the software's then, at each device anew."""

    def meanwhile(run: Running) -> None:
        run.guest_waits()
        shell(bed, "ip link set eth0 down && ip link set eth0 up")
        run.go_on()
        run.guest_waits()
        with led_by(bed, upper, "eth0"):
            run.go_on()
            run.guest_waits()
        run.go_on()

    seen = exchange(bed, stretches(f"down {upper}", 4), capture_path, meanwhile)
    seen.wire_is_encrypted()
    seen.arrived()
    assert seen.driver["tx_drop"] == 0


def timeouts(bed: Bed) -> int:
    """TCP's retransmission timeouts in the guest."""
    return int(json.loads(bed.agent.run(["nstat", "-aszj", "TcpExtTCPTimeouts"]).text)["kernel"]["TcpExtTCPTimeouts"])


@pytest.mark.conformance(85)
@pytest.mark.parametrize("upper", ["vlan", "tunnel"])
def test_a_route_that_leads_nowhere(bed: Bed, capture_path: Path, upper: str) -> None:
    """The wire does not know the tag or the tunnel; what is seen of it there is encrypted. TCP goes on afterwards."""

    def meanwhile(run: Running) -> None:
        run.guest_waits()
        before = timeouts(bed)
        with led_by(bed, upper, "eth0", NOBODY):
            run.go_on()
            wait_until(lambda: timeouts(bed) > before + 2, "TCP repeats in vain")
        run.guest_waits()
        run.go_on()

    seen = exchange(bed, stretches(f"nowhere {upper}", 3), capture_path, meanwhile)
    seen.wire_is_encrypted()
    seen.arrived()
    seen.kernel_offloads()
    assert (seen.driver["tx_drop"] > 0) is (upper == "tunnel")


@pytest.mark.conformance(117)
@pytest.mark.parametrize("upper", ["macvlan", "ipvlan", "tunnel"])
def test_new_connections_through_virtual_devices_are_the_softwares(bed: Bed, capture_path: Path, upper: str) -> None:
    was, where = bed.nic.stats(), bed
    if upper == "tunnel":
        begin = f"ip link set top up; ip route add {GUEST4}/32 dev top src {WIRE4}"
        bed.wire.run(["sh", "-ec", f"{TUNNEL_END}; {begin}"])
        where = replace(bed, wire=Wire(bed.wire.pid, "top"))
    try:
        with led_by(bed, upper, "eth0"):
            seen = exchange(where, stretches(f"new {upper}", 1), capture_path)
    finally:
        if upper == "tunnel":
            bed.wire.run(["ip", "link", "del", "top"])
    assert seen.tls_stat["TlsTxSw"] == 2
    assert seen.tls_stat["TlsTxDevice"] == 0
    now = bed.nic.stats()
    assert now["ctx_tx_added"] == was["ctx_tx_added"]
    assert now["tx_tls_packets"] == was["tx_tls_packets"]
    seen.arrived()
    seen.wire_is_encrypted()
