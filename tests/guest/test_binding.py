"""The driver comes and goes while frames arrive: between its first buffer and its last both sides are at work."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from testbed.bed import WIRE4, Bed, configure_guest, running
from testbed.setup import Assets
from testbed.vm.qemu import Machine, VhostUserNic
from tests.guest.conftest import wait_until
from tests.guest.exchange import exchange, send, tx_case

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

SIZE = 1 << 20
TIMES = 25
ONCE = """
set -e
cd /sys/bus/virtio/drivers/tlsnic
device=$(basename $(readlink -f /sys/class/net/eth0/device))
echo $device >unbind
echo $device >bind
"""
FLOOD = f"""
import socket
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
udp.bind(("{WIRE4}", 0))
while True:
    udp.sendto(bytes(1000), ("198.51.100.255", 9))
"""
REBIND = f"""
set -e
cd /sys/bus/virtio/drivers/tlsnic
device=$(basename $(readlink -f /sys/class/net/eth0/device))
for i in $(seq {TIMES}); do
    echo $device >unbind
    echo $device >bind
    dd if=/dev/zero of=/dev/shm/pages bs=1M count=64 2>/dev/null
    rm /dev/shm/pages
done
"""


def test_frames_arrive_while_the_driver_is_bound(bed: Bed, tmp_path: Path) -> None:
    """Memory that comes and goes meanwhile would show a page that was given back once too often."""
    flood = bed.wire.popen([sys.executable, "-c", FLOOD])
    try:
        before = bed.nic.stats()["rx_packets"]
        wait_until(lambda: bed.nic.stats()["rx_packets"] > before + 100, "frames arrive")
        bed.agent.run(["sh", "-c", REBIND], timeout=200)
        assert flood.poll() is None
    finally:
        flood.kill()
        flood.wait()
    configure_guest(bed.agent)
    assert bed.guest.kernel_complaints() == []
    exchange(bed, [tx_case("bound again", send(SIZE), size=SIZE)], tmp_path / "wire.pcap").offloaded()


def test_queues_that_share_an_interrupt(assets: Assets, tmp_path: Path) -> None:
    """With too few vectors; what one of them was told about processors is taken back before it goes."""

    def change(machine: Machine) -> Machine:
        (nic,) = machine.nics
        assert isinstance(nic, VhostUserNic)
        return dataclasses.replace(machine, nics=(dataclasses.replace(nic, vectors=2),))

    with running(assets, name="test-shared", change=change) as bed:
        bed.agent.run(["sh", "-c", ONCE])
        configure_guest(bed.agent)
        exchange(bed, [tx_case("shared", send(SIZE), size=SIZE)], tmp_path / "wire.pcap").offloaded()
        assert "-virtqueues" in bed.agent.get("/proc/interrupts").decode()
        assert bed.guest.kernel_complaints() == []
