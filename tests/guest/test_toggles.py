"""Features that are switched while data flows, and a plain NIC beside ours that gets its link late."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.bed import Bed, configure_guest, running
from testbed.setup import Assets
from testbed.vm.qemu import UserNic
from tests.guest.checksums import checksums
from tests.guest.conftest import assert_settled, wait_until
from tests.guest.exchange import Running, exchange
from tests.guest.rounds import RECORDS_PER_ROUND, ROUND, Rounds, echo_cases
from tests.guest.twonics import shell

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

TURNS = 3
# what a switch takes along (tx: TSO and TLS) is switched on again behind it
STORM = (
    *("tso off", "tso on", "gso off", "gso on", "gro off", "gro on", "sg off", "sg on tso on"),
    *("tx off", "tx on sg on tso on", "tls-hw-tx-offload on", "rx off", "rx on tls-hw-rx-offload on"),
    *("tls-hw-tx-offload off", "tls-hw-rx-offload off", "tls-hw-tx-offload on tls-hw-rx-offload on"),
)


@pytest.fixture(scope="module")
def beside(assets: Assets) -> Iterator[Bed]:
    """eth0 is ours; a plain virtio NIC stands behind it."""
    with running(
        assets, name="test-toggles", change=lambda machine: replace(machine, nics=(*machine.nics, UserNic()))
    ) as bed:
        yield bed


@pytest.fixture
def bed(beside: Bed) -> Iterator[Bed]:
    yield beside
    shell(beside, "ethtool -K eth0 tx on rx on sg on tso on gro on tls-hw-tx-offload on tls-hw-rx-offload on")
    assert_settled(beside)


@pytest.mark.conformance(128)
@pytest.mark.conformance(129)
@pytest.mark.conformance(131)
@pytest.mark.conformance(132)
def test_every_feature_is_switched_while_data_flows(bed: Bed, capture_path: Path) -> None:
    """Live contexts do not notice, nor does the device; checksums on the wire are right all the while."""
    cmds = [f"ethtool -K eth0 {switch}" for switch in STORM]

    def meanwhile(run: Running) -> None:
        rounds = Rounds(run)
        commands = bed.nic.stats()["cmd_ok"]
        for _ in range(TURNS):
            run.go_on()
            shell(bed, " && ".join(cmds))
            rounds.end()
        whole = rounds.whole()
        assert min(whole["tx_tls_records"], whole["rx_tls_records"]) >= 2 * RECORDS_PER_ROUND
        # ethtool asks for counters with a command; nothing else was asked
        assert bed.nic.stats()["cmd_ok"] == commands
        run.go_on()

    seen = exchange(bed, echo_cases("storm", TURNS + 3), capture_path, meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    assert seen.driver["tx_drop"] == seen.driver["tx_tls_device_drop"] == 0
    assert seen.nic["rx_tls_bad_csum"] == seen.tcp["TcpInCsumErrors"] == 0
    assert seen.nic["tx_tls_bytes"] >= 0.9 * sum(stream.bytes for stream in seen.streams("tx"))
    found = checksums(capture_path, bytes((198, 51, 100, 2)))
    assert found["wrong"] == 0
    assert found["right"] + found["partial"] > ROUND // 65536


@pytest.mark.conformance(129)
@pytest.mark.parametrize(("off", "stays"), [("tx", "rx"), ("rx", "tx")])
def test_each_flag_is_about_its_own_direction(bed: Bed, capture_path: Path, off: str, stays: str) -> None:
    shell(bed, f"ethtool -K eth0 tls-hw-{off}-offload off")
    seen = exchange(bed, echo_cases(f"without {off}", 1), capture_path)
    seen.arrived()
    seen.wire_is_encrypted()
    software, device = off.capitalize(), stays.capitalize()
    assert seen.tls_stat[f"Tls{software}Sw"] == seen.tls_stat[f"Tls{device}Device"] == 2
    assert seen.tls_stat[f"Tls{software}Device"] == seen.tls_stat[f"Tls{device}Sw"] == 0
    assert seen.nic[f"ctx_{off}_added"] == seen.nic[f"{off}_tls_packets"] == 0
    assert seen.nic[f"{stays}_tls_records"] >= 2 * RECORDS_PER_ROUND


def driver_of(bed: Bed, device: str) -> str:
    """Which driver has a virtio device; empty if none."""
    link = bed.agent.run(["readlink", f"/sys/bus/virtio/devices/{device}/driver"], check=False).text
    return link.strip().rpartition("/")[2]


def test_a_plain_nic_that_gets_its_link_late(bed: Bed, capture_path: Path) -> None:
    """Without a link nobody can be asked who it is: our driver keeps the device until then, and virtio_net gets it."""
    devices = "grep -l 0x0001 /sys/bus/virtio/devices/*/device | cut -d/ -f6"
    ours, plain = bed.agent.run(["sh", "-c", devices]).text.split()
    if driver_of(bed, plain) == "tlsnic":
        ours, plain = plain, ours
    assert driver_of(bed, ours) == "tlsnic"
    shell(bed, "rmmod tlsnic")
    bed.guest.qmp("set_link", name="n1", up=False)
    shell(bed, "insmod /opt/tlsnic/tlsnic.ko && modprobe virtio_net")
    assert [driver_of(bed, device) for device in (ours, plain)] == ["tlsnic", "tlsnic"]
    bed.guest.qmp("set_link", name="n1", up=True)
    wait_until(lambda: driver_of(bed, plain) == "virtio_net", "the stock driver has the plain NIC")
    assert driver_of(bed, ours) == "tlsnic"
    assert bed.agent.run(["ls", f"/sys/bus/virtio/devices/{plain}/net"]).text.split()
    name = bed.agent.run(["ls", f"/sys/bus/virtio/devices/{ours}/net"]).text.strip()
    assert name == "eth0"
    configure_guest(bed.agent)
    exchange(bed, echo_cases("late", 1), capture_path).offloaded()
