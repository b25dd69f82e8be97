"""A NIC with two contexts and jumbo frames, and two guests one after the other on it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from testbed.bed import TOOLS, WIRE4, Bed, configure_guest, running
from testbed.errors import GuestDied
from testbed.peers.flowkeys import FlowKeys
from testbed.setup import Assets
from testbed.vm.guest import Guest
from testbed.wire.pcapfile import frames
from tests.guest.conftest import assert_settled, wait_until
from tests.guest.exchange import CIPHERS, EOF, SHUTDOWN, WAIT, Case, Running, exchange, exchanging, recv, send, tx_case

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

SIZE = 2 << 20


@pytest.fixture(scope="module")
def small(assets: Assets) -> Iterator[Bed]:
    with running(assets, name="test-small", nic_arguments=["--max-contexts", "2"], mtu=9000) as bed:
        yield bed


@pytest.fixture
def small_bed(small: Bed) -> Iterator[Bed]:
    yield small
    assert_settled(small)


def test_a_third_context_is_left_to_software(small_bed: Bed, tmp_path: Path) -> None:
    cases = [tx_case(f"full {n}", send(SIZE), WAIT, size=SIZE) for n in range(3)]

    def meanwhile(run: Running) -> None:
        run.guest_waits()  # all are open at the same time
        run.go_on()

    seen = exchange(small_bed, cases, tmp_path / "wire.pcap", meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    assert sorted(guest["txconf"] for guest in seen.guest) == ["hw", "hw", "sw"]
    assert seen.tls_stat["TlsTxDevice"] == 2
    assert seen.tls_stat["TlsTxSw"] == 1
    assert seen.driver["tls_add_failed"] == 1
    assert seen.driver["tx_tls_ctx"] == seen.nic["ctx_tx_added"] == 2
    assert seen.nic["tx_tls_records"] * 3 == seen.report.records * 2


FULL = """
import json, socket, sys
sys.path.insert(0, sys.argv[1])
from ktls_raw import crypto_info
job = json.loads(sys.argv[2])
info, held = crypto_info(job["cipher"], **job["keys"]["rx"]), []
sockets = [socket.create_connection(tuple(job["connect"])) for _ in range(job["count"])]
for s in sockets:
    s.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
for s in sockets:
    if len(held) == job["room"]:
        held.pop(0).close()
    s.setsockopt(282, 2, info)
    held.append(s)
"""
LISTEN = (
    f"import socket, sys; s = socket.create_server(('{WIRE4}', 0), backlog=400)\n"
    "print(s.getsockname()[1], flush=True); sys.stdin.readline()\n"
)


@pytest.mark.conformance(13)
def test_a_slot_is_waited_for_while_it_is_on_its_way(small_bed: Bed) -> None:
    """The table is full, one context was closed a moment ago, and the next socket gets its place."""
    count, told, before = 60, small_bed.tls_stat(), small_bed.ethtool()
    with small_bed.wire.popen(["python3", "-c", LISTEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as sink:
        assert sink.stdout is not None
        keys = FlowKeys.from_seed(CIPHERS[0], "full").as_job("rx")
        job = {"connect": [WIRE4, int(sink.stdout.readline())], "count": count, "room": 2, **keys}
        small_bed.agent.run(["python3", "-c", FULL, TOOLS, json.dumps(job)], timeout=60)
        sink.kill()
    stat, after = small_bed.tls_stat(), small_bed.ethtool()
    assert stat["TlsRxDevice"] - told["TlsRxDevice"] == after["rx_tls_ctx"] - before["rx_tls_ctx"] == count
    assert stat["TlsRxSw"] == told["TlsRxSw"]
    assert after["tls_add_failed"] == before["tls_add_failed"]


def longest_frame(path: Path) -> int:
    return max(map(len, frames(path)))


def test_jumbo_frames_and_a_smaller_mtu(small_bed: Bed, tmp_path: Path) -> None:
    agent = small_bed.agent
    assert "mtu 9000" in agent.run(["ip", "link", "show", "eth0"]).text
    agent.run(["ping", "-c", "1", "-W", "5", "-M", "do", "-s", str(9000 - 28), "198.51.100.1"])
    agent.run(["ethtool", "-K", "eth0", "tso", "off"])
    try:
        for mtu in (9000, 1400):
            agent.run(["ip", "link", "set", "eth0", "mtu", str(mtu)])
            case = Case(f"mtu {mtu}", [send(SIZE), SHUTDOWN], [recv(SIZE), EOF], dirs=("tx",))
            seen = exchange(small_bed, [case], tmp_path / "wire.pcap")
            seen.offloaded()
            assert longest_frame(tmp_path / "wire.pcap") == mtu + 14
        for wrong in ("9001", "60"):
            assert agent.run(["ip", "link", "set", "eth0", "mtu", wrong], check=False).returncode != 0
    finally:
        agent.run(["sh", "-c", "ip link set eth0 mtu 9000; ip -6 addr replace 2001:db8:1::2/64 dev eth0 nodad"])
        agent.run(["ethtool", "-K", "eth0", "tso", "on"])


def test_a_second_guest_on_the_same_nic_and_its_end_under_traffic(small: Bed, tmp_path: Path) -> None:
    """The last of this file: it ends the guest and then the NIC."""
    pid = small.nic.pid
    size = 64 << 20
    endless = [Case(f"endless {d}", [send(size)], [recv(size)], dirs=("tx",)) for d in "ab"]
    with suppress(GuestDied), exchanging(small, endless):
        wait_until(lambda: small.nic.stats()["tx_tls_records"] > 100, "traffic of the first guest")
        small.guest.stop()
    wait_until(lambda: not small.nic.contexts(), "the contexts end with their guest")
    with Guest(small.guest.machine) as guest:
        bed = Bed(small.nic, guest, small.wire, small.folder)
        configure_guest(guest.agent)
        exchange(bed, [tx_case("second", send(SIZE), size=SIZE)], tmp_path / "wire.pcap").offloaded()
        assert_settled(bed)
        with exchanging(bed, endless):
            before = bed.nic.stats()["tx_tls_records"]
            wait_until(lambda: bed.nic.stats()["tx_tls_records"] > before + 100, "traffic of the second guest")
            assert bed.nic.pid == pid
            assert bed.nic.stop() == 0
        assert [path.name for path in small.folder.iterdir() if path.is_socket()] == []
        assert guest.kernel_complaints() == []
