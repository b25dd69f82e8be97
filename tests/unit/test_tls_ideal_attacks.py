"""Attacks on rx `ideal`: records moved, repeated and forged by somebody on the path who lacks only the keys.

Ten records of 100 bytes; the context has learned how nonces count when a test begins. `refuse` means that the device
sees a packet that the kernel does not use.
"""

from __future__ import annotations

import random
from itertools import permutations

import pytest

from nicdev.abi import Direction
from nicdev.tls.ideal import IdealContext
from nicdev.tls.store import Pool
from tests.support.tls_oracle import GCM_1_2, stream
from tests.unit.test_tls_ideal_property import BASE, Flow, finish

SIZE = 100


def begin(upto: int = 250, *, no_sync: bool = False) -> Flow:
    """A flow that went well up to there: in packets that begin and end inside records."""
    records = stream(GCM_1_2, [71] * 10)
    params = GCM_1_2.params(Direction.RX, BASE, records.first_number, no_sync=no_sync)
    flow = Flow(records, IdealContext(params, pool=Pool()), random.Random(1))
    at = 0
    while at < upto:
        assert send(flow, at, min(at + 50, upto)) is (at > 0)  # nonces are learned from a verified record
        at += 50
    return flow


def send(flow: Flow, at: int, end: int, *, refuse: bool = False, later: bool = False) -> bool:
    """Bytes at..end of the stream arrive; whether they are marked."""
    return flow.packet(at, flow.records.wire[at:end], refuse=refuse, later=later).decrypted


def record(flow: Flow, index: int) -> bytes:
    return flow.records.wire[index * SIZE : (index + 1) * SIZE]


def longer(flow: Flow, index: int, records: int) -> bytes:
    """The start of a record, whose header claims that it is as long as several."""
    forged = bytearray(record(flow, index)[:40])
    forged[3:5] = (records * SIZE - 5).to_bytes(2, "big")
    return bytes(forged)


def state(flow: Flow) -> object:
    return flow.rx.describe()["state"]


def accepted(flow: Flow) -> int:
    """How many records the kernel took; all of them must be the truth."""
    flow.check()
    return len(flow.kernel.texts)


def retransmit(flow: Flow) -> None:
    finish(flow, 3)
    flow.check()


@pytest.mark.parametrize("step", [50, 100, 13])
@pytest.mark.parametrize(("index", "place"), [(4, 500), (5, 700), (3, 400), (4, 600)])
@pytest.mark.conformance(4)
def test_record_moved_behind_a_hole(index: int, place: int, step: int) -> None:
    """It is marked, as far as it is known; but what fills the hole does not lead to it."""
    flow = begin()
    assert flow.packet(place, record(flow, index)).decrypted == (index != 3)
    retransmit(flow)
    at = 250
    while at < place:
        send(flow, at, min(at + step, place))
        at += step
    assert accepted(flow) < place // SIZE or index == 3
    assert state(flow) == "poisoned" or index == 3


def test_record_deleted() -> None:
    flow = begin(300)
    flow.packet(300, record(flow, 4))
    assert accepted(flow) == 3
    assert flow.kernel.dead


def test_record_repeated_in_its_successor_s_place() -> None:
    flow = begin(300)
    assert not flow.packet(300, record(flow, 2)).decrypted
    assert accepted(flow) == 3


@pytest.mark.parametrize("honest_first", [False, True])
def test_forged_length_that_the_kernel_never_sees(honest_first: bool) -> None:
    """The device takes record 2 to be as long as two, so record 3 would start where record 4 does."""
    flow = begin(200)
    assert flow.packet(200, longer(flow, 2, 2), refuse=True).decrypted
    if honest_first:
        send(flow, 200, 240)
        assert state(flow) == "scanning"
    assert flow.packet(400, record(flow, 3)).decrypted is not honest_first
    send(flow, 300, 400)
    send(flow, 240, 300)
    send(flow, 200, 240)
    assert accepted(flow) == (4 if honest_first else 2)
    assert state(flow) == ("scanning" if honest_first else "poisoned")
    retransmit(flow)


@pytest.mark.parametrize("order", list(permutations([(200, 240), (240, 300), (300, 400)])))
def test_forged_length_and_its_filling_in_any_order(order: tuple[tuple[int, int], ...]) -> None:
    flow = begin(200)
    flow.packet(200, longer(flow, 2, 2), refuse=True)
    assert flow.packet(400, record(flow, 3)).decrypted
    for low, high in order:
        send(flow, low, high)
    assert accepted(flow) == 2
    retransmit(flow)
    assert accepted(flow) == 2


def test_forged_length_found_out_before_there_is_debt() -> None:
    flow = begin(200)
    flow.packet(200, longer(flow, 2, 2), refuse=True)
    send(flow, 250, 260)
    assert not send(flow, 200, 240)
    assert not flow.packet(400, record(flow, 3)).decrypted
    send(flow, 240, 400)
    assert accepted(flow) == 4


@pytest.mark.parametrize("pieces", [1, 2])
def test_forged_record_of_which_the_tag_is_wrong(pieces: int) -> None:
    """In order; what follows it is not believed."""
    flow = begin(200)
    forged = longer(flow, 2, 2) + flow.records.wire[240:400]
    for at in range(0, 200, 200 // pieces):
        flow.packet(200 + at, forged[at : at + 200 // pieces], refuse=True)
    assert not flow.packet(400, record(flow, 3)).decrypted
    send(flow, 200, 400)
    assert accepted(flow) == 4
    assert state(flow) == "scanning"


def test_tag_found_wrong_behind_a_hole() -> None:
    flow = begin(200)
    flow.packet(200, longer(flow, 2, 2), refuse=True)
    send(flow, 300, 400)
    send(flow, 240, 300)
    assert state(flow) == "scanning"
    assert not flow.packet(400, record(flow, 3)).decrypted
    send(flow, 200, 240)
    assert accepted(flow) == 3  # 300..400 was marked as a piece of the forged record: the kernel finds no header there
    assert flow.kernel.dead


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("order", list(permutations(range(4))))
@pytest.mark.conformance(4)
def test_forged_copy_of_a_piece_in_any_order(order: tuple[int, ...], later: bool) -> None:
    """Record 3 in three pieces and a forged copy of the second, behind a hole; the kernel keeps either copy."""
    flow = begin()
    wire = flow.records.wire
    forged = bytes(byte ^ 1 for byte in wire[340:370])
    parts = [(300, wire[300:340]), (340, wire[340:370]), (370, wire[370:400]), (340, forged)]
    for number in order:
        at, data = parts[number]
        flow.packet(at, data, later=later)
    send(flow, 250, 300)
    assert accepted(flow) >= 3
    retransmit(flow)


def test_forged_copy_of_a_verified_record_is_not_marked() -> None:
    flow = begin()
    assert send(flow, 300, 400)
    forged = bytearray(record(flow, 3))
    forged[50] ^= 1
    assert not flow.packet(300, bytes(forged), later=True).decrypted
    assert send(flow, 250, 300)
    assert accepted(flow) == 3
    assert flow.kernel.dead


@pytest.mark.parametrize("at", [300, 304, 310, 350, 399])
@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.conformance(4)
def test_wrong_byte_in_any_piece(order: tuple[int, ...], at: int) -> None:
    flow = begin()
    wire = bytearray(flow.records.wire)
    wire[at] ^= 0x40
    parts = [(300, 330), (330, 380), (380, 400)]
    for number in order:
        low, high = parts[number]
        flow.packet(low, bytes(wire[low:high]))
    send(flow, 250, 300)
    assert accepted(flow) == 3


def test_kernel_that_has_more_than_the_device_saw() -> None:
    """Unread data from before the context: what fills the hole never comes, and a moved record is never marked."""
    records = stream(GCM_1_2, [71] * 10)
    flow = Flow(records, IdealContext(GCM_1_2.params(Direction.RX, BASE, 5), pool=Pool()), random.Random(1))
    flow.kernel.take(0, records.wire[:500], False)
    assert not flow.packet(500, record(flow, 4)).decrypted
    assert not flow.packet(600, record(flow, 5)).decrypted
    assert accepted(flow) == 5


def test_forged_length_while_the_context_scans() -> None:
    """The host's answer is right, but not what was followed since; a second one finds out."""
    flow = begin(0, no_sync=True)
    flow.kernel.take(0, flow.records.wire[:200], False)
    send(flow, 200, 305)
    send(flow, 305, 400)
    flow.packet(400, longer(flow, 4, 2), refuse=True)
    flow.answer()
    assert state(flow) == "tracking"
    flow.packet(440, bytes(160), refuse=True)
    assert not flow.packet(600, record(flow, 5), refuse=True).decrypted
    assert not flow.packet(700, record(flow, 6)).decrypted
    send(flow, 400, 700)
    accepted(flow)
    flow.answer()
    retransmit(flow)


def test_honest_flow_that_scans_is_marked_again() -> None:
    flow = begin(0, no_sync=True)
    flow.kernel.take(0, flow.records.wire[:200], False)
    marks = []
    for at in range(200, 1000, 50):
        marks.append(send(flow, at, at + 50))
        flow.answer()
    assert accepted(flow) == 10
    assert marks[-8:] == [True] * 8


def test_memory_runs_out() -> None:
    """Nothing is dropped, nothing wrong is marked, and what is kept is given back."""
    flow = begin()
    pool = flow.rx._pool
    pool.free = 250
    assert send(flow, 300, 400)
    assert send(flow, 400, 450)
    assert send(flow, 450, 500)  # what is verified needs no memory
    assert not send(flow, 510, 550)
    assert not send(flow, 560, 660)
    assert state(flow) == "holes"
    assert send(flow, 250, 300)
    assert state(flow) == "scanning"
    retransmit(flow)
    assert accepted(flow) == 10
    assert pool.free == 250
    assert flow.drops == 0


def test_debt_is_known_to_the_device_and_paid() -> None:
    flow = begin()
    pool = flow.rx._pool
    assert send(flow, 300, 400)
    assert list(pool.indebted) == [(b"\x0a\x00\x00\x02", b"\x0a\x00\x00\x01")]
    assert send(flow, 250, 300)
    assert pool.indebted == {}
    assert state(flow) == "in_sync"


def test_hidden_filling_is_answered_by_the_host() -> None:
    """The hole is filled by another way (another interface); the host's answer tells that it has it."""
    flow = begin()
    assert send(flow, 300, 450)
    flow.kernel.take(250, flow.records.wire[250:300], False)
    flow.rx.resync((BASE + 300) % 2**32, 8)
    assert state(flow) == "holes"
    assert send(flow, 450, 500)
    assert state(flow) == "in_sync"
    assert accepted(flow) == 5


@pytest.mark.conformance(4)
def test_nonce_of_the_attacker_s_choice() -> None:
    """A forged header whose key stream is known: what is marked where record 3 starts could be a record of his own."""
    flow = begin(200)
    forged = bytearray(longer(flow, 2, 5))
    forged[5:13] = record(flow, 0)[5:13]
    assert not flow.packet(200, bytes(forged), refuse=True).decrypted
    for at in range(240, 640, 100):
        assert not flow.packet(at, bytes(100)).decrypted
    retransmit(flow)


@pytest.mark.conformance(4)
def test_nonce_of_the_attacker_s_choice_behind_a_hole() -> None:
    flow = begin()
    forged = bytearray(record(flow, 3)[:60])
    forged[5:13] = record(flow, 0)[5:13]
    assert not flow.packet(300, bytes(forged)).decrypted


def test_nonces_that_do_not_count_are_never_marked_early() -> None:
    records = stream(GCM_1_2, [71] * 6)
    other = stream(GCM_1_2, [71] * 6, seed=50)
    records.wire = records.wire[:200] + other.wire[200:300] + records.wire[300:]
    records.clear = records.clear[:200] + other.clear[200:300] + records.clear[300:]
    flow = Flow(records, IdealContext(GCM_1_2.params(Direction.RX, BASE, 5), pool=Pool()), random.Random(1))
    assert send(flow, 0, 150)  # one whole record tells how nonces count
    assert send(flow, 150, 200)
    assert not send(flow, 200, 250)  # record 2 does not follow
    assert send(flow, 250, 300)  # its tag was right
    assert not send(flow, 300, 350)  # nothing is expected any more
    assert send(flow, 350, 400)
    assert send(flow, 400, 600)
    assert accepted(flow) == 6
