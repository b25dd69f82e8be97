"""What a context's history says: every kind of event, its place and record; how many are kept, and no secret."""

from __future__ import annotations

import random

import pytest
from cryptography.exceptions import AlreadyFinalized

from nicdev.abi import Direction, RxPersonality
from nicdev.errors import TxDrop
from nicdev.tls import rx as rx_module
from nicdev.tls.history import MAX_EVENTS, Happened, History
from nicdev.tls.personality import rx_context
from nicdev.tls.rx import RxContext
from nicdev.tls.scan import RESCAN_AFTER
from nicdev.tls.store import Pool
from nicdev.tls.tx import Resync, TxContext
from tests.support.tls_oracle import GCM_1_2, SUITES, Stream, Suite, stream
from tests.unit.test_tls_rx_disorder import BASE, Link

SIZE = 100  # of a record
FIRST = 5  # its number
IDEAL, REQ, ASYNC, HINT = (
    RxPersonality.IDEAL,
    RxPersonality.DRIVER_REQ,
    RxPersonality.DRIVER_REQ_ASYNC,
    RxPersonality.CORE_NEXT_HINT,
)
Told = tuple[str, int | None, int | None]  # kind, offset in the stream, record counted from the first


def small(count: int = 12, suite: Suite = GCM_1_2) -> Stream:
    return stream(suite, [SIZE - 21 - suite.explicit - (suite.version == 0x0304)] * count)


def link(
    personality: RxPersonality, records: Stream | None = None, *, no_sync: bool = False, pool: Pool | None = None
) -> Link:
    records = small() if records is None else records
    params = records.suite.params(Direction.RX, BASE, FIRST, no_sync=no_sync, rx_personality=personality)
    return Link(records, rx_context(params, pool=pool))


def told(context: RxContext | TxContext) -> list[Told]:
    """The history, in offsets of the stream and records counted from its first."""
    return [
        (
            str(event.what),
            None if event.seq is None else (event.seq - BASE) % 2**32,
            None if event.record is None else event.record - FIRST,
        )
        for event in context.history.events
    ]


def why(context: RxContext | TxContext) -> list[str]:
    return [event.why for event in context.history.events]


@pytest.mark.parametrize("personality", RxPersonality)
def test_nothing_in_order(personality: RxPersonality) -> None:
    """Segments that begin and end anywhere, after the one record whose nonce was not expected."""
    wire = link(personality)
    wire.marks((0, 130))
    before = len(wire.rx.history.events)
    wire.marks(*((at, at + 37) for at in range(130, 1100, 37)))
    assert len(wire.rx.history.events) == before == 0


def test_driver_req_lost_asked_answered_late() -> None:
    wire = link(REQ, stream(GCM_1_2, [71, 16000, 16000, *[71] * 6]))
    start = wire.records.starts()[3]
    wire.marks((0, 50), (150, 250), (start - 20, start + 50), (start + 50, start + 250))
    assert wire.resync(3)
    wire.marks((start + 250, start + 300), (start + 300, start + 400))
    assert told(wire.rx) == [
        ("lost", 50, 0),
        ("scanning", start - 20, None),
        ("candidate", start, None),
        ("asked", start, None),
        ("answer", start, 3),
        ("in_sync", start + 250, 5),
    ]
    assert why(wire.rx) == ["100 bytes missing", "", "", "", "2 records later", "the host's answer"]
    described = wire.rx.describe()
    assert (described["requested"], described["answered"], described["resyncs"]) == (1, 1, 1)
    # record 0 was cut, 1 to 5 passed while the context was lost
    assert (described["records"], described["records_software"]) == (1, 6)
    assert described["bytes"] == (50 - 13) + 71


def test_driver_req_candidate_rejected_and_answer_refused() -> None:
    records = small()
    wire = bytearray(records.wire)
    wire[150:155] = b"\x17\x03\x03\x00\x73"  # a decoy: leads to 270, where no record starts
    records.wire = bytes(wire)
    lost = link(REQ, records, no_sync=True)
    lost.marks((130, 190), (190, 250), (250, 390))
    assert not lost.rx.resync((BASE + 150) % 2**32, 6)
    assert told(lost.rx) == [
        ("lost", None, None),
        ("scanning", 130, None),
        ("candidate", 150, None),
        ("asked", 150, None),
        ("rejected", 150, None),
        ("candidate", 300, None),
        ("asked", 300, None),
        ("refused", 150, 1),
    ]
    assert lost.rx.describe()["records_software"] is None  # nobody knows how many there were


def test_driver_req_question_given_up() -> None:
    wire = link(REQ, small(RESCAN_AFTER + 4), no_sync=True)
    wire.marks(*((at, at + SIZE) for at in range(SIZE, SIZE * (RESCAN_AFTER + 3), SIZE)))
    assert [what for what, _, _ in told(wire.rx)][3:] == ["asked", "rejected", "candidate", "asked"]
    assert str(RESCAN_AFTER) in why(wire.rx)[4]


def test_answer_in_sync_is_refused() -> None:
    wire = link(HINT)
    wire.marks((0, 150))
    assert not wire.resync(0)
    assert (told(wire.rx), why(wire.rx)) == ([("refused", 0, 0)], ["in sync"])


def test_driver_req_async_opened_submitted_cancelled() -> None:
    wire = link(ASYNC, no_sync=True)
    wire.marks((130, 220), (340, 410), (410, 520), *((at, at + SIZE) for at in range(520, 920, SIZE)))
    assert told(wire.rx)[1:] == [
        ("scanning", 130, None),
        ("candidate", 200, None),
        ("opened", 130, None),
        ("rejected", 200, None),
        ("cancelled", None, None),
        ("candidate", 500, None),
        ("opened", 410, None),
        ("submitted", 500, None),
    ]
    assert wire.rx.requested == 2


def test_driver_req_async_withdraws_when_the_missing_packet_comes() -> None:
    wire = link(ASYNC, stream(GCM_1_2, [71, 16000, 16000, 71, 71, 71, 71]))
    start = wire.records.starts()[3]
    wire.marks((0, 50), (start - 20, start + 50), (50, 150))
    assert told(wire.rx)[-2:] == [("in_sync", 50, 0), ("cancelled", None, None)]
    assert "the missing packet came" in why(wire.rx)


def test_core_next_hint() -> None:
    wire = link(HINT)
    wire.marks((0, 100), (150, 200), (200, 300))
    assert wire.resync(4)
    wire.marks((300, 400), (400, 500))
    assert told(wire.rx) == [
        ("lost", 100, 1),
        ("scanning", 150, None),
        ("candidate", 200, None),
        ("answer", 400, 4),
        ("in_sync", 400, 4),
    ]


@pytest.mark.parametrize("personality", [REQ, ASYNC, HINT])
def test_gap_inside_a_record(personality: RxPersonality) -> None:
    wire = link(personality)
    wire.marks((0, 40), (80, 120), (120, 200))
    assert (told(wire.rx), why(wire.rx)) == ([("gap", 40, 0)], ["40 bytes, without a header"])


def test_no_header_where_one_must_be() -> None:
    records = small()
    records.wire = records.wire[:200] + b"\x47" + records.wire[201:]
    wire = link(HINT, records)
    wire.marks((0, 250))
    assert (told(wire.rx), why(wire.rx)) == ([("lost", 0, 0)], ["no header where one must be"])


def corrupt(records: Stream, *offsets: int) -> Stream:
    for at in offsets:
        flipped = bytes((records.wire[at] ^ 1,))
        records.wire = records.wire[:at] + flipped + records.wire[at + 1 :]
        records.clear = records.clear[:at] + flipped + records.clear[at + 1 :]
    return records


def test_wrong_tags() -> None:
    wire = link(HINT, corrupt(small(), 250, 350))
    wire.marks((0, 100), (100, 500))
    assert (told(wire.rx), why(wire.rx)) == ([("auth_failed", 100, 2)], ["2 of the packet's records"])
    ideal = link(IDEAL, corrupt(small(), 250))
    ideal.marks((0, 100), (100, 300))
    assert told(ideal.rx) == [("auth_failed", 100, 2), ("lost", 100, 1)]


def test_crypto_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AlreadyFinalized

    wire = link(HINT)
    monkeypatch.setattr(rx_module.RxContext, "_decrypt", fail)
    wire.marks((0, 100))
    assert (told(wire.rx), why(wire.rx)) == ([("error", 0, 0)], ["AlreadyFinalized"])


# -- ideal -------------------------------------------------------------------------------------------------------------


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


# -- tx ----------------------------------------------------------------------------------------------------------------


def test_tx_rebuilt_and_dropped() -> None:
    records = small()
    tx = TxContext(GCM_1_2.params(Direction.TX, BASE, FIRST))

    def send(at: int, end: int, resync: Resync | None = None) -> None:
        tx.encrypt((BASE + at) % 2**32, memoryview(bytearray(records.framed[at:end])), resync)

    send(0, 250)
    assert told(tx) == []
    send(150, 200, Resync((BASE + 100) % 2**32, FIRST + 1, records.framed[100:150]))
    with pytest.raises(TxDrop):
        send(250, 300)
    send(300, 400, Resync((BASE + 300) % 2**32, FIRST + 3, b""))
    assert told(tx) == [("rebuilt", 100, 1), ("dropped", 250, None), ("rebuilt", 300, 3)]
    assert why(tx) == ["prefix of 50 bytes", "tx_drop_wrong_seq", "prefix of 0 bytes"]
    assert tx.describe()["bytes"] == 2 * (SIZE - 29) + (50 - 13) + 34 + (SIZE - 29)


def test_tx_another_plaintext_under_the_same_nonce() -> None:
    records = small()
    tx = TxContext(GCM_1_2.params(Direction.TX, BASE, FIRST))
    tx.encrypt(BASE, memoryview(bytearray(records.framed[:SIZE])))
    changed = bytearray(records.framed[:SIZE])
    changed[50] ^= 1
    with pytest.raises(TxDrop):
        tx.encrypt(BASE, memoryview(changed), Resync(BASE, FIRST, b""))
    assert (told(tx), why(tx)[-1]) == ([("rebuilt", 0, 0), ("dropped", 0, None)], "tx_drop_nonce_reuse")


def test_ideal_wrong_tag_behind_a_hole() -> None:
    wire = link(IDEAL, corrupt(small(), 250))
    wire.marks((0, 100), (140, 200), (200, 300))
    assert told(wire.rx)[-1] == ("auth_failed", 200, 2)


def test_tx_born_without_a_place() -> None:
    tx = TxContext(GCM_1_2.params(Direction.TX, BASE, FIRST, no_sync=True))
    assert (told(tx), why(tx)) == ([("lost", None, None)], ["made without a place"])


# -- the history itself ------------------------------------------------------------------------------------------------


def test_memory_is_bounded_and_events_are_numbered() -> None:
    history = History()
    for number in range(10 * MAX_EVENTS):
        history.note(Happened.GAP, number)
    assert [event.seq for event in history.events] == list(range(9 * MAX_EVENTS, 10 * MAX_EVENTS))
    assert [event.number for event in history.events] == list(range(9 * MAX_EVENTS + 1, 10 * MAX_EVENTS + 1))
    assert len(history.describe()) == MAX_EVENTS


def test_time_counts_from_the_context_s_birth() -> None:
    now = [100.0]
    history = History(lambda: now[0])
    now[0] = 102.5
    history.note(Happened.GAP)
    assert history.events[0].at == 2.5


@pytest.mark.parametrize("personality", RxPersonality)
def test_no_secret_in_any_disorder(personality: RxPersonality) -> None:
    """Whatever happens, a history is made of numbers, the words of the code, and little of them."""
    rng = random.Random(3)
    wire = link(personality, small(200))
    for _ in range(2000):
        at = rng.randrange(0, 200 * SIZE - 60)
        wire.packet(at, at + rng.randrange(1, 60))
        if not rng.randrange(10):
            wire.resync(rng.randrange(200))
    text = repr(wire.rx.history.describe())
    assert len(wire.rx.history.events) == MAX_EVENTS
    assert len(text) < MAX_EVENTS * 200
    for secret in (GCM_1_2.key, GCM_1_2.salt, GCM_1_2.iv, wire.records.clear[13:40]):
        assert repr(secret)[2:-1] not in text
        assert secret.hex() not in text
