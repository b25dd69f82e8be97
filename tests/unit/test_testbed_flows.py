"""The demonstration's flows, told apart on the wire."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.flows import Flow, Outcome, count_wire_records, wire_keys
from testbed.wire.decoder import Report, StreamReport, matches
from testbed.wire.reassembly import Endpoint

CIPHER = "aes-128-gcm"
GUEST, WIRE = "198.51.100.2", "198.51.100.1"
PORT = 40000  # the kernel may give it to connections that end at different ports


@pytest.mark.parametrize("direction", ["tx", "rx"])
def test_two_flows_may_have_the_same_port_of_the_guest(direction: str, tmp_path: Path) -> None:
    outcomes = [
        Outcome(direction, CIPHER, "4", peer, 1, guest_port=PORT, peer_port=port)
        for peer, port in (("openssl", 1001), ("raw", 1002))
    ]
    ends = [(Endpoint(GUEST, PORT), Endpoint(WIRE, outcome.peer_port)) for outcome in outcomes]
    streams = [
        StreamReport(number, pair[way], pair[1 - way], keys="fixed", records=records)
        for number, (pair, records) in enumerate(zip(ends, (10, 20), strict=True))
        for way in (0, 1)
    ]
    count_wire_records(outcomes, Report(0, streams, 0, []))
    assert [outcome.records for outcome in outcomes] == [10, 20]

    flows = [(Flow(o.dir, o.cipher, o.family, o.peer, o.bytes), o) for o in outcomes]
    keys = wire_keys(flows, tmp_path / "none").fixed
    fitting = [
        [matches(key.source, s.source) and matches(key.destination, s.destination) for s in streams] for key in keys
    ]
    assert fitting == [[False, False, True, False], [False, False, False, True]], "those of the raw flow, for it alone"
