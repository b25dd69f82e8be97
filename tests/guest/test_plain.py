"""Plain networking: the stock driver on our NIC, and our driver on a device that is not ours."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from testbed.bed import TOOLS, WIRE4, WIRE6, Bed, running
from testbed.peers.peer import Peer
from testbed.setup import Assets
from testbed.vm.guest import Guest
from testbed.vm.qemu import UserNic
from testbed.wire.pcapfile import frames
from tests.guest.cases import both_ways
from tests.guest.exchange import Seen, exchange

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

SIZE = 4 << 20
PROBE_SECONDS = 2.0


@pytest.fixture(scope="module")
def stock(assets: Assets) -> Iterator[Bed]:
    """virtio_net on our NIC; it finds no difference to any other."""
    with running(assets, name="test-stock", change=lambda machine: replace(machine, driver="virtio_net")) as bed:
        yield bed


@pytest.fixture
def bed(stock: Bed) -> Iterator[Bed]:
    yield stock
    assert stock.guest.kernel_complaints() == []
    nic = stock.nic.stats()
    assert {name for name, n in nic.items() if n and ("_drop_" in name or "errors" in name)} <= {"rx_drop_queue_down"}
    assert nic["hellos"] == nic["cmd_ok"] == nic["cmd_failed"] == 0


def set_features(bed: Bed, state: str, *names: str) -> None:
    bed.agent.run(["ethtool", "-K", "eth0", *(word for name in names for word in (name, state))])


def clear_traffic(bed: Bed, name: str, path: Path) -> Seen:
    """TCP without TLS: both families at once, both directions, judged by hashes."""
    jobs: dict[str, Any] = {"guest_job": {"keys": {}, "ss": False}, "peer_job": {"keys": {}}}
    cases = [both_ways(f"{name} {family}", SIZE, dirs=(), family=family, **jobs) for family in "46"]
    seen = exchange(bed, cases, path)
    seen.arrived()
    return seen


def test_ping(bed: Bed) -> None:
    for address in (WIRE4, WIRE6):
        bed.agent.run(["ping", "-c", "3", "-i", "0.2", "-W", "5", address])
        bed.agent.run(["ping", "-c", "1", "-W", "5", "-s", "30000", address])  # in fragments


def test_tcp_both_ways_with_all_offloads(bed: Bed, tmp_path: Path) -> None:
    known = bed.agent.run(["ethtool", "-k", "eth0"]).text
    for name in ("tx-checksumming", "tcp-segmentation-offload", "rx-checksumming"):
        assert f"{name}: on" in known
    seen = clear_traffic(bed, "offloads", tmp_path / "wire.pcap")
    # packets stay whole on both ways
    assert seen.nic["tx_bytes"] / seen.nic["tx_packets"] > 3000
    assert max(map(len, frames(tmp_path / "wire.pcap"))) > 30000


@pytest.mark.parametrize("off", ["tx", "tso", "gro"])
def test_tcp_without_an_offload(bed: Bed, tmp_path: Path, off: str) -> None:
    set_features(bed, "off", off)
    try:
        clear_traffic(bed, f"without {off}", tmp_path / "wire.pcap")
        if off != "gro":
            sent = [len(f) for f in frames(tmp_path / "wire.pcap") if bytes(f[6:12]) == bytes.fromhex("525400123456")]
            assert max(sent) == 1514
    finally:
        set_features(bed, "on", "tx", "tso", "gro")


UDP_ECHO = (
    "import socket, sys\n"
    "s = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)\n"
    "s.bind((sys.argv[1], 0)); print(s.getsockname()[1], flush=True)\n"
    "while True: s.sendto(*s.recvfrom(65536))\n"
)
UDP_ASK = (
    "import os, socket, sys\n"
    "s = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)\n"
    "s.connect((sys.argv[1], int(sys.argv[2]))); s.settimeout(10)\n"
    "for size in (0, 1, 17, 18, 19, 1471, 1472, 1473, 9000, 60000):\n"
    "    data = os.urandom(size); s.send(data); assert s.recv(65536) == data, size\n"
)


@pytest.mark.parametrize("address", [WIRE4, WIRE6])
def test_udp(bed: Bed, address: str) -> None:
    with bed.wire.popen([sys.executable, "-c", UDP_ECHO, address], stdout=subprocess.PIPE) as echo:
        try:
            assert echo.stdout is not None
            bed.agent.run(["python3", "-c", UDP_ASK, address, echo.stdout.readline().decode().strip()])
        finally:
            echo.kill()


def test_software_ktls(bed: Bed, tmp_path: Path) -> None:
    seen = exchange(bed, [both_ways(f"sw {f}", SIZE, family=f) for f in "46"], tmp_path / "wire.pcap")
    seen.arrived()
    seen.wire_is_encrypted()
    assert seen.tls_stat["TlsTxSw"] == seen.tls_stat["TlsRxSw"] == 2
    assert [guest["txconf"] for guest in seen.guest] == ["sw", "sw"]


def rx_interrupts(bed: Bed) -> dict[str, int]:
    """By queue."""
    table = bed.agent.get("/proc/interrupts").decode()
    found = re.findall(r"^ *\d+: +(\d+) +(\d+) .*-input\.(\d)$", table, re.M)
    return {queue: int(one) + int(other) for one, other, queue in found}


def test_both_queue_pairs_are_used(bed: Bed) -> None:
    """A processor sends on its own queue, and the device answers a flow on the queue that it came from last."""
    assert bed.agent.run(["ethtool", "-l", "eth0"]).text.count("Combined:\t2") == 2
    echo = {"listen": [WIRE4, 0], "steps": [{"do": "echo", "size": SIZE}]}
    steps = [{"do": "send", "size": SIZE // 32}, {"do": "recv", "size": SIZE // 32}] * 32
    for queue in ("0", "1"):
        before = rx_interrupts(bed)
        with Peer(bed.wire, "raw", echo) as peer:
            job = json.dumps({"connect": [WIRE4, peer.port], "steps": steps, "ss": False})
            bed.agent.run(["taskset", "-c", queue, "python3", f"{TOOLS}/ktls_raw.py", job])
            assert peer.result()["ok"]
        after = rx_interrupts(bed)
        assert set(after) == {"0", "1"}
        assert after[queue] - before[queue] > 16


# -- our driver on a device that is not ours ---------------------------------------------------------------------------


def test_another_device_is_left_to_its_own_driver(assets: Assets) -> None:
    machine = replace(assets.machine, nics=(UserNic(),), name="test-other")
    with Guest(machine) as guest:
        agent = guest.agent
        log = [line for line in agent.kernel_log().splitlines() if "tlsnic" in line]
        times = [float(re.findall(r"\[ *([\d.]+)\]", line)[0]) for line in log]
        said = [
            line for line in log if "taint" not in line and "Command line" not in line and "command line" not in line
        ]
        assert len(said) == 1
        assert "not a tlsnic, leaving it to another driver" in said[0]
        assert times[-1] - times[-2] < PROBE_SECONDS
        assert "eth0" not in agent.run(["ip", "link"]).text
        agent.run(["modprobe", "virtio_net"])
        agent.run(["sh", "-c", "ip link set eth0 up && ip address add 10.0.2.15/24 dev eth0"])
        assert agent.run(["ethtool", "-i", "eth0"]).text.startswith("driver: virtio_net")
        agent.run(["ping", "-c", "1", "-W", "5", "10.0.2.2"])
        agent.run(["rmmod", "tlsnic"])
        agent.run(["ping", "-c", "1", "-W", "5", "10.0.2.2"])
        assert guest.kernel_complaints() == []
