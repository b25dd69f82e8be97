"""What each action of the fault director does to a packet."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP, UDP

from nicdev.faults import line
from nicdev.stats import Counter
from tests.support.ether import ETH
from tests.support.fault_world import (
    PARTIAL,
    PLAIN,
    RECORD,
    STREAM,
    TX,
    World,
    rule,
    segment,
    valid,
)


def test_duplicate_is_a_copy_of_its_own() -> None:
    world = World(rule("duplicate"))
    frame = segment()
    one, two = world.director.feed(TX, PLAIN, memoryview(bytearray(frame)), 0)
    assert bytes(one.frame) == bytes(two.frame) == frame
    one.frame[-1] ^= 0xFF  # as a device does that decrypts in place
    assert bytes(two.frame) == frame
    assert world.pass_(frame) == [frame]
    assert world.stats[Counter.FAULT_DUPLICATED] == 1


def flipped(before: bytes, after: bytes) -> list[int]:
    """Bits that differ, checksums of TCP (bytes 50, 51) aside."""
    one, two = (f[:50] + b"\0\0" + f[52:] for f in (before, after))
    difference = int.from_bytes(one, "big") ^ int.from_bytes(two, "big")
    return [len(one) * 8 - 1 - n for n in range(len(one) * 8) if difference >> n & 1]


@pytest.mark.parametrize("header", [PLAIN, PARTIAL])
@pytest.mark.parametrize(
    ("part", "low", "high"),
    [("header", 0, 5), ("nonce", 5, 13), ("payload", 13, RECORD - 16), ("tag", RECORD - 16, RECORD)],
)
def test_corrupt_flips_one_bit_of_the_part_and_repairs_the_checksum(
    header: bytes, part: str, low: int, high: int
) -> None:
    world = World(rule("corrupt", "record = 1", f'part = "{part}"'))
    world.context()
    frame = segment(0, STREAM[:1200])
    (out,) = world.pass_(frame, header)
    (bit,) = flipped(frame, out)
    assert RECORD + low <= bit // 8 - 54 < RECORD + high
    assert valid(out) or header == PARTIAL  # a checksum that is left to others is theirs
    assert (out[50:52] == frame[50:52]) == (header == PARTIAL)
    assert world.stats[Counter.FAULT_CORRUPTED] == 1


def test_corrupt_one_bit_that_is_named() -> None:
    world = World(rule("corrupt", "record = 0", 'part = "tag"', "byte = 15", "bit = 7"))
    world.context()
    frame = segment(0, STREAM[:600])
    (out,) = world.pass_(frame)
    assert flipped(frame, out) == [8 * (54 + RECORD - 1)]


@pytest.mark.parametrize("header", [PLAIN, PARTIAL])
def test_corrupt_with_a_checksum_that_tells(header: bytes) -> None:
    world = World('[tx]\nsegments = "wire"\n' + rule("corrupt", 'checksum = "wrong"'))
    frame = segment(payload=b"data" * 9)
    (out,) = world.director.feed(TX, header, memoryview(bytearray(frame)), 0)
    assert bytes(out.header) == PLAIN
    assert len(flipped(frame, bytes(out.frame))) == 1
    assert not valid(bytes(out.frame))


def test_corrupt_what_is_no_tcp() -> None:
    world = World(rule("corrupt", 'only = "any"', "count = 2"))
    for frame in (bytes(ETH / IP() / UDP() / b"x"), segment(payload=b"")):
        (out,) = world.pass_(frame)
        assert out[:14] == frame[:14]
        assert out != frame


def names(frames: list[bytes]) -> str:
    return "".join(chr(frame[-1]) for frame in frames)


def letters(world: World, text: str, now: float = 0, port: int = 4000) -> str:
    """Feed one segment per letter; what came out."""
    return "".join(names(world.pass_(segment(ord(c), c.encode(), port=port), now=now)) for c in text)


@pytest.mark.parametrize(("distance", "out"), [(1, "abdcef"), (2, "abdecf"), (3, "abdefc"), (9, "abdef")])
def test_reorder_lets_others_overtake(distance: int, out: str) -> None:
    world = World(rule("reorder", "nth = 3", f"distance = {distance}"))
    assert letters(world, "abcdef") == out
    assert world.stats[Counter.FAULT_REORDERED] == 1
    assert names([bytes(parcel.frame) for _, parcel in world.director.flush()]) == ("c" if distance == 9 else "")


def test_swap_the_next_two_segments() -> None:
    assert letters(World(rule("swap")), "abcd") == "bacd"


def test_reorder_counts_packets_of_the_same_stream_and_kind() -> None:
    world = World(rule("swap", 'local = "*:4000"'))
    assert letters(world, "a") == ""
    assert letters(world, "b", port=4001) == "b"
    assert world.pass_(segment(5, b"", flags="A")) != []
    assert letters(world, "c") == "ca"


def test_reorder_ends_in_time_without_a_partner() -> None:
    world = World(rule("swap", "timeout_ms = 20"))
    assert letters(world, "a", now=1) == ""
    assert world.director.deadline() == pytest.approx(1.02)
    assert world.later(1.019) == []
    assert names(world.later(1.02)) == "a"
    assert world.director.deadline() is None
    assert world.stats[Counter.FAULT_TIMED_OUT] == 1
    assert letters(world, "b", now=2) == "b"


def test_delay_by_time_and_before_what_comes_later() -> None:
    world = World(rule("delay", "ms = 10", "count = 2"))
    assert letters(world, "abc", now=1) == "c"
    assert letters(world, "d", now=1.005) == "d"
    assert world.later(1.009) == []
    assert letters(world, "e", now=1.010) == "abe"
    assert world.stats[Counter.FAULT_DELAYED] == 2
    assert world.stats[Counter.FAULT_TIMED_OUT] == 0


def test_a_held_packet_is_a_copy_with_its_header() -> None:
    world = World(rule("delay", "ms = 1") + rule("duplicate"))
    frame = bytearray(segment())
    assert not world.director.feed(TX, memoryview(bytearray(PARTIAL)), memoryview(frame), 0)
    frame[:] = bytes(len(frame))
    (_, one), (_, two) = world.director.poll(1)
    assert bytes(one.frame) == bytes(two.frame) == segment()
    assert bytes(one.header) == PARTIAL


def test_a_full_store_lets_packets_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "MAX_HELD", 2)
    world = World(rule("delay", "ms = 1000", 'count = "all"'))
    assert letters(world, "abcd") == "cd"
    assert world.stats[Counter.FAULT_HOLD_FULL] == 2
    assert names([bytes(parcel.frame) for _, parcel in world.director.flush()]) == "ab"
    assert world.director.deadline() is None


def test_flush_lets_everything_go_in_order() -> None:
    world = World(rule("delay", "ms = 30") + rule("reorder", "nth = 2", "distance = 5", "timeout_ms = 10"))
    assert letters(world, "abc") == "c"
    assert names([bytes(parcel.frame) for _, parcel in world.director.flush()]) == "ba"
    assert letters(world, "defghijkl", now=9) == "defghijkl"


def test_a_dropped_packet_meets_nothing_else() -> None:
    world = World(rule("duplicate") + rule("drop") + rule("corrupt") + rule("delay", "ms = 1"))
    assert letters(world, "ab") == "b"
    counted = [counter.name for counter in Counter if world.stats[counter]]
    assert counted == ["FAULT_DROPPED"]
