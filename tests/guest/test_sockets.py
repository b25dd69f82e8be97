"""What programs do with their sockets: every call that sends or receives, in every mood, is the device's work."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.bed import Bed
from tests.guest.cases import ZEROCOPY, install, rx_flow
from tests.guest.exchange import (
    ASK,
    ASKED,
    BOTH,
    CIPHERS,
    EOF,
    SHUTDOWN,
    Case,
    Step,
    exchange,
    recv,
    rx_case,
    send,
    tx_case,
)

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

MAX_RECORD = 1 << 14
SIZE = 200 << 10
SMALL_BUFFERS = {"options": {"SO_SNDBUF": 1, "SO_RCVBUF": 1}}  # the kernel makes them as large as it needs them
NO_PAD: Step = {"do": "refused_option", "name": "TLS_RX_EXPECT_NO_PAD", "value": 1, "errno": "EINVAL"}
MSG_OOB, MSG_ZEROCOPY = 0x1, 0x4000000  # linux/socket.h


@pytest.mark.conformance(3)
@pytest.mark.parametrize("cipher", CIPHERS)
def test_every_call_that_sends(bed: Bed, capture_path: Path, cipher: str) -> None:
    """Single bytes, 1,024 buffers a call, out of a pipe, without blocking, into the smallest of buffers."""
    few = 600
    cases = [
        tx_case("bytes", send(few, write=1), size=few, cipher=cipher),
        tx_case("vector", send(SIZE, write=37, how="vector"), size=SIZE, cipher=cipher),
        tx_case("splice", send(SIZE, write=9999, how="splice"), size=SIZE, cipher=cipher),
        tx_case("splice by copy-free promise", install("tx"), ZEROCOPY, send(SIZE, how="splice"),
                size=SIZE, cipher=cipher),
        tx_case("epoll", send(SIZE, write=3000, how="epoll"), size=SIZE, cipher=cipher, guest_job=SMALL_BUFFERS),
        tx_case("small", send(SIZE), size=SIZE, cipher=cipher, guest_job=SMALL_BUFFERS, peer_job=SMALL_BUFFERS),
    ]  # fmt: skip
    seen = exchange(bed, cases, capture_path)
    seen.offloaded()
    for case, stream in zip(cases[:2], seen.streams("tx")[:2], strict=True):
        whole = few if case.seed == "bytes" else -(-SIZE // MAX_RECORD)
        assert stream.records >= whole


@pytest.mark.parametrize("cipher", CIPHERS)
def test_every_call_that_receives(bed: Bed, capture_path: Path, cipher: str) -> None:
    """MSG_PEEK, MSG_WAITALL, splice, edges of epoll, buffers far smaller than a record."""

    def case(name: str, size: int = SIZE, records: tuple[int, ...] = (MAX_RECORD, 500), **how: object) -> Case:
        return rx_flow(f"recv {name}", [recv(size, **how)], [send(size, records=records)], cipher=cipher)

    cases = [
        case("short", read=77, size=40_000),
        case("a byte", read=1, size=600, records=(40,)),
        case("peek", read=5000, how="peek"),
        case("peek whole", how="peek"),
        case("waitall", read=50_000, how="waitall"),
        case("splice", read=6000, how="splice"),
        case("epoll", read=4000, how="epoll"),
        rx_case("recv small", send(9000, records=[900]), size=9000, cipher=cipher, guest_job=SMALL_BUFFERS),
    ]
    exchange(bed, cases, capture_path).offloaded()


def test_both_directions_of_one_socket_at_once(bed: Bed, capture_path: Path) -> None:
    """A thread receives while the others, or other processes that share the socket, send; blocks come in any order."""
    blocks = 512 * 4 * 60
    shared = [(how, n) for how in ("threads", "processes") for n in (512, 2048)]
    cases = [
        Case(
            f"{how} {n}",
            [ASK, {"do": "recv_aside", "size": SIZE}, send(blocks, write=n, how=how), SHUTDOWN],
            [ASKED, send(SIZE), {"do": "recv_blocks", "size": blocks}, EOF],
            cipher=CIPHERS[number % 2],
        )
        for number, (how, n) in enumerate(shared)
    ]
    seen = exchange(bed, cases, capture_path)
    seen.arrived()
    seen.kernel_offloads()
    seen.everything_by_the_device()
    assert seen.report.plaintext_hits == 0
    for (_, write), stream in zip(shared, seen.streams("tx"), strict=True):
        assert stream.ok
        assert stream.records == blocks // write + 1  # and the byte that asks


def test_what_the_kernel_refuses_leaves_the_socket_as_it_was(bed: Bed, capture_path: Path) -> None:
    """MSG_ZEROCOPY, urgent data, and what only TLS 1.3 can: nothing of it is sent, all else goes on."""
    refusals: list[Step] = [{"do": "refused", "flags": flags, "errno": "ENOTSUP"} for flags in (MSG_ZEROCOPY, MSG_OOB)]
    steps = [install("tx"), NO_PAD, send(5000), *refusals, send(5000, write=700, more=True), *refusals, send(1)]
    seen = exchange(bed, [tx_case("refused", *steps, size=10_001)], capture_path)
    seen.offloaded()
    assert seen.streams("tx")[0].records == 3


@pytest.mark.parametrize("cipher", CIPHERS)
def test_alerts_and_handshake_records(bed: Bed, capture_path: Path, cipher: str) -> None:
    """Every type of TLS 1.2, an empty record too, between application data that is still open (MSG_MORE)."""
    kinds = (20, 21, 22, 24)
    told = [{"kind": kind, "data": bytes(range(kind % 7 * 30)).hex()} for kind in kinds]
    records: list[Step] = [{"do": "record", **record} for record in told]
    between = [step for record in records for step in (send(3000, write=1000, more=True), record)]
    answer = [step for record in records for step in (send(3000, records=[1000]), record)]
    size = len(kinds) * 3000
    guest = [*between, recv(size), {"do": "recv_record"}, SHUTDOWN, EOF]
    peer = [recv(size), *answer, records[1], SHUTDOWN, EOF]
    seen = exchange(bed, [Case("types", guest, peer, cipher=cipher)], capture_path)
    seen.offloaded()
    assert seen.peers[0]["control"] == told
    assert seen.guest[0]["records"] == [*told, told[1]]


@pytest.mark.conformance(36)
@pytest.mark.conformance(99)
def test_dozens_of_records_of_64_bytes_in_a_packet(bed: Bed, capture_path: Path) -> None:
    """Both ways, written one by one or, where the kernel can (7.2), cut by it."""
    size = 64 * 1500
    limited: list[Step] = [install(*BOTH), {"do": "option", "name": "TLS_TX_MAX_PAYLOAD_LEN", "value": 64}, ASK]
    kernel_cuts = tuple(map(int, bed.agent.run(["uname", "-r"]).text.split("-")[0].split(".")[:2])) >= (7, 2)
    write = size if kernel_cuts else 64
    guest = [*(limited if kernel_cuts else limited[::2]), send(size, write=write), recv(size), SHUTDOWN, EOF]
    peer = [ASKED, recv(size), send(size, records=[64], writes=[size * 2]), EOF, SHUTDOWN]
    cases = [
        Case(f"64 {cipher}", guest, peer, cipher=cipher, guest_job={"options": {"TCP_CORK": 1}}) for cipher in CIPHERS
    ]
    seen = exchange(bed, cases, capture_path)
    seen.offloaded()
    for direction, extra in (("tx", 1), ("rx", 0)):
        for stream in seen.streams(direction):
            assert stream.records == size // 64 + extra
        packets = seen.nic[f"{direction}_tls_packets"]
        assert seen.nic[f"{direction}_tls_records"] > 12 * packets, direction
