"""The strategy of a lost rx `ideal` context: it follows the headers that pass, so the kernel's answer may come late."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from nicdev.abi import Direction
from nicdev.tls.ideal import IdealContext
from nicdev.tls.resync import CoreNextHint, Ideal, ResyncStrategy
from nicdev.tls.rx import RxContext
from tests.support.tls_link import BASE, Link
from tests.support.tls_oracle import GCM_1_2, Stream, stream

SIZES = [71] * 12  # records of 100 bytes with header, nonce and tag


def link(strategy: ResyncStrategy, records: Stream | None = None) -> Link:
    records = records or stream(GCM_1_2, SIZES)
    params = GCM_1_2.params(Direction.RX, BASE, records.first_number)
    return Link(records, RxContext(params, strategy=strategy))


@pytest.mark.parametrize("strategy", [Ideal(), CoreNextHint()], ids=lambda strategy: strategy.name)
def test_late_hint(strategy: ResyncStrategy) -> None:
    """Record 0 never comes, 1 to 5 pass; then the kernel names record 3."""
    wire = link(strategy)
    assert wire.marks((100, 250), (250, 420), (420, 580)) == "L--"
    wire.resync(3)
    assert wire.marks((580, 600), (600, 900)) == "-D"


def test_hint_in_the_middle_of_a_record_spares_the_rest_of_it() -> None:
    wire = link(Ideal())
    assert wire.marks((100, 350)) == "L"
    assert wire.resync(2)
    assert wire.marks((350, 380), (380, 400), (400, 430), (430, 700)) == "--DD"


def test_hint_for_a_place_that_was_no_record_start_is_not_believed() -> None:
    wire = link(Ideal())
    assert wire.marks((100, 350)) == "L"
    wire.rx.resync((BASE + 250) % 2**32, wire.records.first_number + 2)
    assert wire.marks((350, 500), (500, 600)) == "--"


def test_hint_ahead_still_works() -> None:
    wire = link(Ideal())
    assert wire.marks((100, 350)) == "L"
    assert wire.resync(5)
    assert wire.marks((350, 500), (500, 650)) == "-D"


def test_chain_restarts_behind_a_second_hole() -> None:
    """Records 1 and 2 pass, 3 and 4 do not; only hints for what came behind the second hole can be placed."""
    wire = link(Ideal())
    assert wire.marks((100, 300), (500, 700)) == "L-"
    wire.resync(2)
    assert wire.marks((700, 800)) == "-"
    assert wire.resync(6)
    assert wire.marks((800, 900)) == "D"


def test_hole_inside_a_record_does_not_break_the_chain() -> None:
    wire = link(Ideal())
    assert wire.marks((100, 220), (280, 420)) == "L-"
    assert wire.resync(1)
    assert wire.marks((420, 500), (500, 600)) == "-D"


def test_decoy_before_the_true_header() -> None:
    """The first packet begins inside a record whose text looks like a header."""
    decoy = b"\x17\x03\x03\x00\x30" + bytes(66)
    for seed in range(20):
        rng = random.Random(seed)
        records = stream(GCM_1_2, SIZES)
        wire = link(Ideal(), records)
        at = rng.randrange(150, 170)
        packet = bytearray(records.wire[113:500])
        packet[at - 113 : at - 113 + 5] = decoy[:5]
        assert not wire.rx.decrypt((BASE + 113) % 2**32, memoryview(packet)).decrypted
        # the decoy's chain breaks where its predicted header is none, and the next candidate is tried
        assert wire.resync(3)
        assert wire.marks((500, 700)) == "D"


def test_retransmissions_do_not_confuse_the_chain() -> None:
    wire = link(Ideal())
    assert wire.marks((100, 300), (100, 300), (150, 250), (300, 400)) == "L---"
    assert wire.resync(2)
    assert wire.marks((400, 600)) == "D"


def test_context_born_without_a_place() -> None:
    records = stream(GCM_1_2, SIZES)
    rx = RxContext(GCM_1_2.params(Direction.RX, 0, 0, no_sync=True), strategy=Ideal())
    wire = Link(records, rx)
    assert wire.marks((100, 330)) == "-"
    assert wire.resync(2)
    assert wire.marks((330, 400), (400, 600)) == "-D"


def test_sequence_numbers_wrap_inside_the_chain() -> None:
    """BASE lies 256 bytes before the wrap."""
    wire = link(Ideal())
    assert wire.marks((100, 240), (240, 300), (300, 410)) == "L--"
    assert wire.resync(3)
    assert wire.marks((410, 500), (500, 600)) == "-D"


def test_missing_packet_that_comes_after_all_resumes_by_itself() -> None:
    wire = link(Ideal())
    assert wire.marks((100, 300), (0, 100), (100, 300), (300, 400)) == "LDDD"


def test_asks_once_for_a_record_that_passed_and_again_when_the_chain_broke() -> None:
    wire = link(Ideal())
    asked = [wire.packet(a, b).ask for a, b in ((130, 180), (180, 350), (350, 480), (640, 680), (680, 850))]
    places = [None if seq is None else (seq - BASE) % 2**32 for seq in asked]
    assert places == [None, 300, None, None, 800]


def test_asks_again_if_no_answer_comes_and_is_twice_as_patient_each_time() -> None:
    """A host that lags is met once the question waits longer than the host lags."""
    wire = link(Ideal(), stream(GCM_1_2, [71] * 600))
    places = [wire.packet(at, at + 100).ask for at in range(100, 60_000, 100)]
    asked = [index + 1 for index, place in enumerate(places) if place is not None]
    assert [(places[index - 1] or 0) - BASE & 0xFFFFFFFF for index in asked] == [100 * (n + 1) for n in asked]
    assert asked == [1, 17, 49, 113, 241, 497]


def test_what_the_host_has_is_sent_again_to_a_device_that_just_started() -> None:
    """The device before took the acknowledgements with it: the first question is about what the kernel has read."""
    records = stream(GCM_1_2, [71] * 200)
    wire = Link(records, IdealContext(GCM_1_2.params(Direction.RX, BASE, records.first_number, no_sync=True)))
    read, question, marks = 40, None, ""
    for at in range(20, 200):
        result = wire.packet(at * 100, at * 100 + 100)
        marks += "D" if result.decrypted else "-"
        question = question if result.ask is None else result.ask
        if at >= read and question == (BASE + at * 100) % 2**32:
            assert wire.resync(at)
    assert "D" * 100 in marks


def test_an_answer_to_a_device_that_has_asked_nothing() -> None:
    """It was meant for the one before: what passed since is not known, so nothing would ever lead on from there."""
    records = stream(GCM_1_2, [71] * 30)
    begin = (BASE - 3 * 2**30) % 2**32  # of the connection, of no use any more
    wire = Link(records, IdealContext(GCM_1_2.params(Direction.RX, begin, 0, no_sync=True)))
    assert not wire.resync(4)
    assert wire.packet(1000, 1100).ask is not None
    assert wire.resync(10)
    assert wire.packet(1100, 1200).ask is not None
    assert wire.resync(11)
    assert wire.marks((1200, 1300), (1300, 1400)) == "-D"


def test_a_hole_that_is_never_filled_is_asked_about_though_all_behind_it_is_verified() -> None:
    """The kernel has what is missing; the host's answer says so before the device has to look away."""
    records = stream(GCM_1_2, [0] * 6000)
    wire = Link(records, IdealContext(GCM_1_2.params(Direction.RX, BASE, records.first_number)))
    size = len(records.wire) // 6000
    assert wire.marks((0, size), (size, 2 * size)) == "DD"
    for at in range(3 * size, 6000 * size, size):
        result = wire.packet(at, at + size)
        assert result.decrypted
        if result.ask is not None:
            assert wire.resync(((result.ask - BASE) % 2**32) // size)
    assert wire.rx.describe()["state"] == "in_sync"


def test_core_next_hint_never_asks() -> None:
    wire = link(CoreNextHint())
    assert [wire.packet(a, b).ask for a, b in ((100, 350), (350, 480))] == [None, None]


def test_random_disorder_never_marks_a_wrong_byte() -> None:
    """Link.packet compares every marked packet with the truth."""
    for seed in range(150):
        rng = random.Random(seed)
        records = stream(GCM_1_2, [rng.randrange(0, 120) for _ in range(20)])
        wire = link(Ideal(), records)
        end = len(records.wire)
        edges = sorted({0, end, *(rng.randrange(1, end) for _ in range(25))})
        packets = [span for span in pairwise(edges) if rng.random() > 0.15]
        marked = 0
        for a, b in packets:
            marked += wire.packet(a, b).decrypted
            starts = [i for i, s in enumerate(records.starts()) if s <= b]
            if rng.random() < 0.3:
                wire.resync(rng.choice(starts))
        assert marked <= len(packets)
