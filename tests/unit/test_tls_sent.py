"""What left is remembered: the same bytes may leave again, in whatever cuts, others may not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nicdev.abi import Direction
from nicdev.errors import TxDrop
from nicdev.stats import Counter
from nicdev.tls.sent import LARGE, MAX_SENT, Sent
from nicdev.tls.store import MAX_POOL, Pool
from nicdev.tls.tx import Resync, TxContext
from tests.support.tls_oracle import SUITES, Suite, stream

SEQ = 0xFFFFFF00  # wraps within the data
DATA = bytes(n * n % 251 for n in range(1000))
ALL_SUITES = pytest.mark.parametrize("suite", SUITES, ids=str)


def admit(sent: Sent, at: int, data: bytes) -> bool:
    return sent.admit((SEQ + at) % 2**32, memoryview(data))


@given(st.lists(st.tuples(st.integers(0, 999), st.integers(1, 400)), max_size=20), st.integers(0, 999))
def test_the_same_bytes_may_leave_in_any_cuts(cuts: list[tuple[int, int]], spoilt: int) -> None:
    """And one that differs may not, if it left before: the model is a set of places."""
    sent = Sent(Pool())
    left: set[int] = set()
    wrong = DATA[:spoilt] + bytes([DATA[spoilt] ^ 1]) + DATA[spoilt + 1 :]
    for at, size in cuts:
        assert admit(sent, at, DATA[at : at + size])
        left |= set(range(at, min(at + size, len(DATA))))
        low = max(0, spoilt - 3)
        assert sent.differs((SEQ + low) % 2**32, memoryview(wrong)[low : spoilt + 3]) == (spoilt in left)
    if spoilt in left:
        assert not admit(sent, spoilt, wrong[spoilt : spoilt + 1])


def test_what_may_not_leave_is_not_remembered() -> None:
    sent = Sent(Pool())
    assert admit(sent, 0, b"aaaa")
    assert not admit(sent, 2, b"abbb")
    assert admit(sent, 4, b"cc")


def test_memory_of_a_flow_is_bounded_and_given_back() -> None:
    pool = Pool()
    sent = Sent(pool)
    piece = bytes(60_000)
    for number in range(2 * MAX_SENT // len(piece)):
        assert admit(sent, number * len(piece), piece)
        assert MAX_POOL - pool.free < MAX_SENT + 2 * len(piece)
    last = number * len(piece)
    assert not admit(sent, last - MAX_SENT // 2, b"\1")
    assert admit(sent, 0, b"\1"), "forgotten"
    sent.clear()
    assert pool.free == MAX_POOL


def test_flows_share_what_memory_there_is() -> None:
    """Where nothing is left, one after the other gives up the older half of what it has; the last packets are safe."""
    pool = Pool(100_000)
    flows = [Sent(pool) for _ in range(10)]
    for number in range(100):
        for sent in flows:
            assert admit(sent, number * 1000, bytes(1000))
            assert not admit(sent, number * 1000 + 999, b"\1")
    assert pool.free > -20_000


def test_many_flows_keep_no_more_than_the_memory_there_is() -> None:
    """A flow that falls silent makes room for those that send, large packets or small ones."""
    pool = Pool(100_000)
    flows = [Sent(pool) for _ in range(1000)]
    for number, sent in enumerate(flows):
        assert admit(sent, 0, bytes(16_000 if number % 2 else 100))
        assert pool.free >= 0
        assert sent.differs(SEQ, memoryview(b"\1"))
    assert not flows[0].differs(SEQ, memoryview(b"\1")), "forgotten"
    for sent in flows:
        sent.clear()
    assert pool.free == 100_000
    assert not pool.holders


@ALL_SUITES
@pytest.mark.conformance(124)
def test_a_record_that_changed_is_not_sent_again(suite: Suite) -> None:
    """A retransmission whose plaintext differs from what was sent under its nonce, whole, in part, or in its prefix."""
    first, changed = stream(suite, [100, 50]), stream(suite, [100, 50])
    framed = bytearray(changed.framed)
    framed[suite.prefix + 90] ^= 1
    for start, end in ((0, len(framed)), (20, 110), (suite.prefix + 95, 120)):
        tx = TxContext(suite.params(Direction.TX, SEQ, 5))
        packet = bytearray(first.framed)
        tx.encrypt(SEQ, memoryview(packet))
        assert packet == first.wire
        again = bytearray(framed[start:end])
        with pytest.raises(TxDrop) as caught:
            tx.encrypt((SEQ + start) % 2**32, memoryview(again), Resync(SEQ, 5, bytes(framed[:start])))
        assert caught.value.counter is Counter.TX_DROP_NONCE_REUSE
        same = bytearray(first.framed[start:end])
        tx.encrypt((SEQ + start) % 2**32, memoryview(same), Resync(SEQ, 5, bytes(first.framed[:start])))
        assert same == first.wire[start:end]


def test_a_large_packet_is_kept_itself_where_it_is_most_of_its_buffer() -> None:
    """And else a copy, so that what stood before it in the buffer, such as a resync's prefix, does not stay."""
    sent = Sent(Pool())
    whole, half = bytearray(bytes(n % 251 for n in range(100 + LARGE))), bytearray(4 * LARGE)
    assert sent.admit(0, memoryview(whole)[100:])
    assert sent.admit(LARGE, memoryview(half)[LARGE : 2 * LARGE])
    for size in (1, 99, LARGE):
        assert sent.admit(0, memoryview(bytes(whole[100 : 100 + size])))
    assert not sent.admit(77, memoryview(bytes([whole[177] ^ 1])))
    half[LARGE] = whole[100] = 1
    assert not sent.differs(LARGE, memoryview(b"\0"))
    assert sent.differs(0, memoryview(b"\0")), "a view, so nobody may change it"
