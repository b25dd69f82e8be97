"""The collector of reference cycles leaves alone what stays."""

from __future__ import annotations

import gc
import weakref

import pytest

from nicdev.abi import Direction, RxPersonality
from nicdev.edge.collector import seldom_full
from nicdev.tls.table import ContextTable
from tests.support.tls_oracle import GCM_1_2, stream


class Node:
    def __init__(self) -> None:
        self.me = self


def full_collections(objects: int) -> int:
    """How many happen while so many objects are made that stay."""
    before = gc.get_stats()[2]["collections"]
    kept = [[number] for number in range(objects)]
    assert len(kept) == objects
    return int(gc.get_stats()[2]["collections"] - before)


def test_what_stays_is_not_looked_at_again_and_again() -> None:
    gc.collect()
    many = 4 * len(gc.get_objects())
    usual = gc.get_threshold()
    with seldom_full():
        assert full_collections(many) == 0
    assert gc.get_threshold() == usual
    assert full_collections(many) > 0, "it would be, else"


def test_young_cycles_are_collected_as_always() -> None:
    with seldom_full():
        gone = weakref.ref(Node())
        kept = [[number] for number in range(2 * gc.get_threshold()[0])]
        assert kept
        assert gone() is None


@pytest.mark.parametrize("personality", RxPersonality)
def test_contexts_leave_nothing_to_collect(personality: RxPersonality) -> None:
    """Neither those that were never used, nor one with holes, nor one that sent."""
    records = stream(GCM_1_2, [1000] * 40)
    gc.collect()
    gc.disable()
    try:
        table = ContextTable(9)
        for slot in range(3):
            table.add(slot, 1, GCM_1_2.params(Direction.TX, 0, 0))
        table.add(3, 1, GCM_1_2.params(Direction.RX, 0, 0, rx_personality=personality))
        table.get_tx(1, 1).encrypt(0, memoryview(bytearray(records.framed[:1500])))
        for start, end in ((0, 1500), (3000, 5000), (9000, 30_000), (2000, 3000)):
            table.get_rx(3, 1).decrypt(start, memoryview(bytearray(records.wire[start:end])))
        table.delete(3, 1)
        table.delete(0, 1)
        table.clear()
        del table
        assert gc.collect() == 0
    finally:
        gc.enable()
