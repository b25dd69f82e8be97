"""What a context's history says: every kind of event, its place and record; how many are kept, and no secret."""

from __future__ import annotations

import random

import pytest
from cryptography.exceptions import AlreadyFinalized

from nicdev.abi import Direction, RxPersonality
from nicdev.errors import TxDrop
from nicdev.tls import rx as rx_module
from nicdev.tls.history import MAX_EVENTS, Happened, History
from nicdev.tls.scan import RESCAN_AFTER
from nicdev.tls.tx import Resync, TxContext
from tests.support.tls_link import BASE, FIRST, SIZE, link, small, told, why
from tests.support.tls_oracle import GCM_1_2, corrupt, stream

IDEAL, REQ, ASYNC, HINT = (
    RxPersonality.IDEAL,
    RxPersonality.DRIVER_REQ,
    RxPersonality.DRIVER_REQ_ASYNC,
    RxPersonality.CORE_NEXT_HINT,
)


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
