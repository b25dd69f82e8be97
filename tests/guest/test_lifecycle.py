"""What can happen to a NIC, its driver and its guest while connections are open: they go on, or end, cleanly.

One guest serves all tests. Its NIC works in a namespace that outlives it, so the NIC may be killed and started again.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from nicdev import __version__
from testbed.bed import TOOLS, Bed, configure_guest, running
from testbed.peers.flowkeys import FlowKeys
from testbed.setup import Assets
from testbed.wire.namespace import held_wire
from testbed.wire.wirecapture import WireCapture
from tests.guest.cases import install
from tests.guest.checksums import checksums
from tests.guest.conftest import assert_settled, wait_until
from tests.guest.exchange import CIPHERS, WAIT, Running, exchange, send, tx_case
from tests.guest.rounds import RECORDS_PER_ROUND, ROUND, Rounds, echo_cases, offloaded_again

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

DRIVER = "/opt/tlsnic/tlsnic.ko"
WHOLE_CHECKSUMS = """
seed = 1
[rx]
segments = "wire"
"""


@pytest.fixture(scope="module")
def life(assets: Assets) -> Iterator[Bed]:
    with held_wire() as wire, running(assets, name="test-life", wire=wire) as bed:
        # a link that goes down takes IPv6 addresses away otherwise
        bed.agent.run(["sysctl", "-qw", "net.ipv6.conf.eth0.keep_addr_on_down=1"])
        yield bed


@pytest.fixture
def bed(life: Bed) -> Iterator[Bed]:
    yield life
    set_features(life, "tx", "on", "rx", "on", "tso", "on", "tls-hw-tx-offload", "on", "tls-hw-rx-offload", "on")
    assert_settled(life, drops=("tx_drop_unknown_context", "tx_drop_wrong_seq"))


def check_new_connections_are_offloaded(bed: Bed, tmp_path: Path) -> None:
    exchange(bed, echo_cases("fresh", 1), tmp_path / "fresh.pcap").offloaded()


def csum_errors(bed: Bed) -> int:
    """Segments that the guest's TCP rejected for their checksum."""
    return int(json.loads(bed.agent.run(["nstat", "-aszj", "TcpInCsumErrors"]).text)["kernel"]["TcpInCsumErrors"])


def features(bed: Bed) -> dict[str, bool]:
    """`ethtool -k`."""
    lines = bed.agent.run(["ethtool", "-k", "eth0"]).text.splitlines()[1:]
    return {name.strip(): value.split()[0] == "on" for name, value in (line.split(":") for line in lines)}


def set_features(bed: Bed, *words: str) -> None:
    bed.agent.run(["ethtool", "-K", "eth0", *words])


# -- the interface -----------------------------------------------------------------------------------------------------


def test_link_down_and_up_leaves_live_sockets_to_software(bed: Bed, tmp_path: Path) -> None:
    def meanwhile(run: Running) -> None:
        rounds = Rounds(run)
        rounds.begin()
        began = time.monotonic()
        bed.agent.run(["ip", "link", "set", "eth0", "down"])
        assert time.monotonic() - began < 3, "the kernel waited for something"
        wait_until(lambda: not bed.nic.contexts(), "contexts are gone while the interface is down")
        bed.agent.run(["ip", "link", "set", "eth0", "up"])
        rounds.end()
        software = rounds.whole()
        assert software["tx_tls_records"] == software["rx_tls_records"] == 0
        assert software["ctx_tx_added"] == software["ctx_rx_added"] == 0
        run.go_on()

    seen = exchange(bed, echo_cases("down", 4), tmp_path / "wire.pcap", meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    check_new_connections_are_offloaded(bed, tmp_path)


def test_up_and_down_again_and_again(bed: Bed, tmp_path: Path) -> None:
    def meanwhile(run: Running) -> None:
        rounds = Rounds(run)
        rounds.begin()
        script = "for i in 1 2 3 4 5 6 7 8; do ip link set eth0 down; ip link set eth0 up; done"
        bed.agent.run(["sh", "-c", script])
        rounds.end()
        run.go_on()

    seen = exchange(bed, echo_cases("flap", 3), tmp_path / "wire.pcap", meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()


@pytest.mark.conformance(2)
@pytest.mark.conformance(128)
@pytest.mark.conformance(129)
def test_feature_flags_are_for_new_sockets_only(bed: Bed, tmp_path: Path) -> None:
    def meanwhile(run: Running) -> None:
        rounds = Rounds(run)
        rounds.begin()
        before = bed.nic.stats()
        set_features(bed, "tls-hw-tx-offload", "off", "tls-hw-rx-offload", "off")
        after = bed.nic.stats()
        assert after["cmd_ok"] == before["cmd_ok"]
        rounds.end()
        old = rounds.whole()
        # What TCP sends again on a busy machine is encrypted again, and decrypted once.
        assert old["tx_tls_records"] >= old["rx_tls_records"] >= 2 * RECORDS_PER_ROUND
        new = exchange(bed, echo_cases("new", 1), tmp_path / "new.pcap")
        new.arrived()
        assert new.tls_stat["TlsTxSw"] == new.tls_stat["TlsRxSw"] == 2
        assert new.tls_stat["TlsTxDevice"] == new.tls_stat["TlsRxDevice"] == 0
        assert len(bed.nic.contexts()) == 4
        set_features(bed, "tls-hw-tx-offload", "on", "tls-hw-rx-offload", "on")
        run.go_on()

    seen = exchange(bed, echo_cases("flags", 4), tmp_path / "wire.pcap", meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    check_new_connections_are_offloaded(bed, tmp_path)


@pytest.mark.conformance(130)
@pytest.mark.conformance(131)
def test_tx_checksum_off_leaves_live_contexts_and_checksums_right(bed: Bed, tmp_path: Path) -> None:
    on_wire: Counter[str] = Counter()

    def meanwhile(run: Running) -> None:
        nonlocal on_wire
        rounds = Rounds(run)
        rounds.begin()
        set_features(bed, "tx", "off")
        rounds.end()
        assert not features(bed)["tls-hw-tx-offload"]
        with WireCapture(bed.wire, tmp_path / "sums.pcap", "tcp") as capture:
            off = rounds.whole()
        on_wire = checksums(capture.path, bytes((198, 51, 100, 2)))
        # TCP may repeat one
        assert off["tx_tls_records"] >= off["rx_tls_records"] >= 2 * RECORDS_PER_ROUND
        set_features(bed, "tx", "on", "tso", "on", "tls-hw-tx-offload", "on")
        run.go_on()

    seen = exchange(bed, echo_cases("tx csum", 4), tmp_path / "wire.pcap", meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    assert on_wire["right"] > ROUND // 1500
    assert on_wire["wrong"] == 0
    # the kernel's software fallback leaves a checksum to the device, whatever the features are
    assert on_wire["partial"] <= seen.driver["tx_tls_fallback"]
    check_new_connections_are_offloaded(bed, tmp_path)


@pytest.mark.conformance(132)
def test_rx_checksum_off_loses_no_packet_of_a_live_context(bed: Bed, tmp_path: Path) -> None:
    def meanwhile(run: Running) -> None:
        rounds = Rounds(run)
        rounds.begin()
        set_features(bed, "rx", "off")
        rounds.end()
        assert not features(bed)["tls-hw-rx-offload"]
        before = csum_errors(bed)
        # as on a cable: a frame from the tap says "not summed yet", which the stack believes
        with bed.nic.faults(WHOLE_CHECKSUMS):
            off = rounds.whole()
        # TCP may repeat one
        assert off["tx_tls_records"] >= off["rx_tls_records"] >= 2 * RECORDS_PER_ROUND
        assert csum_errors(bed) == before
        set_features(bed, "rx", "on", "tls-hw-rx-offload", "on")
        run.go_on()

    seen = exchange(bed, echo_cases("rx csum", 4), tmp_path / "wire.pcap", meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    check_new_connections_are_offloaded(bed, tmp_path)


def interrupted(bed: Bed) -> list[str]:
    """The processors that get the interrupts of eth0's queues rx0, tx0, rx1, tx1, ..."""
    script = (
        'at=$(basename $(readlink -f /sys/class/net/eth0/device)) && grep -E "$at-(rx|tx)" /proc/interrupts |'
        " while IFS=: read -r irq rest; do cat /proc/irq/$((irq))/smp_affinity_list; done"
    )
    return bed.agent.run(["sh", "-ec", script]).text.split()


def test_queues_change_under_live_sockets(bed: Bed, tmp_path: Path) -> None:
    """Every pair interrupts processors of its own."""

    def meanwhile(run: Running) -> None:
        rounds = Rounds(run)
        assert interrupted(bed) == ["0", "0", "1", "1"]
        for count, processors in (("1", ["0-1", "0-1"]), ("2", ["0", "0", "1", "1"])):
            rounds.begin()
            bed.agent.run(["ethtool", "-L", "eth0", "combined", count])
            assert interrupted(bed)[: len(processors)] == processors
            rounds.end()
        whole = rounds.whole()
        assert whole["tx_tls_records"] > RECORDS_PER_ROUND
        run.go_on()

    seen = exchange(bed, echo_cases("queues", 5), tmp_path / "wire.pcap", meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()


@pytest.mark.conformance(6)
def test_ethtool_knows_the_nic(bed: Bed) -> None:
    def ask(option: str) -> str:
        return bed.agent.run(["ethtool", option, "eth0"]).text

    info = dict(line.split(": ", 1) for line in ask("-i").splitlines() if ": " in line)
    assert info["driver"] == "tlsnic"
    assert info["firmware-version"] == __version__
    assert info["supports-statistics"] == "yes"
    known = features(bed)
    names = ("tls-hw-tx-offload", "tls-hw-rx-offload", "tx-checksumming", "rx-checksumming", "tcp-segmentation-offload")
    assert [name for name in names if not known[name]] == []
    assert ask("-l").count("Combined:\t2") == 2
    rings = ask("-g")
    for name in ("RX:", "TX:"):
        most, now = (int(line.split()[1]) for line in rings.splitlines() if line.startswith(name + "\t"))
        assert most == now >= 256
    for wrong in ("0", "3"):
        assert bed.agent.run(["ethtool", "-L", "eth0", "combined", wrong], check=False).returncode != 0


# -- the driver --------------------------------------------------------------------------------------------------------


def test_the_module_is_unloaded_under_live_sockets_and_comes_back(bed: Bed, tmp_path: Path) -> None:
    def meanwhile(run: Running) -> None:
        rounds = Rounds(run)
        rounds.begin()
        bed.agent.run(["rmmod", "tlsnic"])
        wait_until(lambda: not bed.nic.contexts(), "contexts went with the driver")
        assert "eth0" not in bed.agent.run(["ip", "link"]).text
        bed.agent.run(["insmod", DRIVER])
        configure_guest(bed.agent)
        bed.agent.run(["sysctl", "-qw", "net.ipv6.conf.eth0.keep_addr_on_down=1"])
        rounds.end()
        assert rounds.whole()["tx_tls_records"] == 0
        run.go_on()

    seen = exchange(bed, echo_cases("module", 4), tmp_path / "wire.pcap", meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    check_new_connections_are_offloaded(bed, tmp_path)


SINK = (
    "import selectors, socket; s = selectors.DefaultSelector()\n"
    "l = socket.create_server(('198.51.100.1', 0), backlog=400); s.register(l, 1)\n"
    "print(l.getsockname()[1], flush=True)\n"
    "while True:\n"
    "    for key, _ in s.select():\n"
    "        if key.fileobj is l: s.register(l.accept()[0], 1)\n"
    "        elif not key.fileobj.recv(65536): s.unregister(key.fileobj); key.fileobj.close()\n"
)
MANY = (
    "import json, socket, sys; sys.path.insert(0, sys.argv[1]); from ktls_raw import crypto_info\n"
    "job, all = json.loads(sys.argv[2]), []\n"
    "for _ in range(job['count']):\n"
    "    s = socket.create_connection(('198.51.100.1', job['port'])); s.setsockopt(6, 31, b'tls')\n"
    "    for name, number in (('tx', 1), ('rx', 2)):\n"
    "        s.setsockopt(282, number, crypto_info(job['cipher'], **job['keys'][name]))\n"
    "    s.send(b'x' * 100); all.append(s)\n"
    "print('open', flush=True); sys.stdin.readline()\n"
)


@pytest.mark.conformance(13)
@pytest.mark.conformance(14)
def test_two_hundred_sockets_leave_nothing_behind(bed: Bed) -> None:
    count = 200
    with bed.wire.popen(["python3", "-c", SINK], stdout=subprocess.PIPE) as sink:
        try:
            assert sink.stdout is not None
            job = {
                "count": count,
                "port": int(sink.stdout.readline()),
                **FlowKeys.from_seed(CIPHERS[0], "many").as_job(),
            }
            tool = bed.agent.spawn(["python3", "-c", MANY, TOOLS, json.dumps(job)])
            tool.wait_for_output(b"open", 60)
            stat = bed.tls_stat()
            assert stat["TlsCurrTxDevice"] == stat["TlsCurrRxDevice"] == count
            wait_until(lambda: bed.nic.stats()["tx_tls_records"] >= count, "every socket's record")
            assert len(bed.nic.contexts()) == 2 * count
            tool.write(b"\n")
            assert tool.wait(30) == 0
        finally:
            sink.kill()


# -- the device --------------------------------------------------------------------------------------------------------


def test_a_nic_that_is_killed_and_started_again(bed: Bed, tmp_path: Path) -> None:
    def meanwhile(run: Running) -> None:
        rounds = Rounds(run)
        for _ in range(3):
            rounds.begin()
            bed.nic.kill()
            bed.nic.start()
            rounds.end()
            wait_until(lambda: len(bed.nic.contexts()) == 4, "the driver has re-created its contexts")
            rounds.whole()  # rx finds its place by two records that the software decrypts
            assert offloaded_again(rounds)
        run.go_on()

    recreated = bed.ethtool()["tls_recreated"]
    seen = exchange(bed, echo_cases("killed", 11), tmp_path / "wire.pcap", meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    assert bed.ethtool()["tls_recreated"] - recreated >= 12
    check_new_connections_are_offloaded(bed, tmp_path)


@pytest.mark.parametrize("personality", ["rebuild", "next-record"])
def test_a_nic_that_is_killed_before_a_flow_begins(bed: Bed, tmp_path: Path, personality: str) -> None:
    """The context was prepared for a device that is no more: it is added to the new one, and waited for."""
    size = 100_000
    cases = [
        tx_case(f"early {cipher}", install("tx"), WAIT, send(size), size=size, cipher=cipher) for cipher in CIPHERS
    ]
    recreated = bed.ethtool()["tls_recreated"]

    def meanwhile(run: Running) -> None:
        run.guest_waits()
        bed.nic.kill()
        bed.nic.start()
        bed.nic.ask("personality", tx=personality)
        wait_until(lambda: bed.ethtool()["tls_recreated"] == recreated + len(cases), "they are added again")
        assert len(bed.nic.contexts()) == len(cases)
        run.go_on()

    try:
        seen = exchange(bed, cases, tmp_path / "wire.pcap", meanwhile)
    finally:
        bed.nic.ask("personality", tx="rebuild")
    seen.arrived()
    seen.wire_is_encrypted()
    count = bed.nic.stats()
    assert count["cmd_failed"] == count["tx_drop_unknown_context"] == 0
    if personality == "rebuild":
        assert count["tx_tls_records"] >= sum(stream.records for stream in seen.streams("tx"))


def test_a_driver_that_is_loaded_while_the_nic_is_away(bed: Bed, tmp_path: Path) -> None:
    """It cannot ask who the device is; it does when the NIC is back."""
    pci = bed.agent.run(["sh", "-c", "basename $(readlink /sys/class/net/eth0/device)"]).text.strip()
    bed.agent.run(["rmmod", "tlsnic"])
    bed.nic.kill()
    bed.agent.run(["insmod", DRIVER])
    assert bed.agent.run(["ls", "/sys/bus/virtio/drivers/tlsnic"]).text.split().count(pci) == 1
    assert "eth0" not in bed.agent.run(["ls", "/sys/class/net"]).text.split()
    bed.nic.start()
    wait_until(lambda: "eth0" in bed.agent.run(["ls", "/sys/class/net"]).text.split(), "the interface is there")
    configure_guest(bed.agent)
    check_new_connections_are_offloaded(bed, tmp_path)


def test_a_guest_that_is_paused(bed: Bed, tmp_path: Path) -> None:
    def meanwhile(run: Running) -> None:
        rounds = Rounds(run)
        for _ in range(2):
            rounds.begin()
            bed.guest.qmp("stop")
            bed.guest.qmp("cont")
            rounds.end()
            wait_until(lambda: len(bed.nic.contexts()) == 4, "the driver has re-created its contexts")
            rounds.whole()
            assert offloaded_again(rounds)
        run.go_on()

    seen = exchange(bed, echo_cases("paused", 8), tmp_path / "wire.pcap", meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    check_new_connections_are_offloaded(bed, tmp_path)
