"""Decryption when packets are missing, late, repeated or cut anew, and how a context comes back.

The kernel's side is modelled by `Kernel`: it takes packets with their verdicts, and judges every record as
net/tls/tls_device.c does.
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nicdev.abi import Direction
from nicdev.tls.rx import MAX_HOLE, RxContext, RxResult
from tests.support.tls_link import BASE, Link, decrypt
from tests.support.tls_oracle import GCM_1_2, SUITES, Suite, stream
from tests.unit.test_tls_rx import ALL_SUITES, context


def spans(*edges: int) -> list[tuple[int, int]]:
    return list(pairwise(edges))


# Four records of 100 bytes, in packets of 40, unless a test says otherwise. GCM_1_2: 29 bytes are not text.
FOUR = [71, 71, 71, 71]


@pytest.mark.conformance(56)
@pytest.mark.conformance(57)
@pytest.mark.conformance(58)
@pytest.mark.conformance(60)
def test_hole_without_header_keeps_sync() -> None:
    link = Link(stream(GCM_1_2, FOUR))
    # 40..80 is lost: the packet with the rest of record 0 and the head of record 1 is left alone, then all is well.
    assert link.marks((0, 40), (80, 120), (120, 160), (160, 200), (200, 300)) == "D-DDD"
    assert link.state == "in_sync"
    assert link.rx.losses == 0


def test_hole_up_to_a_record_start_keeps_sync_and_all_marks() -> None:
    link = Link(stream(GCM_1_2, FOUR))
    assert link.marks((0, 40), (100, 140), (140, 200)) == "DDD"


def test_hole_in_the_middle_of_a_long_record() -> None:
    link = Link(stream(GCM_1_2, [971, 71]))
    assert link.marks((0, 40), (80, 120), (120, 160), (300, 960), (960, 1000), (1000, 1100)) == "D----D"


@pytest.mark.conformance(61)
def test_hole_that_may_hide_a_header_loses_sync() -> None:
    link = Link(stream(GCM_1_2, FOUR))
    assert link.marks((0, 40), (40, 80), (120, 160), (160, 200), (200, 240)) == "DDL--"
    assert link.state == "lost"
    assert link.rx.losses == 1


@pytest.mark.parametrize("known", [0, 1, 4, 5])
def test_what_is_known_of_the_header_decides(known: int) -> None:
    """A hole behind `known` bytes of a header: with all five, the length is known."""
    link = Link(stream(GCM_1_2, FOUR))
    assert link.marks((0, 100), (100, 100 + known) if known else (60, 100)) == ("DD" if known else "D-")
    assert link.marks((140, 180), (180, 220), (220, 300)) == ("--D" if known == 5 else "L--")


@pytest.mark.conformance(35)
@pytest.mark.conformance(59)
def test_old_data_is_left_alone_and_changes_nothing() -> None:
    link = Link(stream(GCM_1_2, FOUR))
    assert link.marks((0, 40), (0, 40), (40, 80), (0, 80), (10, 50), (80, 120)) == "D-D--D"
    # 160..200 comes late: 200..240 is known to start a record, and does not wait for it.
    assert link.marks((120, 160), (200, 240), (160, 200), (240, 280), (280, 400)) == "DD-DD"


def test_overlapping_data_is_left_alone_but_followed() -> None:
    link = Link(stream(GCM_1_2, FOUR))
    assert link.marks((0, 40), (20, 60), (60, 90), (80, 130), (130, 190), (170, 260), (260, 400)) == "D-D-D-D"
    assert link.state == "in_sync"


def test_late_packet_resumes_a_lost_context() -> None:
    """Two packets swapped, the first of which begins a record: its header arrives after all."""
    link = Link(stream(GCM_1_2, FOUR))
    assert link.marks((0, 100), (140, 180), (100, 140), (180, 220), (220, 260), (260, 400)) == "DLD-DD"
    assert link.state == "in_sync"


@ALL_SUITES
@pytest.mark.conformance(80)
def test_hint_at_a_packet_start(suite: Suite) -> None:
    records = stream(suite, [60] * 6)
    link = Link(records)
    starts = records.starts()
    lost = [(starts[1] + 10, starts[2]), (starts[2], starts[3])]
    assert link.marks((0, starts[1]), *lost) == "DL-"
    assert link.resync(4)
    assert link.state == "hinted"
    assert link.marks((starts[3], starts[4])) == "-"
    result = link.packet(starts[4], starts[5])
    assert (result.decrypted, result.resynced, result.lost_sync) == (True, True, False)
    assert link.marks((starts[5], len(records.wire))) == "D"
    assert (link.rx.resyncs, link.state) == (1, "in_sync")


@ALL_SUITES
def test_hint_in_the_middle_of_a_packet(suite: Suite) -> None:
    records = stream(suite, [60] * 6)
    link = Link(records)
    starts = records.starts()
    for into in (1, 4, 5, suite.prefix, 40):
        link = Link(records)
        link.marks((0, starts[1]), (starts[1] + 10, starts[3]))
        assert link.resync(3)
        result = link.packet(starts[2] + 10, starts[3] + into)  # overlaps what has passed, and covers the hint
        assert (result.decrypted, result.resynced) == (False, True)
        assert link.marks((starts[3] + into, starts[4]), (starts[4], len(records.wire))) == "DD"


@pytest.mark.conformance(74)
@pytest.mark.conformance(80)
def test_hint_already_passed_is_counted_on_from() -> None:
    """Packets race with hints: in a stream without pauses, every hint would come too late."""
    link = Link(stream(GCM_1_2, [71] * 8))
    assert link.marks((0, 100), (150, 200), (200, 300), (300, 440)) == "DL--"
    assert link.resync(3)
    assert link.marks((440, 500), (500, 600), (600, 800)) == "-DD"
    assert link.rx.losses == link.rx.resyncs == 1


def test_hint_already_passed_unseen_stays_lost() -> None:
    link = Link(stream(GCM_1_2, [71] * 8))
    assert link.marks((0, 100), (150, 200), (210, 290), (310, 390)) == "DL--"
    assert link.resync(3)
    assert link.marks((400, 440), (440, 500)) == "--"
    assert link.state == "hinted"
    assert link.resync(6)
    assert link.marks((500, 600), (600, 700), (700, 800)) == "-DD"
    assert link.rx.losses == 1


def test_hint_for_a_hole_that_is_filled_later() -> None:
    """The kernel has read up to 100 and names record 1, which is still to be retransmitted."""
    records = stream(GCM_1_2, FOUR)
    link = Link(records, context(GCM_1_2, BASE, no_sync=True))
    assert link.marks((0, 100), (140, 200)) == "--"
    assert link.resync(1)
    assert link.marks((200, 240), (100, 140)) == "-D"
    assert link.rx.resyncs == 1
    # 140..200 has passed, but the header of record 1 is known now.
    assert link.marks((200, 240), (240, 300), (300, 400)) == "DDD"


def test_hint_behind_is_ignored_in_sync_and_lost() -> None:
    link = Link(stream(GCM_1_2, FOUR))
    assert link.marks((0, 150)) == "D"
    assert not link.resync(0)
    assert not link.resync(1)
    assert link.marks((150, 230)) == "D"
    assert link.marks((320, 350)) == "L"
    assert not link.resync(1)
    assert link.state == "lost"


def test_hint_that_is_no_news_keeps_sync() -> None:
    link = Link(stream(GCM_1_2, FOUR))
    assert link.marks((0, 150)) == "D"
    assert not link.resync(2)  # start and number are as predicted
    assert link.marks((150, 200)) == "D"
    assert not link.resync(2)
    assert link.marks((200, 400)) == "D"
    assert link.rx.resyncs == 0


def test_hint_corrects_a_wrong_record_number() -> None:
    records = stream(GCM_1_2, FOUR)
    link = Link(records, context(GCM_1_2, BASE, number=4))
    first, second = link.packet(0, 100), link.packet(100, 200)
    assert (first.auth_failed, second.auth_failed, link.state) == (1, 1, "in_sync")
    assert link.resync(2)
    assert link.marks((200, 300), (300, 400)) == "DD"


def test_wrong_hint_never_decrypts_and_can_be_corrected() -> None:
    records = stream(GCM_1_2, [71] * 6)
    link = Link(records, context(GCM_1_2, BASE, no_sync=True))
    assert link.rx.resync((BASE + 110) % 2**32, 6)
    result = link.packet(100, 200)
    assert (result.decrypted, result.error, result.lost_sync) == (False, True, False)
    assert link.state == "lost"
    assert link.rx.resync((BASE + 200) % 2**32, 99)
    assert link.packet(200, 300).auth_failed == 1
    assert link.resync(3)
    assert link.marks((300, 400), (400, 600)) == "DD"


@ALL_SUITES
def test_born_without_sync(suite: Suite) -> None:
    records = stream(suite, [50, 50, 50])
    link = Link(records, context(suite, 123, 999, no_sync=True))
    starts = records.starts()
    assert link.marks((0, 30), (30, starts[1])) == "--"
    assert link.state == "lost"
    assert link.resync(1)
    assert link.marks((starts[1], starts[2] + 3), (starts[2] + 3, len(records.wire))) == "DD"


@pytest.mark.conformance(18)
def test_first_record_in_the_middle_of_a_packet() -> None:
    records = stream(GCM_1_2, FOUR)
    rx = context(GCM_1_2, (BASE + 100) % 2**32, 6)
    link = Link(records, rx)
    assert link.marks((0, 60), (60, 120), (120, 300)) == "--D"


def test_start_older_than_what_arrives_is_born_lost() -> None:
    """The kernel had unread ciphertext when it made the context (KERNEL-CONTRACT 3.4)."""
    link = Link(stream(GCM_1_2, FOUR))
    assert link.marks((100, 200), (200, 240)) == "L-"
    assert link.resync(3)
    assert link.marks((240, 300), (300, 400)) == "-D"


def test_bad_header_in_sync_is_an_error_and_loses_sync() -> None:
    records = stream(GCM_1_2, FOUR)
    for cut_at in (150, 201, 204, 250):
        rx = context(GCM_1_2, BASE)
        bad = bytearray(records.wire)
        bad[200] = 0x47
        first = bytearray(bad[:cut_at])
        result = decrypt(rx, BASE, first)
        if cut_at == 150:
            assert result.decrypted
            rest = bytearray(bad[150:])
            result = decrypt(rx, BASE + 150, rest)
            assert rest == bad[150:]
        else:
            assert first == bad[:cut_at]
        assert (result.decrypted, result.error, result.lost_sync) == (False, True, True)
        assert rx.describe()["state"] == "lost"
        # What TCP retransmits is the true stream: it starts where the context still stands.
        again = records.wire[150:] if cut_at == 150 else records.wire
        buffer = bytearray(again)
        assert rx.decrypt((BASE + len(records.wire) - len(again)) % 2**32, memoryview(buffer)).decrypted


def test_a_lost_context_forgets_a_cursor_that_could_match_after_a_wrap() -> None:
    records = stream(GCM_1_2, FOUR)
    link = Link(records)
    assert link.marks((0, 100), (150, 200)) == "DL"
    junk = memoryview(bytearray(100))
    assert link.rx.decrypt((BASE + 100 + MAX_HOLE) % 2**32, junk) == RxResult()
    assert link.packet(100, 200) == RxResult()
    assert link.rx.describe()["seq"] is None
    assert link.resync(2)
    assert link.marks((200, 400)) == "D"


@ALL_SUITES
def test_the_record_after_an_untouched_one_is_decrypted_where_packets_never_align(suite: Suite) -> None:
    """One packet of a long record is lost. Packets never start with a record, yet decryption comes back for good."""
    records = stream(suite, [1000] * 6)
    link = Link(records)
    edges = [*range(0, len(records.wire), 93), len(records.wire)]
    packets = spans(*edges)
    del packets[3]
    end = records.ends[0]
    for a, b in packets:
        result = link.packet(a, b)
        assert result.decrypted is not (3 * 93 <= a < end)
    assert link.state == "in_sync"


class Kernel:
    """Judges the records of a stream from packets and verdicts, in any order. TCP keeps the first copy of each byte.

    All packets marked: the plaintext is used unseen, so it must be right. Mixed: what is marked is re-encrypted, that
    is XORed with the key stream, so it must give the bytes of the wire; `Link` checks that for every packet.
    """

    def __init__(self, wire: bytes) -> None:
        self.marked: list[bool | None] = [None] * len(wire)

    def take(self, a: int, b: int, decrypted: bool) -> None:
        for at in range(a, b):
            if self.marked[at] is None:
                self.marked[at] = decrypted

    def record(self, start: int, end: int) -> set[bool | None]:
        return set(self.marked[start:end])


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), suite=st.sampled_from(SUITES), data=st.data())
@pytest.mark.conformance(86)
def test_any_disorder_is_safe_and_ends(seed: int, suite: Suite, data: st.DataObject) -> None:
    """Losses, repetitions, swaps, overlaps, flipped bits, hints at any time; then order, one hint, and all is well."""
    rng = random.Random(seed)
    sizes = data.draw(st.lists(st.integers(0, 60), min_size=4, max_size=12))
    records = stream(suite, [*sizes, 30, 30, 30])
    bad: set[int] = set()
    if data.draw(st.booleans()):
        index = rng.randrange(len(sizes))
        start, end = records.texts[index][0], records.ends[index]
        at = rng.randrange(start, end)
        records.wire = _flip(records.wire, at)
        records.clear = _flip(records.clear, at)
        bad.add(index)
    disorder_end = records.starts()[len(sizes)]
    link = Link(records, context(suite, BASE, no_sync=data.draw(st.booleans())))
    kernel = Kernel(records.wire)
    for a, b in _disorder(rng, disorder_end):
        kernel.take(a, b, link.packet(a, b).decrypted)
        if not rng.randrange(8):
            link.resync(rng.randrange(len(sizes)))
    for index in bad:
        assert kernel.record(records.starts()[index], records.ends[index]) != {True}
    # TCP fills every gap, and the kernel has read everything: its next hint is ahead of all that was sent.
    link.resync(len(sizes))
    tail = spans(*sorted({disorder_end, len(records.wire), *rng.sample(range(disorder_end, len(records.wire)), 3)}))
    assert set(link.marks(*tail)) == {"D"}


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes((data[at] ^ 4,)) + data[at + 1 :]


def _disorder(rng: random.Random, length: int) -> list[tuple[int, int]]:
    """Packets of a sender that retransmits with other cuts, over a path that loses, repeats and swaps."""
    edges = sorted({0, length, *(rng.randrange(length + 1) for _ in range(rng.randrange(2, 20)))})
    packets = [packet for packet in spans(*edges) if rng.random() < 0.85]
    for _ in range(rng.randrange(6)):
        a, b = sorted((rng.randrange(length), rng.randrange(1, length + 1)))
        if a < b:
            packets.insert(rng.randrange(len(packets) + 1), (a, b))
    for _ in range(rng.randrange(4)):
        if len(packets) > 1:
            at = rng.randrange(len(packets) - 1)
            packets[at], packets[at + 1] = packets[at + 1], packets[at]
    return packets


def test_contexts_may_share_scratch_memory() -> None:
    scratch = memoryview(bytearray(65535))
    links: list[Link] = []
    for suite in SUITES:
        records = stream(suite, FOUR, seed=len(links))
        rx = RxContext(suite.params(Direction.RX, BASE, 5), scratch)
        links.append(Link(records, rx))
    for a, b in spans(0, 13, 60, 61, 150, 270, 330):
        assert [link.marks((a, b)) for link in links] == ["D"] * len(SUITES)
