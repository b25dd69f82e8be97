"""What an rx `ideal` context's history says: every kind of event, its place and record."""

from __future__ import annotations

from nicdev.abi import RxPersonality
from nicdev.tls.history import Happened
from nicdev.tls.store import Pool
from tests.support.tls_link import BASE, FIRST, SIZE, link, small, told, why
from tests.support.tls_oracle import GCM_1_2, SUITES, corrupt, stream

IDEAL = RxPersonality.IDEAL


def test_ideal_gap_and_filled() -> None:
    wire = link(IDEAL)
    wire.marks((0, 140), (160, 250), (250, 300), (140, 160))
    assert (told(wire.rx), why(wire.rx)[0]) == ([("gap", 140, 1), ("filled", 300, 3)], "20 bytes missing")
    wire.marks((290, 400))
    assert (told(wire.rx)[2:], why(wire.rx)[2]) == ([("gap", 300, 3), ("filled", 400, 4)], "overlap")


def test_ideal_finds_a_record_by_its_nonce() -> None:
    wire = link(IDEAL)
    wire.marks((0, 100), (200, 300), (100, 200))
    assert told(wire.rx) == [("gap", 100, 1), ("found", 200, 2), ("filled", 300, 3)]
    assert why(wire.rx)[1] == "by its nonce"


def test_ideal_guesses_a_number_and_the_tag_confirms_it() -> None:
    wire = link(IDEAL, small(suite=SUITES[2]))  # ChaCha20: no nonce tells the number
    wire.marks((0, 100), (200, 300), (100, 200))
    assert told(wire.rx) == [("gap", 100, 1), ("candidate", 200, None), ("found", 200, 2), ("filled", 300, 3)]
    assert why(wire.rx)[2] == "guessed, and its tag is right"


def test_ideal_number_told_by_the_headers_before() -> None:
    wire = link(IDEAL, small(suite=SUITES[2]))
    wire.marks((0, 100), (200, 250), (100, 200), (250, 300))
    assert told(wire.rx)[1:3] == [("candidate", 200, None), ("found", 200, 2)]
    assert why(wire.rx)[2] == "the headers before lead to it"


def test_ideal_candidate_that_leads_nowhere() -> None:
    records = small(suite=SUITES[2])
    wire = bytearray(records.wire)
    wire[150:155] = b"\x17\x03\x03\x00\x2d"  # a decoy of 50 bytes, cut so that nothing shows it yet
    records.wire = bytes(wire)
    ideal = link(IDEAL, records)
    ideal.marks((0, 100), (140, 190), (210, 250))
    assert told(ideal.rx)[1:] == [("candidate", 150, None), ("rejected", 150, None)]


def test_ideal_other_copies() -> None:
    wire = link(IDEAL)
    wire.marks((0, 100), (150, 200))
    forged = bytearray(wire.records.wire[160:200])
    forged[5] ^= 1
    wire.rx.decrypt((BASE + 160) % 2**32, memoryview(forged))
    assert (told(wire.rx)[1:], why(wire.rx)[-1]) == ([("conflict", 160, None)], "left alone")
    wire.marks((200, 300))
    assert wire.rx.history.events[-1].what is Happened.FOUND
    wire.rx.decrypt((BASE + 160) % 2**32, memoryview(forged))
    assert (told(wire.rx)[-1], why(wire.rx)[-1]) == (("conflict", 160, None), "dropped")  # in debt for record 2


def test_ideal_another_copy_of_the_open_record_s_header() -> None:
    wire = link(IDEAL)
    wire.marks((0, 250))
    forged = bytearray(wire.records.wire[200:220])
    forged[4] ^= 1
    wire.rx.decrypt((BASE + 200) % 2**32, memoryview(forged))
    assert (told(wire.rx), why(wire.rx)) == ([("lost", 200, 2)], ["another copy of its header"])


def test_ideal_poisoned_by_a_moved_record() -> None:
    wire = link(IDEAL)
    wire.marks((0, 200))
    moved = bytearray(wire.records.wire[400:500])
    assert wire.rx.decrypt((BASE + 500) % 2**32, memoryview(moved)).decrypted
    wire.marks((200, 300))
    for at in range(300, 500, 50):
        wire.rx.decrypt((BASE + at) % 2**32, memoryview(bytearray(wire.records.wire[at : at + 50])))
    kinds = [what for what, _, _ in told(wire.rx)]
    assert kinds[:2] == ["gap", "found"]
    assert kinds[-1] == "poisoned"


def test_ideal_nonce_that_was_not_expected_is_noted_once() -> None:
    """The oracle's nonces have nothing to do with the host's word on the first one."""
    wire = link(IDEAL)
    wire.marks((0, 50), (50, 100), (100, 150), (150, 200))
    assert told(wire.rx) == [("nonce", 0, 0)]


def test_ideal_scans_asks_tracks_and_is_confirmed() -> None:
    wire = link(IDEAL, no_sync=True)
    wire.marks((150, 300), (300, 400))
    assert wire.resync(3)
    wire.marks((400, 500), (500, 600))
    asked = [event.seq for event in wire.rx.history.events if event.what is Happened.ASKED]
    assert asked[-1] is not None
    assert wire.resync(((asked[-1] - BASE) % 2**32) // SIZE)
    wire.marks((600, 700), (700, 800))
    assert told(wire.rx) == [
        ("lost", None, None),
        ("scanning", 150, None),
        ("candidate", 200, None),
        ("asked", 300, None),
        ("answer", 300, 3),
        ("asked", 400, 4),
        ("answer", 400, 4),
        ("in_sync", 700, 7),
        ("filled", 700, 7),
    ]
    assert why(wire.rx)[5] == "expected to be that one"


def test_ideal_second_answer_differs() -> None:
    wire = link(IDEAL, no_sync=True)
    wire.marks((150, 300), (300, 400))
    assert wire.resync(3)
    wire.marks((400, 500))
    assert wire.rx.resync((BASE + 400) % 2**32, FIRST + 9)
    assert told(wire.rx)[-2:] == [("lost", 500, 5), ("answer", 400, 9)]
    assert f"record {FIRST + 4} was expected" in why(wire.rx)[-2]


def test_ideal_chain_that_breaks() -> None:
    wire = link(IDEAL, no_sync=True)
    wire.marks((150, 250), (450, 600))
    assert [what for what, _, _ in told(wire.rx)] == [
        *("lost", "scanning", "candidate", "asked", "rejected", "candidate", "asked")
    ]


def test_ideal_without_memory() -> None:
    wire = link(IDEAL, pool=Pool(0))
    wire.marks((0, 100), (150, 200))
    assert (told(wire.rx), why(wire.rx)) == ([("gap", 100, 1), ("lost", 100, 1)], ["50 bytes missing", "no room"])


def test_ideal_without_memory_in_debt() -> None:
    pool = Pool(400)
    wire = link(IDEAL, stream(GCM_1_2, [71] * 20), pool=pool)
    wire.marks((0, 100), (200, 300))
    wire.marks((300, 350), (400, 450), (500, 550), (600, 650), (700, 750))
    assert told(wire.rx)[-1][0] == "no_room"


def test_ideal_wrong_tag_behind_a_hole() -> None:
    wire = link(IDEAL, corrupt(small(), 250))
    wire.marks((0, 100), (140, 200), (200, 300))
    assert told(wire.rx)[-1] == ("auth_failed", 200, 2)
