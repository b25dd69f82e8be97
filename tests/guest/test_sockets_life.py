"""How TLS begins and ends on a socket that has already spoken, and what is queued at that moment."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from testbed.bed import Bed
from testbed.peers.flowkeys import DirectionKeys
from testbed.peers.rawtls import Sealer
from testbed.peers.stream import sha256_of
from tests.guest.cases import AWAITED, CLOSE_NOTIFY, DEAF, egress, install, recv_clear, rx_flow, send_clear, tx_flow
from tests.guest.conftest import wait_until
from tests.guest.exchange import (
    ASK,
    ASKED,
    CIPHERS,
    EOF,
    SHUTDOWN,
    WAIT,
    Case,
    Running,
    exchange,
    recv,
    rx_personality,
    send,
)

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

SIZE = 100_000
HANDSHAKE = 22
PERSONALITIES = ("ideal", "driver-req", "driver-req-async", "core-next-hint")


def sealed_before(case: Case, records: list[bytes]) -> tuple[bytes, DirectionKeys]:
    """The records as user space makes them, and the keys with which the kernel goes on behind them."""
    keys = case.keys.tx
    sealer = Sealer(keys)
    data = b"".join(sealer.seal(text, HANDSHAKE) for text in records)
    nonce = (int.from_bytes(keys.iv, "big") + len(records)).to_bytes(8, "big")
    return data, replace(keys, iv=nonce, rec_seq=keys.rec_seq + len(records))


@pytest.mark.conformance(11)
@pytest.mark.conformance(17)
@pytest.mark.conformance(113)
@pytest.mark.parametrize("cipher", CIPHERS)
def test_records_encrypted_in_user_space_are_sent_again_as_they_were(bed: Bed, capture_path: Path, cipher: str) -> None:
    """A library's last records are queued when the kernel takes over: they are ciphertext, and repeated as such."""
    plain = Case("user space", [], [], cipher=cipher, dirs=("tx",))
    before = [bytes([n]) * (300 * n + 1) for n in range(6)]
    data, behind = sealed_before(plain, before)
    case = replace(
        plain,
        guest=[WAIT, send_clear(data), install("tx"), send(SIZE), SHUTDOWN],
        peer=[recv(SIZE), EOF],
        guest_job={"keys": {"tx": behind.as_json()}},
    )

    def deaf_for_a_while(running: Running) -> None:
        running.guest_waits()
        least = bed.ethtool()["tx_tls_skip_no_sync_data"] + 2
        with bed.nic.faults(DEAF):
            running.go_on()
            wait_until(partial(counts, bed, "tx_tls_skip_no_sync_data", least), "TCP repeats them")

    seen = exchange(bed, [case], capture_path, deaf_for_a_while)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    assert [told["data"] for told in seen.peers[0]["control"]] == [text.hex() for text in before]
    (stream,) = seen.streams("tx")
    assert stream.retransmitted_bytes > 1000
    assert stream.types[HANDSHAKE] == len(before)
    for counter in ("tx_tls_drop_bypass_req", "tx_tls_drop_no_sync_data", "tx_tls_device_drop", "tx_tls_fallback"):
        assert seen.driver[counter] == 0, counter
    assert seen.nic["tx_tls_bytes"] >= stream.bytes - len(data)


@pytest.mark.conformance(18)
@pytest.mark.conformance(56)
@pytest.mark.conformance(80)
@pytest.mark.parametrize("name", PERSONALITIES)
def test_data_that_waits_when_rx_begins(bed: Bed, capture_path: Path, name: str) -> None:
    """The context is born behind what it should begin with: software decrypts that, and the device finds its place."""
    early, late = 40_000, 1_000_000
    for_all = {"options": {"SO_RCVBUF": 200_000}}
    cases = [
        Case(f"queued {name} {cipher}", [WAIT, install("rx"), recv(early), ASK, recv(late), EOF],
             [send(early, records=[1500]), WAIT, ASKED, send(late, records=[4000]), SHUTDOWN], dirs=("rx",),
             cipher=cipher, guest_job=for_all)
        for cipher in CIPHERS
    ]  # fmt: skip

    def when_it_has_come(running: Running) -> None:
        running.guest_waits()
        for peer in running.peers:
            peer.await_waiting()
        queued = f"ss -tnH | awk '$2 >= {early}' | wc -l"
        wait_until(lambda: int(bed.agent.run(["sh", "-c", queued]).text) == len(cases), "the data waits in the guest")
        running.go_on()
        for peer in running.peers:
            peer.release()

    with rx_personality(bed, name):
        seen = exchange(bed, cases, capture_path, when_it_has_come)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    assert seen.driver["rx_tls_resync_res_ok"] >= len(cases)
    records = sum(stream.records for stream in seen.streams("rx"))
    assert records / 2 < seen.nic["rx_tls_records"] <= records - len(cases) * (early // 1500)
    assert seen.nic["rx_tls_auth_fail"] == 0


@pytest.mark.conformance(18)
@pytest.mark.parametrize("name", PERSONALITIES)
def test_data_in_flight_when_rx_begins(bed: Bed, capture_path: Path, name: str) -> None:
    """The peer does not wait for the guest's context; neither end notices."""
    cases = [
        rx_flow(f"flight {name} {n}", [install("rx"), recv(2 * SIZE)], [send(2 * SIZE, records=[size])],
                cipher=CIPHERS[n % 2])
        for n, size in enumerate((200, 1000, 5000, 16_384))
    ]  # fmt: skip
    with rx_personality(bed, name):
        seen = exchange(bed, cases, capture_path)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    assert seen.nic["rx_tls_auth_fail"] == 0


@pytest.mark.conformance(123)
@pytest.mark.parametrize("cipher", CIPHERS)
def test_each_side_may_end_first(bed: Bed, capture_path: Path, cipher: str) -> None:
    """close_notify and FIN from one side, then as much again from the other."""
    leaver = [send(SIZE), CLOSE_NOTIFY, SHUTDOWN, recv(SIZE), EOF]
    stayer = [recv(SIZE), EOF, send(SIZE), CLOSE_NOTIFY, SHUTDOWN]
    cases = [
        Case("guest first", leaver, stayer, cipher=cipher),
        Case("peer first", [ASK, *stayer], [ASKED, *leaver], cipher=cipher),
    ]
    seen = exchange(bed, cases, capture_path)
    seen.offloaded()
    told = [{name: CLOSE_NOTIFY[name] for name in ("kind", "data")}]
    assert [each["control"] for each in seen.peers] == [each["records"] for each in seen.guest] == [told, told]


@pytest.mark.conformance(13)
def test_sockets_that_are_reset_with_data_in_every_queue(bed: Bed, capture_path: Path) -> None:
    """SO_LINGER 0 while data waits to be sent and to be read; the peer's reset while the guest sends and reads."""
    roomy = {"options": {"SO_SNDBUF": 4 * SIZE, "SO_RCVBUF": 4 * SIZE}}
    guest = [send(SIZE), recv(10), WAIT, {"do": "reset"}]
    peer = [send(SIZE), recv(10), WAIT]
    ours = Case("reset by the guest", guest, peer, guest_job=roomy, peer_job=roomy)
    theirs = Case("reset by the peer", [send(SIZE), recv(10), WAIT, recv(100 * SIZE)], [*peer, {"do": "reset"}],
                  guest_job=roomy, peer_job=roomy)  # fmt: skip

    def meanwhile(running: Running) -> None:
        running.guest_waits()
        for each in running.peers:
            each.await_waiting()
        running.peers[1].release()
        running.go_on()
        wait_until(lambda: not bed.nic.contexts(), "the contexts go with the sockets")
        running.peers[0].release()

    seen = exchange(bed, [ours, theirs], capture_path, meanwhile)
    assert seen.guest[0]["ok"]
    assert seen.guest[1]["error"]["errno"] == "ECONNRESET"
    assert seen.peers[0]["ok"]
    assert seen.guest[0]["sha256_received"] == sha256_of(ours.seed, 10)
    assert seen.report.plaintext_hits == 0
    assert [stream.failures for stream in seen.streams("tx")] == [[], []]
    assert seen.tls_stat["TlsTxDevice"] == seen.tls_stat["TlsRxDevice"] == 2
    assert seen.tls_stat["TlsDecryptError"] == 0


CLEAR = bytes.fromhex("c1ea") * 300


def sequence_number(bed: Bed, port: int, number: int) -> AbstractContextManager[None]:
    """What the guest sends to that port claims to begin at `number`."""
    action = f"action pedit munge offset 24 u32 set {number % 2**32:#x}"  # the field's place behind the IPv4 header
    return egress(bed, f"flower ip_proto tcp dst_port {port} {action}")


@pytest.mark.conformance(114)
@pytest.mark.conformance(115)
@pytest.mark.parametrize("first", [-10, -2000], ids=["reaching into records", "of before"])
def test_packets_that_no_record_explains_are_dropped_and_counted(bed: Bed, capture_path: Path, first: int) -> None:
    """TCP never makes them (the core puts a fence where the offload begins), so tc rewrites sequence numbers.

    Records that claim to begin before the offload, to be those that are acknowledged and forgotten, to be of the
    future. TCP repeats them, and then they are right.
    """
    lies = (("bypass_req", first), ("no_sync_data", first), ("no_sync_data", 1 << 20))
    rounds = len(lies)
    # the core remembers the start until something behind it is acknowledged
    steps = [send_clear(CLEAR), recv_clear(1)]
    steps += [install("tx"), *[WAIT, send(1000), recv(1)] * rounds]
    peer = [recv_clear(len(CLEAR)), send_clear(b"\x01")]
    peer += [*[recv(1000), send(1)] * rounds]
    case = tx_flow("unexplained", steps, peer, tx_start=len(CLEAR))

    def lie(running: Running) -> None:
        start = 0
        for reason, distance in lies:
            running.guest_waits()
            start = start or int(bed.nic.contexts()[0]["seq"])
            counter = f"tx_tls_drop_{reason}"
            least = bed.ethtool()[counter] + 1
            with sequence_number(bed, running.peers[0].port, start + distance):
                running.go_on()
                wait_until(partial(counts, bed, counter, least), f"{counter} at {distance}")

    with bed.nic.faults(AWAITED):
        seen = exchange(bed, [case], capture_path, lie)
    seen.arrived()
    seen.wire_is_encrypted()
    assert seen.driver["tx_tls_drop_bypass_req"] >= 1
    assert seen.driver["tx_tls_drop_no_sync_data"] >= 2
    assert seen.driver["tx_tls_fallback"] == seen.driver["tx_tls_device_drop"] == 0


def counts(bed: Bed, counter: str, least: int) -> bool:
    return bed.ethtool()[counter] >= least
