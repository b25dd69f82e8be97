"""Contexts that the driver does not wait for: in the device in time, in order, never in clear, nothing left over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.bed import TOOLS, WIRE4, Bed
from testbed.peers.flowkeys import FlowKeys
from tests.guest.cases import both_ways, install
from tests.guest.conftest import wait_until
from tests.guest.exchange import (
    CIPHERS,
    EOF,
    SHUTDOWN,
    WAIT,
    Case,
    Running,
    disturbed,
    exchange,
    netem,
    send,
    tx_case,
    tx_personality,
)
from tests.guest.resync_rx import rule

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

SIZE = 100_000
PERSONALITIES = ("rebuild", "next-record")
REFUSE = rule("refuse-add", direction="tx", count="all")


def quiet_cases(name: str) -> list[Case]:
    """Connections that have their keys for a while before they send."""
    return [
        tx_case(f"{name} {cipher}", install("tx"), WAIT, send(SIZE), size=SIZE, cipher=cipher) for cipher in CIPHERS
    ]


@pytest.mark.conformance(9)
def test_a_context_goes_before_its_first_packet(bed: Bed, capture_path: Path) -> None:
    """Not sooner; and that packet, the device's first of the flow, is where the context says that the flow begins."""
    cases = quiet_cases("lazy")

    def meanwhile(run: Running) -> None:
        run.guest_waits()
        assert bed.nic.contexts() == []
        run.go_on()

    seen = exchange(bed, cases, capture_path, meanwhile)
    seen.offloaded()
    assert seen.driver["tls_add_posted"] == len(cases)
    assert seen.driver["tls_add_refused"] == seen.driver["tls_add_failed"] == 0
    assert seen.driver["tx_tls_resync"] <= seen.tcp["TcpRetransSegs"]


@pytest.mark.conformance(13)
def test_of_a_context_without_a_packet_the_device_hears_nothing(bed: Bed, capture_path: Path) -> None:
    silent = Case("silent", [install("tx"), SHUTDOWN], [EOF], dirs=("tx",))
    failed = bed.nic.stats()["cmd_failed"]
    before, stat = bed.ethtool(), bed.tls_stat()
    exchange(bed, [both_ways("beside", SIZE), silent], capture_path).arrived()
    wait_until(lambda: bed.ethtool()["tx_tls_del"] == before["tx_tls_ctx"] + 2, "both are deleted")
    after = bed.ethtool()
    assert bed.tls_stat()["TlsTxDevice"] == stat["TlsTxDevice"] + 2
    assert after["dev_ctx_tx_added"] == before["dev_ctx_tx_added"] + 1
    assert bed.nic.stats()["cmd_failed"] == failed


OPEN_AT_ONCE = """
import json, socket, sys
sys.path.insert(0, sys.argv[1])
from ktls_raw import crypto_info
job = json.loads(sys.argv[2])
s = socket.create_connection(tuple(job["connect"]))
s.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
print("ready", flush=True)
sys.stdin.readline()
s.setsockopt(282, 1, crypto_info(job["cipher"], **job["keys"]["tx"]))
"""
LISTEN = (
    f"import socket, sys; s = socket.create_server(('{WIRE4}', 0), backlog=400)\n"
    "print(s.getsockname()[1], flush=True); sys.stdin.readline()\n"
)


@pytest.mark.conformance(8)
def test_a_rule_holds_as_soon_as_it_is_set(bed: Bed) -> None:
    """Whoever opens a socket when the NIC has said yes to the scenario is refused, in time."""
    with bed.wire.popen(["python3", "-c", LISTEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as sink:
        assert sink.stdout is not None
        keys = FlowKeys.from_seed(CIPHERS[0], "at once").as_job("tx")
        job = json.dumps({"connect": [WIRE4, int(sink.stdout.readline())], **keys})
        before = bed.tls_stat()
        for _ in range(10):
            tool = bed.agent.spawn(["python3", "-c", OPEN_AT_ONCE, TOOLS, job])
            tool.wait_for_output(b"ready", 30)
            with bed.nic.faults(REFUSE):
                tool.write(b"\n")
                assert tool.wait(30) == 0
                assert bed.nic.fault_rules() == {"refuse-add 1": 1}
        sink.kill()
    after = bed.tls_stat()
    assert (after["TlsTxSw"] - before["TlsTxSw"], after["TlsTxDevice"] - before["TlsTxDevice"]) == (10, 0)


@pytest.mark.conformance(8)
def test_a_rule_is_for_sockets_opened_after_it(bed: Bed, capture_path: Path) -> None:
    """Contexts that were prepared before go to the device all the same."""
    cases = quiet_cases("before")

    def meanwhile(run: Running) -> None:
        run.guest_waits()
        with bed.nic.faults(REFUSE):
            run.go_on()
            wait_until(lambda: bed.nic.stats()["tx_tls_records"] > 0, "the device encrypts")

    seen = exchange(bed, cases, capture_path, meanwhile)
    seen.offloaded()
    assert seen.nic["fault_adds_refused"] == 0


@pytest.mark.parametrize("personality", PERSONALITIES)
@pytest.mark.conformance(85)
def test_the_first_packets_are_lost_above_the_driver(bed: Bed, capture_path: Path, personality: str) -> None:
    """What comes first is out of order: the context goes with a resync, or when the stack has agreed on one."""
    cases = [tx_case(f"late {personality} {n}", send(SIZE, write=3000), size=SIZE) for n in range(12)]
    with tx_personality(bed, personality), disturbed(bed, netem("loss 30%")):
        seen = exchange(bed, cases, capture_path)
    seen.arrived()
    seen.wire_is_encrypted()
    assert seen.tls_stat["TlsTxDevice"] == seen.driver["tls_add_posted"] == len(cases)
    assert seen.driver["tx_tls_ooo"] > 0
    assert 0 < seen.nic["ctx_tx_added"] <= len(cases)


def test_the_interface_goes_down_before_the_first_packet(bed: Bed, capture_path: Path) -> None:
    """Software encrypts, and of these contexts the device has never heard."""
    cases = quiet_cases("down")

    def meanwhile(run: Running) -> None:
        run.guest_waits()
        keep = "sysctl -qw net.ipv6.conf.eth0.keep_addr_on_down=1"  # for the tests that follow
        bed.agent.run(["sh", "-c", f"{keep}; ip link set eth0 down; ip link set eth0 up"])
        run.go_on()

    seen = exchange(bed, cases, capture_path, meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    assert seen.tls_stat["TlsTxDevice"] == len(cases)
    assert seen.nic["ctx_tx_added"] == seen.nic["cmd_failed"] == 0


# -- slots -------------------------------------------------------------------------------------------------------------

REQUEST, ANSWER, THREADS, EACH = 3000, 2000, 4, 60
CHURN = """
import json, socket, sys, threading
sys.path.insert(0, sys.argv[1])
from ktls_raw import crypto_info
job = json.loads(sys.argv[2])
request, answer = (bytes.fromhex(job[name]) for name in ("request", "answer"))
wrong = []

def talk():
    for _ in range(job["each"]):
        with socket.create_connection(tuple(job["connect"])) as s:
            s.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
            for name, number in (("tx", 1), ("rx", 2)):
                s.setsockopt(282, number, crypto_info(job["cipher"], **job["keys"][name]))
            s.sendall(request)
            found = b""
            while data := s.recv(65536):
                found += data
            if found != answer:
                wrong.append(len(found))

threads = [threading.Thread(target=talk) for _ in range(job["threads"])]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(wrong))
"""
SERVE = """
import json, socket, sys, threading
from testbed.peers.speed_small import serve
job = json.loads(sys.argv[1])
request, answer = (bytes.fromhex(job[name]) for name in ("request", "answer"))
listener = socket.create_server((job["host"], 0), backlog=100)
print(listener.getsockname()[1], flush=True)
served, lock = 0, threading.Lock()

def talk():
    global served
    for _ in range(job["each"]):
        sock, _ = listener.accept()
        with sock:
            serve(sock, job["keys"], 0, request, answer)
        with lock: served += 1

threads = [threading.Thread(target=talk) for _ in range(job["threads"])]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(served)
"""


@pytest.mark.conformance(13)
def test_slots_are_used_again_and_again_through_all_queues(bed: Bed) -> None:
    """Connections that are over in a moment, several at a time: every byte right, and no packet that the device takes
    for another's or for nobody's."""
    told, before = bed.tls_stat(), bed.nic.stats()
    keys = FlowKeys.from_seed(CIPHERS[0], "churn").as_job("tx", "rx")
    job = {"request": (b"request" * 1000)[:REQUEST].hex(), "answer": (b"answer" * 1000)[:ANSWER].hex(),
           "threads": THREADS, "each": EACH, "host": WIRE4, **keys}  # fmt: skip
    argv = [sys.executable, "-c", SERVE, json.dumps(job)]
    with bed.wire.popen(argv, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            job["connect"] = [WIRE4, int(server.stdout.readline())]
            done = bed.agent.run(["python3", "-c", CHURN, TOOLS, json.dumps(job)], timeout=120)
            assert json.loads(done.text) == []
            assert int(server.stdout.readline()) == THREADS * EACH
        finally:
            server.kill()
    wait_until(lambda: not bed.nic.contexts(), "the contexts are gone")
    stat, after = bed.tls_stat(), bed.nic.stats()
    assert stat["TlsTxDevice"] - told["TlsTxDevice"] == stat["TlsRxDevice"] - told["TlsRxDevice"] == THREADS * EACH
    assert after["ctx_tx_added"] - before["ctx_tx_added"] == THREADS * EACH
    assert after["ctx_rx_added"] - before["ctx_rx_added"] == THREADS * EACH
    assert after["tx_tls_records"] - before["tx_tls_records"] >= THREADS * EACH
    assert after["cmd_failed"] == before["cmd_failed"]
    queues = bed.ethtool()
    assert min(queues[f"tx{number}_packets"] for number in range(2)) > THREADS * EACH / 4
