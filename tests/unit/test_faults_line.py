"""Packets and segments on their way through the fault director, and the same twice."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether

from nicdev.abi import Direction
from nicdev.faults.parcel import Parcel
from nicdev.faults.parse import parse
from nicdev.faults.scenario import Scenario
from nicdev.stats import Counter
from nicdev.wire import checksum
from tests.support.fault_world import (
    GSO,
    PARTIAL,
    PIECES,
    PLAIN,
    RX,
    START,
    STREAM,
    TX,
    World,
    rule,
    run,
    segment,
    valid,
)

OPEN = struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 16, 0)  # NEEDS_CSUM, csum_start 34, csum_offset 16

# -- segments ------------------------------------------------------------------------------------------------------


def completed(parcel: Parcel) -> bytes:
    """The frame as whoever takes the parcel has to understand it."""
    frame = bytearray(parcel.frame)
    if bytes(parcel.header) != PLAIN:
        assert bytes(parcel.header) == OPEN
        checksum.finish_partial(frame, 34, 16)
    return bytes(frame)


@pytest.mark.parametrize(
    ("direction", "whole", "piece"),
    [(TX, GSO, OPEN), (TX, b"\0" + GSO[1:], PLAIN), (RX, GSO, PLAIN), (RX, b"\0" + GSO[1:], PLAIN)],
)
def test_large_packets_stay_whole_or_are_cut_to_wire_size(direction: Direction, whole: bytes, piece: bytes) -> None:
    """On tx what is left to do about the whole's checksum is left to do about the pieces'; a wire brings it done."""
    other = RX if direction is TX else TX
    frame = segment(0, STREAM[:5000])
    assert World("").pass_(frame, whole, direction=direction) == [frame]
    world = World(f'[{direction.name.lower()}]\nsegments = "wire"')
    out = world.director.feed(direction, whole, memoryview(bytearray(frame)), 0)
    assert [bytes(parcel.header) for parcel in out] == [piece] * 5
    packets = [Ether(completed(parcel)) for parcel in out]
    assert b"".join(bytes(packet[TCP].payload) for packet in packets) == STREAM[:5000]
    assert [packet[TCP].seq for packet in packets] == [(START + 1000 * n) & 0xFFFFFFFF for n in range(5)]
    assert all(valid(bytes(packet)) for packet in packets)
    assert world.pass_(frame, whole, direction=other) == [frame]
    small = segment(0, b"small")
    assert world.pass_(small, PARTIAL, direction=direction) == [small]
    assert world.stats[Counter.FAULT_CUT] == 4


def test_a_packet_of_too_many_segments_stays_whole() -> None:
    world = World('[tx]\nsegments = "wire"')
    tiny = struct.pack("<BBHHHHH", 1, 1, 54, 1, 34, 16, 0)
    frame = segment(0, STREAM[:5000])
    assert world.pass_(frame, tiny) == [frame]


def test_faults_meet_segments_not_packets() -> None:
    world = World('[tx]\nsegments = "wire"\n' + rule("drop", "record = 3", 'part = "header"'))
    world.context()
    out = world.pass_(segment(0, STREAM[:5000]), GSO)
    assert [(Ether(frame)[TCP].seq - START) % 2**32 for frame in out] == [0, 2000, 3000, 4000]


# -- the same twice ------------------------------------------------------------------------------------------------

EVERYTHING = """
[tx]
segments = "wire"
drop = 0.1
duplicate = 0.1
corrupt = 0.1
reorder = 0.1
delay = 0.1
[rx]
drop = 0.3
"""


def everything(scenario: Scenario, jitter: float = 0) -> list[bytes]:
    """What leaves of 400 packets in both directions."""
    world = World(scenario)
    world.context()
    out = []
    for n in range(200):
        at = n % 20 * 1000
        out += world.pass_(segment(at, (STREAM * 2)[at : at + 3000]), GSO, now=n / 100 + (n % 3) * jitter)
        out += world.pass_(segment(n, b"back", outgoing=False), now=n / 100, direction=RX)
    return out + [bytes(parcel.frame) for _, parcel in world.director.flush()]


def test_the_same_seed_and_packets_give_the_same_bytes() -> None:
    scenario = parse(f"seed = 1\n{EVERYTHING}", "t")
    once = everything(scenario)
    assert once == everything(scenario)
    assert once != everything(replace(scenario, seed=2))
    assert sorted(once) == sorted(everything(scenario, jitter=0.002))  # time changes the order and nothing else


def test_a_rule_does_not_change_the_decisions_of_others() -> None:
    text = "[tx]\ndrop = 0.2\n"
    alone = run(World(text))
    among = World(text + "duplicate = 0.5\n" + rule("corrupt", "rate = 0.9") + "[rx]\ndrop = 0.5\n")
    assert run(among) == alone
    assert 0 < len(alone) < len(PIECES)


def test_a_rate_is_about_kept() -> None:
    world = World("[tx]\ndrop = 0.05")
    dropped = sum(not world.pass_(segment(n, b"x")) for n in range(2000))
    assert 70 <= dropped <= 130
    assert world.stats[Counter.FAULT_DROPPED] == dropped
