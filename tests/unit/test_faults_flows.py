"""Following records by the clear bytes of their headers: cut anywhere, in any order, over the wrap."""

from __future__ import annotations

import random

import pytest

from nicdev.faults.flows import MAX_KEPT_RECORDS, MAX_STASH, Follower
from nicdev.faults.scenario import Part
from nicdev.tls.walk import Cursor

START = 0xFFFF_FF00  # the numbers wrap in the first record
SIZES = (100, 29, 16413, 64, 5000)


def record(size: int) -> bytes:
    """A record of `size` bytes in all, its body an awkward one: it looks like headers."""
    return b"\x17\x03\x03" + (size - 5).to_bytes(2, "big") + (b"\x17\x03\x03\x00\x20" * size)[: size - 5]


STREAM = b"".join(map(record, SIZES))
STARTS = [sum(SIZES[:n]) for n in range(len(SIZES))]


def follower(prefix: int = 13) -> Follower:
    return Follower(START, prefix, Cursor(START, 500), 500)


def feed(follower: Follower, at: int, data: bytes) -> None:
    assert follower.position((START + at) & 0xFFFFFFFF) == at
    follower.feed(at, memoryview(data))


def knows_all(follower: Follower) -> None:
    assert not follower.lost
    assert follower.headers == len(SIZES)
    for number, (start, size) in enumerate(zip(STARTS, SIZES, strict=True)):
        end = start + size
        assert follower.span(number) == (start, end)
        assert follower.span(number, Part.HEADER) == (start, start + 5)
        assert follower.span(number, Part.NONCE) == (start + 5, start + 13)
        assert follower.span(number, Part.TAG) == (end - 16, end)
        assert follower.span(number, Part.PAYLOAD) == ((start + 13, end - 16) if size > 29 else None)
        assert follower.span(number, None, 20) == (start + 20, start + 21)
        assert follower.span(number, Part.TAG, 15) == (end - 1, end)
        assert follower.span(number, Part.TAG, 16) is None


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 7, 99, 100, 1448, 65535])
def test_in_order_whatever_the_cuts(cut: int) -> None:
    one = follower()
    for at in range(0, len(STREAM), cut):
        feed(one, at, STREAM[at : at + cut])
    knows_all(one)
    assert one.span(len(SIZES), Part.TAG) is None
    assert one.span(len(SIZES) + 1) is None


@pytest.mark.parametrize("seed", range(20))
def test_any_order_with_repetitions_and_overlaps(seed: int) -> None:
    rng = random.Random(seed)
    pieces = [(at, STREAM[at : at + rng.choice((700, 900))]) for at in range(0, len(STREAM), 700)]
    pieces += rng.sample(pieces, 5)
    rng.shuffle(pieces)
    one = follower()
    for at, piece in pieces:
        feed(one, at, piece)
    knows_all(one)


def test_holes_in_a_body_do_not_matter() -> None:
    one = follower()
    feed(one, 0, STREAM[:135])
    feed(one, STARTS[3] - 1, STREAM[STARTS[3] - 1 :])
    knows_all(one)


def test_begun_in_the_middle_of_a_record_or_of_a_header() -> None:
    for place, at in (
        (Cursor((START + 110) & 0xFFFFFFFF, 501, 10, 29), 110),
        (Cursor((START + 102) & 0xFFFFFFFF, 501, 2, 0, STREAM[100:102]), 102),
        (Cursor((START + 100) & 0xFFFFFFFF, 501), 100),
    ):
        one = Follower(START, 13, place, 500)
        feed(one, at, STREAM[at:])
        assert one.span(0) is None
        assert one.span(1) == (100, 129)
        assert one.span(4, Part.TAG) == (len(STREAM) - 16, len(STREAM))


def test_what_is_no_record_ends_it() -> None:
    for junk in (b"GET /", b"\x17\x03\x04\x00\x40", b"\x17\x03\x03\xff\xff", b"\x17\x03\x03\x00\x0f"):
        one = follower()
        feed(one, 0, STREAM[:100] + junk)
        assert one.lost
        assert one.span(0) is None
        feed(one, 105, STREAM)


def test_memory_is_bounded() -> None:
    one = follower()
    many = record(29) * 2000
    for _ in range(3 * MAX_KEPT_RECORDS // 2000):
        one.feed(one._starts[-1], memoryview(many))
    assert len(one._starts) <= MAX_KEPT_RECORDS + 2000
    assert one.span(0) is None
    last = one.headers - 1
    assert one.span(last) == (29 * last, 29 * last + 29)
    behind = one._starts[-1] + 10
    for at in range(0, 2 * MAX_STASH, 65535):
        one.feed(behind + at, memoryview(bytes(65535)))
    assert one.lost
    assert not one._stash
