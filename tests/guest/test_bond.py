"""802.3ad: a bond of two of our NICs, a leg that fails in the middle of a transfer, and one that comes back.

The kernel offers offload on a bond that picks the leg by the connection (bond_sk_check): the context belongs to that
leg's NIC, and every packet of the connection goes to it (bond_tls_device_xmit) for as long as its interface is up.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from testbed.bed import GUEST4, GUEST6, Bed
from testbed.nic import NicProcess
from testbed.setup import Assets
from tests.guest.conftest import assert_settled, wait_until
from tests.guest.exchange import Case, Running, exchange, recv, send
from tests.guest.rounds import RECORDS_PER_ROUND, Rounds, echo_cases
from tests.guest.twonics import shell, two_nics

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

BOND = "bond7"  # bond0 is there as soon as the module is
LEGS = ("eth0", "eth1")
LAYERS = "mode 802.3ad xmit_hash_policy layer3+4 lacp_rate fast miimon 50"
DISTRIBUTING = 0x20  # IEEE 802.1AX, LACP actor state; linux/if_bonding.h LACP_STATE_DISTRIBUTING
LEAVE_ROUTES = "ip addr flush dev eth0"
CONNECTIONS = 16
SIZE = 50_000


def make_bond(bed: Bed, how: str) -> None:
    shell(bed, LEAVE_ROUTES, f"ip link add {BOND} type bond {how}")
    for leg in LEGS:
        # a leg of 802.3ad has a speed and is full duplex (ad_port_selection_logic); ours has what it is told
        shell(bed, f"ethtool -s {leg} speed 25000 duplex full")
        shell(bed, f"ip link set {leg} down && ip link set {leg} master {BOND}")
    shell(
        bed,
        f"sysctl -qw net.ipv6.conf.{BOND}.accept_dad=0 && ip link set {BOND} up",
        f"ip addr add {GUEST4}/24 dev {BOND} && ip -6 addr add {GUEST6}/64 dev {BOND} nodad",
    )


def ports_in_use(bed: Bed) -> int:
    """Legs that both ends have agreed to use, and that distribute: until a leg does, all connections take the other."""
    states = [f"/sys/class/net/{leg}/bonding_slave/ad_actor_oper_port_state" for leg in LEGS]
    seen = bed.agent.run(["cat", f"/sys/class/net/{BOND}/bonding/ad_num_ports", *states]).text.split()
    return min(int(seen[0]), sum(int(state) & DISTRIBUTING != 0 for state in seen[1:]))


@pytest.fixture(scope="module")
def bonded(assets: Assets) -> Iterator[Bed]:
    with two_nics(assets, "test-bond", bond=True) as bed:
        partner = bed.wire.popen([sys.executable, "-m", "tests.guest.lacp", "wire0", "wire1"], stdin=subprocess.DEVNULL)
        try:
            make_bond(bed, LAYERS)
            yield bed
        finally:
            partner.kill()
            partner.wait()


@pytest.fixture
def bed(bonded: Bed) -> Iterator[Bed]:
    wait_until(lambda: ports_in_use(bonded) == len(LEGS), "both legs are in use", 60)
    yield bonded
    assert_settled(bonded, drops=("tx_drop_unknown_context", "tx_drop_wrong_seq"))
    assert bonded.others[0].contexts() == []


def both(bed: Bed) -> Counter[str]:
    """What both NICs have counted."""
    return Counter(bed.nic.stats()) + Counter(bed.others[0].stats())


def drivers(bed: Bed) -> Counter[str]:
    """What the driver has counted for both."""
    return Counter(bed.ethtool("eth0")) + Counter(bed.ethtool("eth1"))


def test_each_connection_is_offloaded_by_its_leg(bed: Bed, capture_path: Path) -> None:
    cases = [
        Case(f"leg {i}", [send(SIZE), recv(SIZE)], [{"do": "echo", "size": SIZE}], family="46"[i % 2])
        for i in range(CONNECTIONS)
    ]
    nics, driver = both(bed), drivers(bed)
    second = bed.others[0].stats()["ctx_tx_added"]
    seen = exchange(bed, cases, capture_path)
    nics, driver = both(bed) - nics, drivers(bed) - driver
    seen.arrived()
    seen.wire_is_encrypted()
    assert seen.tls_stat["TlsTxDevice"] == seen.tls_stat["TlsRxDevice"] == CONNECTIONS
    assert seen.tls_stat["TlsTxSw"] == seen.tls_stat["TlsRxSw"] == seen.tls_stat["TlsDecryptError"] == 0
    assert nics["ctx_tx_added"] == nics["ctx_rx_added"] == CONNECTIONS
    assert 0 < bed.others[0].stats()["ctx_tx_added"] - second < CONNECTIONS
    sent = sum(stream.bytes for stream in seen.streams("tx"))
    assert driver["tx_tls_encrypted_bytes"] == nics["tx_tls_bytes"] >= sent
    assert driver["tx_tls_fallback"] <= seen.tcp["TcpRetransSegs"]
    assert nics["rx_tls_records"] > 0


def one_more(bed: Bed, rounds: Rounds) -> Counter[str]:
    """What both NICs count in a round."""
    before = both(bed)
    rounds.running.go_on()
    rounds.end()
    return both(bed) - before


def timeouts(bed: Bed) -> int:
    """TCP's retransmission timeouts in the guest."""
    return int(json.loads(bed.agent.run(["nstat", "-aszj", "TcpExtTCPTimeouts"]).text)["kernel"]["TcpExtTCPTimeouts"])


@contextmanager
def unplugged(bed: Bed, leg: int) -> Iterator[None]:
    """The leg's link is down: in the guest, and then for the bond."""
    bed.guest.qmp("set_link", name=f"n{leg}", up=False)
    try:
        yield
    finally:
        bed.guest.qmp("set_link", name=f"n{leg}", up=True)


@contextmanager
def dead(bed: Bed, leg: int) -> Iterator[None]:
    """The leg's NIC is gone, with all it knew."""
    nic: NicProcess = (bed.nic, *bed.others)[leg]
    nic.kill()
    try:
        yield
    finally:
        nic.start()


FAILURES = {"link": unplugged, "NIC": dead}


@pytest.mark.conformance(85)
@pytest.mark.parametrize("name", FAILURES)
def test_a_leg_fails_and_comes_back(bed: Bed, capture_path: Path, name: str) -> None:
    """The kernel leaves connections to the leg they were given to: they wait for it, and then the device goes on."""

    def meanwhile(run: Running) -> None:
        rounds = Rounds(run)
        leg = 0 if bed.nic.contexts() else 1
        with FAILURES[name](bed, leg):
            wait_until(lambda: ports_in_use(bed) == 1, "the bond has noticed")
            before = timeouts(bed)
            run.go_on()
            wait_until(lambda: timeouts(bed) > before, "TCP waits for what it sent")
        wait_until(lambda: ports_in_use(bed) == 2, "the bond has noticed", 60)
        rounds.end()
        one_more(bed, rounds)
        assert one_more(bed, rounds)["tx_tls_records"] >= 2 * RECORDS_PER_ROUND
        run.go_on()

    seen = exchange(bed, echo_cases(f"fails {name}", 5), capture_path, meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    assert seen.tls_stat["TlsTxDevice"] == 2
    assert seen.tls_stat["TlsDecryptError"] == 0


@pytest.mark.conformance(83)
@pytest.mark.conformance(84)
def test_a_leg_that_is_shut_down_leaves_its_connections_to_software(bed: Bed, capture_path: Path) -> None:
    """Failover without a pause: the kernel encrypts for the other leg what the first one had."""

    def meanwhile(run: Running) -> None:
        rounds = Rounds(run)
        run.go_on()
        for leg in LEGS:  # whichever has contexts
            shell(bed, f"ip link set {leg} down")
            try:
                rounds.end()
                run.go_on()
                rounds.end()
            finally:
                shell(bed, f"ip link set {leg} up")
            wait_until(lambda: ports_in_use(bed) == len(LEGS), "the leg is back", 60)
            run.go_on()
        assert not bed.nic.contexts()
        assert not bed.others[0].contexts()
        rounds.end()
        run.go_on()

    seen = exchange(bed, echo_cases("shut", 7), capture_path, meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    assert seen.tls_stat["TlsDecryptError"] == 0


@pytest.mark.conformance(117)
def test_a_bond_that_changes_legs_by_itself_is_not_offloaded(bed: Bed, capture_path: Path) -> None:
    """Active-backup: the kernel does not know beforehand which NIC a packet will take, and asks none of them."""
    shell(bed, f"ip link del {BOND}")
    try:
        make_bond(bed, "mode active-backup miimon 50")
        before = both(bed)
        seen = exchange(bed, echo_cases("backup", 1), capture_path)
        after = both(bed) - before
    finally:
        shell(bed, f"ip link del {BOND}")
        make_bond(bed, LAYERS)
    seen.arrived()
    seen.wire_is_encrypted()
    assert seen.tls_stat["TlsTxSw"] == seen.tls_stat["TlsRxSw"] == 2
    assert after["ctx_tx_added"] == after["tx_tls_packets"] == after["rx_tls_packets"] == 0
