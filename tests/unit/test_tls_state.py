"""What a context says of itself after every packet, against a model that knows the whole stream."""

from __future__ import annotations

from bisect import bisect_right

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nicdev.abi import MAX_TCP_PAYLOAD, Direction
from tests.support.tls_oracle import SUITES, Suite, cut, stream
from tests.unit.test_tls_rx import context as rx_context
from tests.unit.test_tls_rx import receive
from tests.unit.test_tls_tx import context as tx_context
from tests.unit.test_tls_tx import send

# both wrap, at different times
TX_SEQ, RX_SEQ = 2**32 - 20, 2**32 - 700


@settings(max_examples=60, deadline=None)
@given(
    suite=st.sampled_from(SUITES),
    sizes=st.lists(st.one_of(st.integers(0, 64), st.integers(0, 16384)), min_size=1, max_size=6),
    data=st.data(),
)
@pytest.mark.conformance(19)
@pytest.mark.conformance(27)
def test_state_after_every_packet(suite: Suite, sizes: list[int], data: st.DataObject) -> None:
    """Expected sequence number, record number, packets and records; neither direction knows of the other's."""
    tx, rx = tx_context(suite, TX_SEQ), rx_context(suite, RX_SEQ, 1000)
    streams = {
        Direction.TX: stream(suite, sizes, first_number=5),
        Direction.RX: stream(suite, sizes[::-1], first_number=1000, seed=2),
    }
    seqs = {Direction.TX: TX_SEQ, Direction.RX: RX_SEQ}
    at = dict.fromkeys(streams, 0)
    packets = dict.fromkeys(streams, 0)
    size = len(streams[Direction.TX].wire)
    longest = range(MAX_TCP_PAYLOAD, size, MAX_TCP_PAYLOAD)  # behind each of these a packet must end
    edges = sorted(data.draw(st.sets(st.integers(1, size), max_size=20)).union(longest))
    turns = [(direction, len(piece)) for piece in cut(bytes(size), edges) for direction in streams]
    for direction, length in data.draw(st.permutations(turns)):
        records, start = streams[direction], at[direction]
        end = start + length
        if direction is Direction.TX:
            assert send(tx, TX_SEQ + start, records.framed[start:end]) == records.wire[start:end]
        else:
            assert receive(rx, RX_SEQ + start, records.wire[start:end])[1] == records.clear[start:end]
        at[direction] = end
        packets[direction] += 1
        for known, context in ((Direction.TX, tx), (Direction.RX, rx)):
            state, done = context.describe(), bisect_right(streams[known].ends, at[known])
            assert state["dir"] == known.name.lower()
            assert state["state"] == "in_sync"
            assert state["seq"] == (seqs[known] + at[known]) % 2**32
            assert state["record"] == streams[known].first_number + done
            assert (state["packets"], state["records"]) == (packets[known], done)
