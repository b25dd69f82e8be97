"""Stream scanning as hardware does it (tls-offload.rst), and the two figures of that document."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from nicdev.abi import RxPersonality
from nicdev.tls.rx import RxResult
from nicdev.tls.scan import RESCAN_AFTER
from tests.support.tls_link import BASE, SIZE, Link, link, small
from tests.support.tls_oracle import GCM_1_2, SUITES, Suite, stream

LONGEST = 5 + 8 + 16384 + 16
REQ, ASYNC = RxPersonality.DRIVER_REQ, RxPersonality.DRIVER_REQ_ASYNC
HARDWARE = (REQ, ASYNC, RxPersonality.CORE_NEXT_HINT)


def place(seq: int | None) -> int | None:
    return None if seq is None else (seq - BASE) % 2**32


def asked(wire: Link, *spans: tuple[int, int]) -> list[int | None]:
    return [place(wire.packet(a, b).ask) for a, b in spans]


def said(result: RxResult) -> str:
    """S start, E end, C cancel, ? question, - nothing."""
    marks = (result.opened, result.guess, result.cancelled or None, result.ask)
    return "".join(letter for letter, mark in zip("SEC?", marks, strict=True) if mark is not None) or "-"


@pytest.mark.conformance(62)
def test_scan_starts_more_than_a_longest_record_beyond() -> None:
    records = stream(GCM_1_2, [71, 16000, 16000, 71, 71, 71])
    wire = link(REQ, records)
    start = records.starts()[2]
    assert start < LONGEST < start + 2000
    # the context stands at 100 and waits there for as long as what passes may be part of one record
    assert asked(wire, (0, 100), (start - 50, 100 + LONGEST)) == [None, None]
    start = records.starts()[3]
    assert asked(wire, (start - 50, start + 150)) == [start]


@pytest.mark.parametrize("suite", SUITES, ids=str)
@pytest.mark.conformance(63)
@pytest.mark.conformance(66)
def test_match_is_asked_once(suite: Suite) -> None:
    wire = link(REQ, small(suite=suite), no_sync=True)
    assert asked(wire, (30, 90), (90, 150), (150, 210), (210, 400)) == [None, 100, None, None]


def with_decoys(at: Sequence[tuple[int, int]]) -> Link:
    """Things that look like a header in the text: place and claimed length of the record."""
    records = small()
    wire = bytearray(records.wire)
    for offset, size in at:
        wire[offset : offset + 5] = b"\x17\x03\x03" + (size - 5).to_bytes(2, "big")
    records.wire = bytes(wire)
    return link(REQ, records, no_sync=True)


@pytest.mark.conformance(63)
@pytest.mark.conformance(64)
@pytest.mark.conformance(65)
def test_decoy_whose_successor_is_in_the_packet() -> None:
    assert asked(with_decoys([(140, 70)]), (120, 390)) == [200]


@pytest.mark.conformance(64)
@pytest.mark.conformance(65)
def test_decoy_is_found_out_later_and_the_scan_restarts() -> None:
    wire = with_decoys([(150, 120)])
    assert asked(wire, (130, 190), (190, 250), (250, 390)) == [150, None, 300]
    assert wire.rx.resync((BASE + 300) % 2**32, 8)
    assert wire.marks((390, 400), (400, 500)) == "-D"


@pytest.mark.conformance(76)
def test_no_answer_about_a_decoy_and_no_hang() -> None:
    """The host never answers; the chain breaks, the true header is asked about, and all is well."""
    wire = with_decoys([(150, 50)])  # a decoy that leads to a true header, and so proves itself
    assert asked(wire, (130, 190), (190, 450)) == [150, None]
    assert not wire.rx.resync((BASE + 200) % 2**32, 7)  # nobody asked
    assert wire.marks((450, 500), (500, 600)) == "--"


@pytest.mark.conformance(76)
def test_rescan_when_nothing_is_heard() -> None:
    wire = link(REQ, small(RESCAN_AFTER + 10), no_sync=True)
    questions = [q for q in asked(wire, *((a, a + SIZE) for a in range(SIZE, SIZE * (RESCAN_AFTER + 8), SIZE))) if q]
    assert len(questions) == 2
    assert questions[1] - questions[0] == RESCAN_AFTER * SIZE


@pytest.mark.parametrize("records", [0, 1, 5])
@pytest.mark.conformance(74)
@pytest.mark.conformance(75)
def test_records_since_the_match_are_counted(records: int) -> None:
    wire = link(REQ, small(), no_sync=True)
    assert asked(wire, (90, 150)) == [100]
    here = 150
    for _ in range(records):
        assert wire.marks((here, here + SIZE)) == "-"
        here += SIZE
    assert wire.rx.resync((BASE + 100) % 2**32, 6)
    # what is left of the record that the stream is in, then everything
    assert wire.marks((here, here + 20), (here + 20, here + 70), (here + 70, here + 170)) == "--D"


@pytest.mark.conformance(75)
def test_answer_to_another_question_is_ignored() -> None:
    wire = link(REQ, small(), no_sync=True)
    assert asked(wire, (90, 150)) == [100]
    for index in (0, 2, 7):
        assert not wire.resync(index)
    assert wire.marks((150, 250)) == "-"


def test_no_scan_in_sync() -> None:
    wire = link(REQ, small())
    assert asked(wire, (0, 150), (150, 300)) == [None, None]
    assert not wire.resync(3)
    assert wire.marks((300, 400)) == "D"


def test_hole_that_may_hide_a_header_restarts_the_scan() -> None:
    wire = link(REQ, small(), no_sync=True)
    assert asked(wire, (90, 150), (160, 250), (320, 420)) == [100, None, 400]


def test_sequence_numbers_wrap_while_scanning() -> None:
    """BASE lies 256 bytes before the wrap."""
    wire = link(REQ, small(), no_sync=True)
    assert asked(wire, (190, 240), (240, 300), (300, 410)) == [200, None, None]
    assert wire.resync(2)
    assert wire.marks((410, 500), (500, 600)) == "-D"


@pytest.mark.conformance(66)
@pytest.mark.conformance(77)
def test_attempt_opens_with_the_match_and_ends_when_it_has_proven_itself() -> None:
    wire = link(ASYNC, small(), no_sync=True)
    first = wire.packet(130, 220)
    assert said(first) == "S"
    assert first.opened == ((BASE + 130) % 2**32, 90)
    assert not wire.resync(2)  # nothing has been submitted
    results = [wire.packet(a, a + SIZE) for a in range(220, 620, SIZE)]
    assert [said(result) for result in results] == ["-", "-", "E", "-"]
    assert place(results[2].guess) == 200
    assert wire.resync(2)
    assert wire.marks((620, 700), (700, 800)) == "-D"


def test_attempt_that_breaks_is_cancelled_and_another_opens() -> None:
    wire = link(ASYNC, small(), no_sync=True)
    assert [said(wire.packet(a, b)) for a, b in ((130, 220), (340, 410), (410, 520))] == ["S", "C", "S"]


def test_attempt_is_cancelled_when_the_missing_packet_arrives() -> None:
    records = stream(GCM_1_2, [71, 16000, 16000, 71, 71, 71, 71])
    wire = link(ASYNC, records)
    start = records.starts()[3]
    assert [said(wire.packet(a, b)) for a, b in ((0, 50), (start - 20, start + 50))] == ["-", "S"]
    late = wire.packet(50, 150)
    assert (said(late), late.decrypted) == ("C", True)


def test_core_next_hint_is_silent() -> None:
    wire = link(RxPersonality.CORE_NEXT_HINT, small(), no_sync=True)
    assert [said(wire.packet(a, a + SIZE)) for a in range(50, 950, SIZE)] == ["-"] * 9


# -- the figures of the kernel's document ------------------------------------------------------------------------------


@pytest.mark.parametrize("personality", HARDWARE)
@pytest.mark.conformance(56)
@pytest.mark.conformance(57)
@pytest.mark.conformance(58)
@pytest.mark.conformance(59)
@pytest.mark.conformance(60)
def test_figure_reorder_of_a_non_header_segment(personality: RxPersonality) -> None:
    """Segments of 40; record 0 has its header in segment 1, the next one its own in segment 3. 2 comes after 3."""
    wire = link(personality, small())
    #                  1        3         2         4           5
    assert wire.marks((0, 40), (80, 120), (40, 80), (120, 160), (160, 200)) == "D--DD"
    assert wire.state == "in_sync"
    assert wire.rx.losses == 0
    assert wire.marks((200, 300)) == "D"


@pytest.mark.parametrize("personality", HARDWARE)
@pytest.mark.conformance(61)
def test_figure_reorder_of_a_header_segment(personality: RxPersonality) -> None:
    """The segment with the next header comes after the one behind it: out of sync, until the host helps."""
    wire = link(personality, small())
    #                  1        2         4           5
    assert wire.marks((0, 40), (40, 80), (120, 160), (160, 200)) == "DDL-"
    assert wire.state == "lost"
    assert wire.marks((200, 240), (240, 280)) == "--"
