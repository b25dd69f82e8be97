"""The data path in order: whatever the sizes, the cuts and the system calls, the device does all the work."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import pytest

from testbed.bed import Bed
from tests.guest.cases import CLOSE_NOTIFY, ZEROCOPY, control, install, rx_flow
from tests.guest.conftest import wait_until
from tests.guest.exchange import (
    ASK,
    ASKED,
    BOTH,
    CIPHERS,
    EOF,
    RECORD_OVERHEAD,
    SHUTDOWN,
    WAIT,
    Case,
    Running,
    exchange,
    recv,
    rx_case,
    send,
    tx_case,
)
from tests.guest.resync_rx import pairs

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

SIZES = (1, 15, 16, 17, 1400, 16384)
MAX_RECORD = 1 << 14


def total(record: int) -> int:
    """Enough data for some hundred records of this size, or some dozen large ones."""
    return min(record * 300, 50 * MAX_RECORD) + record // 2


@pytest.mark.conformance(3)
@pytest.mark.conformance(19)
@pytest.mark.conformance(20)
@pytest.mark.conformance(26)
@pytest.mark.conformance(30)
@pytest.mark.conformance(111)
def test_records_of_every_size_out(bed: Bed, capture_path: Path) -> None:
    """Each write is a record: no two of them, and no part of one, are treated like another."""
    cases = [
        tx_case(f"tx {size} {cipher}", send(total(size), write=size), size=total(size), cipher=cipher)
        for cipher in CIPHERS
        for size in SIZES
    ]
    seen = exchange(bed, cases, capture_path)
    seen.offloaded()
    for case, stream in zip(cases, seen.streams("tx"), strict=True):
        write = case.guest[0]["write"]
        assert stream.records == -(-case.size("send") // write), case.seed


@pytest.mark.conformance(20)
@pytest.mark.conformance(34)
@pytest.mark.conformance(36)
@pytest.mark.conformance(37)
@pytest.mark.conformance(99)
@pytest.mark.conformance(100)
def test_records_of_every_size_in(bed: Bed, capture_path: Path) -> None:
    """The peer's packets hold one record, many of them, or a part of one."""
    cases = [
        rx_case(f"rx {size} {cipher}", send(total(size), records=[size]), size=total(size), cipher=cipher)
        for cipher in CIPHERS
        for size in SIZES
    ]
    cases.append(rx_case("rx mixed", send(300_000, records=SIZES), size=300_000))
    cases.append(rx_case("rx many", send(60_000, records=[16], writes=[30_000]), size=60_000))
    exchange(bed, cases, capture_path).offloaded()


CUT_RECORD = 40
ON_WIRE = CUT_RECORD + RECORD_OVERHEAD


@pytest.mark.conformance(18)
@pytest.mark.conformance(21)
@pytest.mark.conformance(22)
@pytest.mark.conformance(23)
@pytest.mark.conformance(24)
@pytest.mark.conformance(25)
@pytest.mark.conformance(98)
def test_packets_cut_records_anywhere_on_the_way_in(bed: Bed, capture_path: Path) -> None:
    """Packets one byte shorter or longer than a record begin at every one of its bytes in turn."""
    size = CUT_RECORD * (ON_WIRE + 3)
    cases = [
        rx_case(f"cut {write} {cipher}", send(size, records=[CUT_RECORD], writes=[write], apart=True), size=size,
                cipher=cipher)
        for cipher in CIPHERS
        for write in (ON_WIRE - 1, ON_WIRE + 1, 13)
    ]  # fmt: skip
    seen = exchange(bed, cases, capture_path)
    seen.offloaded()
    for case, stream in zip(cases, seen.streams("rx"), strict=True):
        assert stream.segments >= stream.bytes // case.peer[1]["writes"][0], case.seed
    # a segment the peer repeats is left alone; it happens when the machine is busy
    frames = seen.nic["rx_tls_packets"] + seen.nic["rx_tls_passed"]
    assert frames == sum(stream.segments for stream in seen.streams("rx"))


@pytest.mark.conformance(22)
@pytest.mark.conformance(23)
@pytest.mark.conformance(24)
@pytest.mark.conformance(31)
@pytest.mark.conformance(109)
@pytest.mark.conformance(110)
def test_packets_cut_records_anywhere_on_the_way_out(bed: Bed, capture_path: Path) -> None:
    """Without TSO the driver sees every segment: 524 bytes are no multiple of a record's, so cuts fall everywhere."""
    size = 2000 * CUT_RECORD
    cases = [
        tx_case(f"cut out {cipher}", send(size, write=CUT_RECORD), size=size, cipher=cipher,
                guest_job={"options": {"TCP_MAXSEG": 536}})
        for cipher in CIPHERS
    ]  # fmt: skip
    bed.agent.run(["ethtool", "-K", "eth0", "tso", "off"])
    try:
        seen = exchange(bed, cases, capture_path)
    finally:
        bed.agent.run(["ethtool", "-K", "eth0", "tso", "on"])
    seen.offloaded()
    for stream in seen.streams("tx"):
        assert stream.segments >= stream.bytes // 536
    first_copies = sum(stream.segments for stream in seen.streams("tx")) - seen.driver["tx_tls_ooo"]
    assert seen.driver["tx_tls_encrypted_packets"] == seen.nic["tx_tls_packets"] >= first_copies


@pytest.mark.conformance(109)
def test_small_segments_through_tso(bed: Bed, capture_path: Path) -> None:
    """One packet to the device, many on the network behind it; small ones in the other direction."""
    small = {"options": {"TCP_MAXSEG": 536}}
    cases = [
        tx_case("mss out", send(1 << 20, write=5000), size=1 << 20, guest_job=small),
        rx_case("mss in", send(1 << 20, records=[5000]), size=1 << 20, peer_job=small),
    ]
    seen = exchange(bed, cases, capture_path)
    seen.offloaded()
    assert seen.driver["tx_tls_encrypted_packets"] > (1 << 20) // 536 > seen.nic["tx_tls_packets"]


@pytest.mark.parametrize("cipher", CIPHERS)
def test_the_system_calls_that_send(bed: Bed, capture_path: Path, cipher: str) -> None:
    """MSG_MORE fills records, sendfile works with and without the socket's promise that files do not change."""
    size = 700_001
    zerocopy = [install("tx"), ZEROCOPY]
    file = {"do": "sendfile", "size": size}
    cases = [
        tx_case("more", send(size, write=1000, more=True), size=size, cipher=cipher),
        tx_case("sendfile", {**file, "write": 9999}, size=size, cipher=cipher),
        tx_case("sendfile whole", file, size=size, cipher=cipher),
        tx_case("zerocopy", *zerocopy, {**file, "write": 9999}, size=size, cipher=cipher),
        tx_case("zerocopy whole", *zerocopy, file, size=size, cipher=cipher),
        tx_case("all", *zerocopy, send(99, write=7, more=True), {**file, "size": size}, send(12_345, write=4321),
                size=size + 99 + 12_345, cipher=cipher),
    ]  # fmt: skip
    seen = exchange(bed, cases, capture_path)
    seen.offloaded()
    assert seen.streams("tx")[0].records == -(-size // MAX_RECORD)


@pytest.mark.parametrize("cipher", CIPHERS)
def test_control_records_both_ways(bed: Bed, capture_path: Path, cipher: str) -> None:
    """The record's type is authenticated and arrives as it was sent, among application data."""
    handshake = control(22, "00" * 300)
    end = [recv(25_500), SHUTDOWN, EOF]
    case = Case(
        "control",
        [send(5000), CLOSE_NOTIFY, send(20_000, write=100, more=True), handshake, send(500), *end],
        [*end[:1], send(5000), CLOSE_NOTIFY, send(20_000, records=[100]), handshake, send(500), *end[1:]],
        cipher=cipher,
    )
    seen = exchange(bed, [case], capture_path)
    seen.offloaded()
    told = [{name: step[name] for name in ("kind", "data")} for step in (CLOSE_NOTIFY, handshake)]
    assert seen.peers[0]["control"] == told
    assert seen.guest[0]["records"] == told
    for direction in BOTH:
        assert {21: 1, 22: 1}.items() <= seen.wires[0][direction].types.items()


@pytest.mark.conformance(11)
@pytest.mark.parametrize("cipher", CIPHERS)
def test_record_numbers_that_start_anywhere(bed: Bed, capture_path: Path, cipher: str) -> None:
    """A connection that has spoken TLS before; numbers that pass 2^32; nonces that are not the number."""
    size = 100_000
    cases = [
        Case(f"from {first}", [send(size, write=3000), recv(size)], [recv(size), send(size, records=[3000])],
             cipher=cipher, rec_seq=first)
        for first in (1, 77, (1 << 32) - 5, (1 << 63) - 5)
    ]  # fmt: skip
    exchange(bed, cases, capture_path).offloaded()


@pytest.mark.conformance(10)
@pytest.mark.parametrize("listen", [False, True], ids=["connect", "listen"])
def test_both_directions_at_once(bed: Bed, capture_path: Path, listen: bool) -> None:
    """What the guest sends comes back while it sends; every family, either side connecting."""
    chunk, rounds = 200_000, 3
    roomy = {"options": {"SO_RCVBUF": 4 * chunk, "SO_SNDBUF": 4 * chunk}}
    steps = [step for _ in range(rounds) for step in (send(chunk), recv(chunk))]
    cases = [
        Case(f"echo {family} {cipher}", steps, [{"do": "echo", "size": rounds * chunk}], cipher=cipher, family=family,
             listen=7000 + number if listen else 0, guest_job=roomy)
        for number, (family, cipher) in enumerate((f, c) for f in ("4", "6", "mapped") for c in CIPHERS)
    ]  # fmt: skip
    seen = exchange(bed, cases, capture_path)
    seen.offloaded()


@pytest.mark.conformance(7)
def test_directions_alone_and_in_either_order(bed: Bed, capture_path: Path) -> None:
    """Contexts of one connection do not depend on each other."""
    size = 50_000
    talk = [send(size), recv(size)]
    echo = [{"do": "echo", "size": size}]

    def both(*dirs: list[str]) -> Case:
        return Case(f"install {dirs}", [*(install(*each) for each in dirs), *talk], echo)

    cases = [
        both(["tx", "rx"]),
        both(["rx", "tx"]),
        both(["tx"], ["rx"]),
        both(["rx"], ["tx"]),
        tx_case("only tx", send(size), size=size),
        rx_case("only rx", send(size), size=size),
    ]
    exchange(bed, cases, capture_path).offloaded()


@pytest.mark.conformance(13)
@pytest.mark.conformance(101)
def test_64_connections_at_once(bed: Bed, capture_path: Path) -> None:
    """All contexts are alive at the same time, and none is mistaken for another."""
    count, size = 64, 20_000
    steps = [ASK, ASKED, WAIT, send(size, write=999), recv(size)]
    families = cycle(("4", "6", "mapped"))
    cases = [
        Case(f"many {i}", steps, [{"do": "echo", "size": size + 1}], cipher=CIPHERS[i % 2], family=next(families),
             guest_job={"ss": False})
        for i in range(count)
    ]  # fmt: skip
    contexts: list[int] = []
    current: list[dict[str, int]] = []

    def look(running: Running) -> None:
        running.guest_waits()
        contexts.append(len(bed.nic.contexts()))
        current.append(bed.tls_stat())
        driver = bed.ethtool()
        assert driver["tx_tls_ctx"] - driver["tx_tls_del"] == driver["rx_tls_ctx"] - driver["rx_tls_del"] == count
        running.go_on()

    seen = exchange(bed, cases, capture_path, look)
    seen.offloaded()
    assert contexts == [2 * count]
    wait_until(lambda: not bed.nic.contexts(), "the device deletes them")
    assert current[0]["TlsCurrTxDevice"] == current[0]["TlsCurrRxDevice"] == count


def test_what_waits_to_be_read_is_not_overwritten(bed: Bed, capture_path: Path) -> None:
    """The driver cuts buffers from the same pages again, but not from those that a socket still has."""
    held, bulk = 400_000, 56 << 20
    cases = [
        rx_flow("held", [recv(1), WAIT, recv(held - 1)], [send(held)], guest_job={"options": {"SO_RCVBUF": 1 << 20}}),
        rx_flow("bulk", [recv(bulk), WAIT], [send(bulk)]),
    ]

    def meanwhile(run: Running) -> None:
        run.guest_waits()
        run.go_on()

    before = bed.ethtool()["rx_pages_reused"]
    with pairs(bed, 1):
        seen = exchange(bed, cases, capture_path, meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    assert bed.ethtool()["rx_pages_reused"] > before
