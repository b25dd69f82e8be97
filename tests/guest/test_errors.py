"""Records that are not what they should be, and bytes that are none: the device stays out of the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.bed import Bed
from testbed.peers.stream import sha256_of
from tests.guest.cases import install, recv_clear, send_clear
from tests.guest.conftest import wait_until
from tests.guest.exchange import (
    CIPHERS,
    EOF,
    RECORD_OVERHEAD,
    WAIT,
    Case,
    Running,
    disturbed,
    exchange,
    netem,
    recv,
    rx_case,
    send,
)

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

RECORD = 1000
BAD = 5  # the record that is spoiled, counted from 0
SPOTS = ("tag", "ciphertext", "nonce", "type")


@pytest.mark.conformance(4)
@pytest.mark.conformance(86)
@pytest.mark.conformance(87)
@pytest.mark.conformance(91)
@pytest.mark.conformance(108)
@pytest.mark.parametrize("together", [False, True], ids=["record by record", "many in a packet"])
def test_records_that_do_not_verify(bed: Bed, capture_path: Path, together: bool) -> None:
    """The guest gets what is before such a record, then EBADMSG by the kernel, which has the bytes of the wire."""
    size = 20 * RECORD
    how = {"writes": [size * 2]} if together else {"writes": [RECORD + RECORD_OVERHEAD], "apart": True}
    cases = [
        rx_case(f"spoiled {spot} {cipher}", send(size, records=[RECORD], **how), size=size, cipher=cipher,
                peer_job={"spoil": {BAD: spot}})
        for cipher in CIPHERS
        for spot in SPOTS
    ]  # fmt: skip
    seen = exchange(bed, cases, capture_path)
    for case, guest, stream in zip(cases, seen.guest, seen.streams("rx"), strict=True):
        assert guest["error"]["errno"] == "EBADMSG", case.seed
        assert guest["received"] == BAD * RECORD, case.seed
        assert guest["sha256_received"] == sha256_of(case.seed, BAD * RECORD), case.seed
        assert [failure["record"] for failure in stream.failures] == [BAD], case.seed
    count = len(cases)
    assert seen.tls_stat["TlsRxDevice"] == count
    # The kernel counts attempts: a call that returns the data before the record leaves the error to the next one.
    assert count <= seen.tls_stat["TlsDecryptError"] <= 2 * count
    assert seen.nic["rx_tls_auth_fail"] == count
    assert seen.nic["rx_tls_lost_sync"] <= count  # behind a wrong tag no place is certain
    assert seen.driver["rx_tls_err"] == count


@pytest.mark.conformance(86)
@pytest.mark.parametrize("spot", ["version", "length"])
def test_a_header_that_is_none(bed: Bed, capture_path: Path, spot: str) -> None:
    """The device finds no record where one must be: it loses sync, and the kernel judges what came."""
    size = 20 * RECORD
    how = {"writes": [RECORD + RECORD_OVERHEAD], "apart": True}
    case = rx_case("header", send(size, records=[RECORD], **how), size=size, peer_job={"spoil": {BAD: spot}})
    seen = exchange(bed, [case], capture_path)
    assert seen.guest[0]["error"]["errno"] in ("EBADMSG", "EINVAL", "EMSGSIZE")
    assert seen.guest[0]["received"] == BAD * RECORD
    assert seen.guest[0]["sha256_received"] == sha256_of(case.seed, BAD * RECORD)
    assert seen.nic["rx_tls_records"] >= BAD


CLEAR = bytes.fromhex("c1ea") * 400


@pytest.mark.conformance(17)
@pytest.mark.conformance(113)
def test_clear_bytes_are_sent_again_as_they_were(bed: Bed, capture_path: Path) -> None:
    """Bytes sent before the offload and lost: TCP repeats them when the context is there already."""
    size = 100_000
    guest = [WAIT, send_clear(CLEAR), install("tx", "rx"), send(size, write=5000), recv(size)]
    case = Case("again", guest, [recv_clear(len(CLEAR)), recv(size), send(size)], tx_start=len(CLEAR))

    def lose_them(running: Running) -> None:
        running.guest_waits()
        made = bed.ethtool()["tx_tls_ctx"]
        with disturbed(bed, netem("loss 100%")):
            running.go_on()
            wait_until(lambda: bed.ethtool()["tx_tls_ctx"] > made, "the context is there")

    seen = exchange(bed, [case], capture_path, lose_them)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    assert CLEAR in capture_path.read_bytes()
    assert seen.driver["tx_tls_skip_no_sync_data"] >= 1
    assert seen.driver["tx_tls_drop_bypass_req"] == seen.driver["tx_tls_drop_no_sync_data"] == 0


@pytest.mark.conformance(17)
def test_clear_bytes_that_wait_for_the_window(bed: Bed, capture_path: Path) -> None:
    """The peer reads nothing until the context is there: most clear bytes leave after it, and before the records."""
    size = 300_000
    clear = CLEAR * 400
    case = Case(
        "window",
        [send_clear(clear), install("tx"), send(size, write=5000)],
        [WAIT, recv_clear(len(clear)), recv(size), EOF],
        dirs=("tx",),
        tx_start=len(clear),
        guest_job={"options": {"SO_SNDBUF": 4 * len(clear)}},
        peer_job={"options": {"SO_RCVBUF": 20_000}},
    )

    made = bed.ethtool()["tx_tls_ctx"]

    def let_them_wait(running: Running) -> None:
        wait_until(lambda: bed.ethtool()["tx_tls_ctx"] > made, "the context is there")
        running.peers[0].await_waiting()
        running.peers[0].release()

    seen = exchange(bed, [case], capture_path, let_them_wait)
    seen.offloaded()
    assert seen.driver["tx_tls_skip_no_sync_data"] >= 1
    assert seen.driver["tx_tls_drop_bypass_req"] == 0
