"""Which packets a rule of the fault director meets: flow, record, part, range, n-th, kind."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6

from nicdev.faults.director import Director
from nicdev.faults.parse import parse
from nicdev.stats import Counter
from tests.support.ether import ETH
from tests.support.fault_world import (
    CUT,
    PLAIN,
    RECORD,
    RX,
    STREAM,
    TX,
    World,
    holding,
    rule,
    run,
    segment,
)


@pytest.mark.parametrize(
    ("lines", "dropped"),
    [
        (["nth = 3"], [2 * CUT]),
        (["nth = 3", "count = 2"], [2 * CUT, 3 * CUT]),
        (["flow = 1", "record = 7", 'part = "header"'], holding(7 * RECORD, 7 * RECORD + 5)),
        (["record = 7", 'part = "nonce"'], holding(7 * RECORD + 5, 7 * RECORD + 13)),
        (["record = 3", 'part = "payload"', 'count = "all"'], holding(3 * RECORD + 13, 4 * RECORD - 16)),
        (["record = 3", 'part = "tag"', 'count = "all"'], holding(4 * RECORD - 16, 4 * RECORD)),
        (["record = 3", 'count = "all"'], holding(3 * RECORD, 4 * RECORD)),
        (["record = 3", "nth = 2"], holding(3 * RECORD, 4 * RECORD)[1:2]),
        (["record = 3", "byte = 300"], holding(3 * RECORD + 300, 3 * RECORD + 301)),
        (["record = 3", 'part = "tag"', "byte = 15"], holding(4 * RECORD - 1, 4 * RECORD)),
        (["seq = [1000, 1300]", 'count = "all"'], holding(1000, 1300)),
        (["seq = [4000, 4200]"], holding(4000, 4200)[:1]),
        (["record = 99"], []),
        (["flow = 2"], []),
        (["flow = 2", "record = 1"], []),
        (['local = "198.51.100.2:4000"', 'remote = "*:443"'], [0]),
        (['local = "198.51.100.3:*"'], []),
        (['remote = "[2001:db8::1]:443"'], []),
    ],
)
def test_address(lines: list[str], dropped: list[int]) -> None:
    world = World(rule("drop", *lines))
    world.context()
    assert run(world) == dropped
    assert world.stats[Counter.FAULT_DROPPED] == len(dropped) == world.struck()[0]


def test_what_was_seen_once_is_not_new_again() -> None:
    world = World(rule("drop", "retransmissions = false", 'count = "all"', "nth = 2"))
    pieces = [(at, segment(at, bytes(size))) for at, size in ((0, 3000), (0, 1000), (1000, 1000), (2000, 1001))]
    assert run(world, pieces) == [2000]


def test_record_numbers_count_from_the_first_of_the_context() -> None:
    world = World(rule("drop", "record = 2", 'part = "header"'))
    world.context(rec_seq=5000)
    assert run(world) == holding(2 * RECORD, 2 * RECORD + 5)[:1]


def test_flows_count_per_direction_in_order_of_creation() -> None:
    world = World(rule("drop", "flow = 2", 'count = "all"'))
    for direction, port in ((TX, 4000), (RX, 4000), (RX, 4001), (TX, 4001), (TX, 4002)):
        world.context(direction, port)
    assert [port for port in (4000, 4001, 4002) if not world.pass_(segment(port=port))] == [4001]
    world.table.delete(3, 1)
    assert world.pass_(segment(at=1, port=4001))
    world.context(TX, 4001)  # the same ends, another flow
    assert world.pass_(segment(at=2, port=4001))


def test_a_scenario_that_comes_later_finds_flows_where_they_are() -> None:
    world = World("")
    world.context()
    world.context(port=4001)
    late = Director(parse(rule("drop", "flow = 2", "record = 1"), "t"), world.table, world.stats, lambda: 0.0)
    frame = segment(RECORD, STREAM[RECORD : RECORD + CUT], port=4001)
    first = segment(0, STREAM[:CUT], port=4001)
    fed = [late.feed(TX, PLAIN, memoryview(bytearray(f)), 0) for f in (first, frame)]
    assert [len(out) for out in fed] == [1, 0]


def test_rx_flows_are_found_from_the_other_end() -> None:
    world = World(rule("drop", "flow = 1", "record = 1", direction="rx"))
    world.context(RX)
    assert world.pass_(segment(0, STREAM[:600]), direction=RX)  # the guest's own
    assert world.pass_(segment(0, STREAM[:RECORD], outgoing=False), direction=RX)
    assert not world.pass_(segment(RECORD, STREAM[RECORD:600], outgoing=False), direction=RX)


@pytest.mark.parametrize(("too", "dropped"), [("false", [True, False, False]), ("true", [True, True, False])])
def test_first_transmissions_or_repetitions_as_well(too: str, dropped: list[bool]) -> None:
    world = World(rule("drop", "record = 1", 'part = "header"', "count = 2", f"retransmissions = {too}"))
    world.context()
    first, second = segment(0, STREAM[:RECORD]), segment(RECORD, STREAM[RECORD:700])
    assert world.pass_(first)
    assert [not world.pass_(second) for _ in range(3)] == dropped


@pytest.mark.parametrize(
    ("only", "dropped"),
    [("data", [False, False, True, False]), ("tcp", [False, True, True, True]), ("any", [True] * 4)],
)
def test_kinds_of_packets(only: str, dropped: list[bool]) -> None:
    world = World(rule("drop", f'only = "{only}"', 'count = "all"'))
    udp = bytes(ETH / IP() / UDP() / b"x")
    fin = segment(1, b"", flags="FA")
    six = bytes(ETH / IPv6() / TCP(flags="A"))
    assert [not world.pass_(frame) for frame in (udp, fin, segment(), six)] == dropped
