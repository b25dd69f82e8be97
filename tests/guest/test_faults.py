"""The fault director against a running guest: scenarios over the control socket, and what the guest makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.bed import Bed
from testbed.errors import SetupError
from testbed.peers.stream import sha256_of
from tests.guest.exchange import CIPHERS, RECORD_OVERHEAD, WAIT, Running, exchange, rx_case, send, tx_case

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

RECORD = 1000
BIG = 2 << 20
LOSS = """
seed = 7
[rx]
segments = "wire"
drop = 0.01
"""
LOSS_BOTH_WAYS = """
seed = 8
[tx]
segments = "joined"
drop = 0.01
[rx]
segments = "joined"
drop = 0.01
"""
TAG_FLIP = """
[[rule]]
name = "tag of record 3"
action = "corrupt"
direction = "rx"
flow = 1
record = 3
part = "tag"
"""
REFUSE = """
[[rule]]
action = "refuse-add"
direction = "tx"
"""


@pytest.mark.conformance(41)
def test_loss_of_segments_of_wire_size(bed: Bed, capture_path: Path) -> None:
    """One of a hundred segments to the guest is lost: all data arrives, most records are still the device's."""
    cases = [rx_case(f"lossy {c}", send(BIG), size=BIG, cipher=c) for c in CIPHERS]
    with bed.nic.faults(LOSS):
        seen = exchange(bed, cases, capture_path)
        struck = bed.nic.fault_rules()
    seen.arrived()
    seen.kernel_offloads()
    assert seen.nic["fault_dropped"] == struck["rx drop"]
    assert 10 <= seen.nic["fault_dropped"] <= 80  # 2 times 1,500 segments
    records = sum(stream.records for stream in seen.streams("rx"))
    assert records / 3 < seen.nic["rx_tls_records"] <= records
    assert seen.nic["rx_tls_auth_fail"] == 0


def test_loss_both_ways_with_the_rest_in_large_packets(bed: Bed, capture_path: Path) -> None:
    """Segments of wire size are lost, what else there is stays together: every byte arrives, none in the clear."""
    cases = [tx_case(f"joined tx {c}", send(BIG, write=16384), size=BIG, cipher=c) for c in CIPHERS]
    cases += [rx_case(f"joined rx {c}", send(BIG), size=BIG, cipher=c) for c in CIPHERS]
    with bed.nic.faults(LOSS_BOTH_WAYS):
        seen = exchange(bed, cases, capture_path)
        struck = bed.nic.fault_rules()
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    assert seen.nic["fault_dropped"] == sum(struck.values())
    assert all(10 <= times <= 80 for times in struck.values())  # 2 times 1,500 segments each
    assert seen.nic["fault_cut"] < 1500  # "wire": four times that, less a few
    sent, received = seen.streams("tx"), seen.streams("rx")
    assert seen.nic["tx_tls_bytes"] == seen.driver["tx_tls_encrypted_bytes"] >= sum(stream.bytes for stream in sent)
    assert seen.driver["tx_tls_fallback"] == 0
    records = sum(stream.records for stream in received)
    assert records / 2 < seen.nic["rx_tls_records"] <= records
    assert seen.nic["rx_tls_auth_fail"] == seen.nic["rx_tls_bad_csum"] == 0


@pytest.mark.conformance(86)
@pytest.mark.conformance(91)
def test_a_bit_flipped_in_the_tag_of_record_3(bed: Bed, capture_path: Path) -> None:
    """TCP does not notice, TLS does: three records arrive, then EBADMSG; what was on the wire was right."""
    size = 20 * RECORD
    steps = send(size, records=[RECORD], writes=[RECORD + RECORD_OVERHEAD], apart=True)
    case = rx_case("tag flip", steps, size=size)
    with bed.nic.faults(TAG_FLIP):
        seen = exchange(bed, [case], capture_path)
        assert bed.nic.fault_rules() == {"tag of record 3": 1}
    assert seen.guest[0]["error"]["errno"] == "EBADMSG"
    assert seen.guest[0]["received"] == 3 * RECORD
    assert seen.guest[0]["sha256_received"] == sha256_of(case.seed, 3 * RECORD)
    assert seen.nic["fault_corrupted"] == seen.nic["rx_tls_auth_fail"] == 1
    assert seen.streams("rx")[0].failures == []


@pytest.mark.conformance(8)
def test_a_refused_context_is_as_if_never_tried(bed: Bed, capture_path: Path) -> None:
    """The socket works in software; the next one is the device's again."""
    first = tx_case("refused", send(BIG), WAIT, size=BIG)
    second = tx_case("taken", send(BIG), size=BIG)

    def no_residue(running: Running) -> None:
        running.guest_waits()
        assert bed.nic.contexts() == []
        running.go_on()

    with bed.nic.faults(REFUSE):
        seen = exchange(bed, [first], capture_path, no_residue)
        seen.arrived()
        seen.wire_is_encrypted()
        assert seen.guest[0]["txconf"] == "sw"
        assert (seen.tls_stat["TlsTxSw"], seen.tls_stat["TlsTxDevice"]) == (1, 0)
        assert (seen.nic["fault_adds_refused"], seen.nic["ctx_refused"], seen.nic["ctx_tx_added"]) == (1, 1, 0)
        assert seen.driver["tls_add_failed"] == 1
        exchange(bed, [second], capture_path).offloaded()


def test_a_bad_scenario_changes_nothing(bed: Bed) -> None:
    with bed.nic.faults(REFUSE):
        with pytest.raises(SetupError, match="rule 1: key part: needs record"):
            bed.nic.ask("faults", do="set", text='[[rule]]\naction = "drop"\ndirection = "tx"\npart = "tag"')
        assert bed.nic.fault_rules() == {"refuse-add 1": 0}
    assert bed.nic.ask("faults", do="show") == {"nics": [None]}
