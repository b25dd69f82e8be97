"""Encryption of packets: every cut, every refusal, resync. The oracle seals whole records in one call."""

from __future__ import annotations

from itertools import combinations

import pytest
from cryptography.exceptions import InternalError
from hypothesis import given, settings
from hypothesis import strategies as st

from nicdev.abi import Direction, TlsVersion
from nicdev.errors import TxDrop
from nicdev.stats import Counter
from nicdev.tls.partial import SealingRecord
from nicdev.tls.tx import Resync, TxContext
from tests.support.tls_oracle import GCM_1_2, RUBBISH, SUITES, Stream, Suite, cut, stream

SEQ = 0xFFFFFFD0  # wraps within the first record
ALL_SUITES = pytest.mark.parametrize("suite", SUITES, ids=str)


def context(suite: Suite, seq: int = SEQ, number: int = 5, *, no_sync: bool = False) -> TxContext:
    return TxContext(suite.params(Direction.TX, seq, number, no_sync=no_sync))


def send(tx: TxContext, seq: int, data: bytes, resync: Resync | None = None) -> bytes:
    buffer = bytearray(data)
    tx.encrypt(seq % 2**32, memoryview(buffer), resync)
    return bytes(buffer)


def send_all(tx: TxContext, pieces: list[bytes], seq: int = SEQ) -> bytes:
    out = b""
    for piece in pieces:
        out += send(tx, seq + len(out), piece)
    return out


def dropped(tx: TxContext, counter: Counter, seq: int, data: bytes, resync: Resync | None = None) -> bytes:
    """Assert that the packet is dropped for this reason; the payload as the drop left it."""
    buffer = bytearray(data)
    with pytest.raises(TxDrop) as caught:
        tx.encrypt(seq % 2**32, memoryview(buffer), resync)
    assert caught.value.counter is counter
    return bytes(buffer)


@ALL_SUITES
@pytest.mark.conformance(22)
@pytest.mark.conformance(23)
@pytest.mark.conformance(24)
@pytest.mark.conformance(26)
def test_every_cut_into_two(suite: Suite) -> None:
    for sizes in ([33, 20], [0, 16, 15], [1]):
        records = stream(suite, sizes)
        for at in range(len(records.wire)):
            assert send_all(context(suite), cut(records.framed, [at])) == records.wire


@ALL_SUITES
def test_every_cut_into_three(suite: Suite) -> None:
    records = stream(suite, [17])
    for cuts in combinations(range(1, len(records.wire)), 2):
        assert send_all(context(suite), cut(records.framed, cuts)) == records.wire


@ALL_SUITES
def test_byte_by_byte(suite: Suite) -> None:
    records = stream(suite, [50, 0, 31])
    assert send_all(context(suite), cut(records.framed, range(1, len(records.framed)))) == records.wire


@ALL_SUITES
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 1399, 1400, 1401, 16383, 16384])
def test_header_splits_times_tag_splits(suite: Suite, size: int) -> None:
    records = stream(suite, [size])
    total = len(records.wire)
    for head in (1, 2, 3, 4, 5, suite.prefix - 1, suite.prefix):
        for tag in (16, 15, 8, 1):
            pieces = cut(records.framed, [head, max(head, total - tag)])
            assert send_all(context(suite), pieces) == records.wire


@ALL_SUITES
@pytest.mark.conformance(30)
def test_many_records_in_one_packet_with_results(suite: Suite) -> None:
    records = stream(suite, [64] * 50)
    buffer = bytearray(records.framed)
    result = context(suite).encrypt(SEQ, memoryview(buffer))
    assert buffer == records.wire
    inner = suite.version is TlsVersion.TLS_1_3
    assert result == (50, 50 * (64 + inner))


def test_plaintext_and_records_are_counted_per_packet() -> None:
    records = stream(GCM_1_2, [40, 40])
    tx = context(GCM_1_2)
    results = []
    for a, b in ((0, 20), (20, 53), (53, 60), (60, 75), (75, len(records.framed))):
        results.append(tuple(tx.encrypt((SEQ + a) % 2**32, memoryview(bytearray(records.framed[a:b])))))
    # 13 prefix, 40 text, 16 tag: 69 per record
    assert results == [(0, 7), (0, 33), (0, 0), (1, 0), (1, 40)]
    assert (tx.packets, tx.records) == (5, 2)


@settings(max_examples=60, deadline=None)
@given(
    suite=st.sampled_from(SUITES),
    sizes=st.lists(st.one_of(st.integers(0, 64), st.integers(0, 16384), st.just(16384)), min_size=1, max_size=4),
    data=st.data(),
)
@pytest.mark.conformance(20)
@pytest.mark.conformance(30)
def test_random_segmentation(suite: Suite, sizes: list[int], data: st.DataObject) -> None:
    records = stream(suite, sizes)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(records.framed)), max_size=10)))
    assert send_all(context(suite), cut(records.framed, cuts)) == records.wire


@pytest.mark.conformance(124)
def test_content_type_is_authenticated() -> None:
    """Any: a program may choose it (TLS_SET_RECORD_TYPE), and without offload it goes out as well."""
    records = Stream(GCM_1_2)
    for kind in range(256):
        records.add(b"text", kind)
    assert send_all(context(GCM_1_2), [records.framed]) == records.wire


@ALL_SUITES
@pytest.mark.conformance(29)
@pytest.mark.conformance(85)
def test_wrong_seq_drops_and_changes_nothing(suite: Suite) -> None:
    records = stream(suite, [30, 30])
    for at in (0, 3, suite.prefix, 25, records.ends[0] - 5, records.ends[0]):
        tx = context(suite)
        first, rest = records.framed[:at], records.framed[at:]
        assert (send(tx, SEQ, first) if at else b"") == records.wire[:at]
        for wrong in (1, -1, 2**31, -(2**31) + 1, len(rest)):
            assert dropped(tx, Counter.TX_DROP_WRONG_SEQ, SEQ + at + wrong, rest) == rest
        assert send(tx, SEQ + at, rest) == records.wire[at:]


@ALL_SUITES
def test_bad_record_drops_and_loses_sync(suite: Suite) -> None:
    records = stream(suite, [10, 10, 10])
    start = records.ends[1]
    bad_type = [(0, 0x47)] if suite.version is TlsVersion.TLS_1_3 else []
    for byte, bad in (*bad_type, (1, 2), (2, 4), (3, 0xFF)):
        tx = context(suite)
        data = bytearray(records.framed)
        data[start + byte] = bad
        assert dropped(tx, Counter.TX_DROP_BAD_RECORD, SEQ, bytes(data)) == data
        dropped(tx, Counter.TX_DROP_WRONG_SEQ, SEQ, records.framed)
        dropped(tx, Counter.TX_DROP_WRONG_SEQ, SEQ + len(data), records.framed)
        assert tx.describe()["state"] == "lost"
        # Only a resync brings it back.
        resync = Resync(SEQ, 5, b"")
        assert send(tx, SEQ, records.framed, resync) == records.wire


def test_a_bad_header_is_seen_at_its_first_bad_byte() -> None:
    records = stream(GCM_1_2, [10])
    tx = context(GCM_1_2)
    assert send(tx, SEQ, records.framed) == records.wire
    end = SEQ + len(records.framed)
    dropped(tx, Counter.TX_DROP_BAD_RECORD, end, b"GE")
    dropped(tx, Counter.TX_DROP_WRONG_SEQ, end, records.framed)


def test_record_number_never_wraps() -> None:
    last = 2**64 - 1
    for suite in SUITES:
        records = stream(suite, [10], first_number=last)
        tx = context(suite, number=last)
        two = records.framed * 2
        # The second record would be number 2**64: nothing of the packet leaves, and the context stands where it stood.
        assert dropped(tx, Counter.TX_DROP_SEQ_WRAP, SEQ, two) == two
        dropped(tx, Counter.TX_DROP_SEQ_WRAP, SEQ, records.framed + b"\x17")
        assert send(tx, SEQ, records.framed) == records.wire
        dropped(tx, Counter.TX_DROP_SEQ_WRAP, SEQ + len(records.framed), records.framed)
        dropped(tx, Counter.TX_DROP_SEQ_WRAP, SEQ, records.framed, Resync(SEQ, last + 1, b""))


@ALL_SUITES
@pytest.mark.conformance(45)
@pytest.mark.conformance(46)
@pytest.mark.conformance(47)
def test_retransmission_with_prefix_gives_the_same_bytes(suite: Suite) -> None:
    records = stream(suite, [20, 45, 20])
    tx = context(suite)
    assert send(tx, SEQ, records.framed) == records.wire
    start, end = records.ends[0], records.ends[1]
    for at in range(start, end):
        resync = Resync((SEQ + start) % 2**32, 6, records.framed[start:at])
        # The packet ends within the record, at its end, or in the next one; then the stream goes on behind it.
        for stop in (min(at + 3, end), end, end + 9):
            assert send(tx, SEQ + at, records.framed[at:stop], resync) == records.wire[at:stop]
            assert send(tx, SEQ + stop, records.framed[stop:]) == records.wire[stop:]
    assert tx.resyncs == 3 * (end - start)


@ALL_SUITES
def test_prefix_tag_bytes_are_ignored(suite: Suite) -> None:
    records = stream(suite, [20])
    at = records.ends[0] - 6
    prefix = records.framed[: at - 10] + b"\x99" * 10
    assert send(context(suite), SEQ + at, RUBBISH[:6], Resync(SEQ, 5, prefix)) == records.wire[at:]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_prefix_may_be_any_buffer_and_stays_unchanged(kind: type) -> None:
    records = stream(GCM_1_2, [20])
    prefix = kind(records.framed[:25])
    assert send(context(GCM_1_2), SEQ + 25, records.framed[25:], Resync(SEQ, 5, prefix)) == records.wire[25:]
    assert prefix == records.framed[:25]


@ALL_SUITES
@pytest.mark.conformance(54)
def test_next_record_resync(suite: Suite) -> None:
    records = stream(suite, [20, 20, 20])
    at = records.ends[1]
    for tx in (context(suite), context(suite, no_sync=True)):
        assert send(tx, SEQ + at, records.framed[at:], Resync((SEQ + at) % 2**32, 7, b"")) == records.wire[at:]


def test_no_sync_context_drops_until_resync() -> None:
    records = stream(GCM_1_2, [20, 20])
    tx = context(GCM_1_2, no_sync=True)
    assert dropped(tx, Counter.TX_DROP_WRONG_SEQ, SEQ, records.framed) == records.framed
    assert send(tx, SEQ + 7, records.framed[7:], Resync(SEQ, 5, records.framed[:7])) == records.wire[7:]


@pytest.mark.conformance(55)
@ALL_SUITES
def test_bad_extension_drops_and_changes_nothing(suite: Suite) -> None:
    records = stream(suite, [30, 30])
    at = 20
    tx = context(suite)
    send(tx, SEQ, records.framed[:at])
    rest = records.framed[at:]
    whole = records.framed[: records.ends[0]]
    for seq, resync in (
        (SEQ + at, Resync(SEQ, 5, records.framed[: at - 1])),
        (SEQ + at, Resync(SEQ, 5, records.framed[: at + 1])),
        (SEQ + at, Resync(SEQ, 5, b"")),
        (SEQ + len(whole), Resync(SEQ, 5, whole)),  # a whole record is no prefix
        (SEQ + len(whole) + 3, Resync(SEQ, 5, records.framed[: len(whole) + 3])),
    ):
        assert dropped(tx, Counter.TX_DROP_BAD_EXTENSION, seq, rest, resync) == rest
    assert send(tx, SEQ + at, rest) == records.wire[at:]


def test_prefix_that_is_no_record_loses_sync() -> None:
    records = stream(GCM_1_2, [30])
    tx = context(GCM_1_2)
    dropped(tx, Counter.TX_DROP_BAD_RECORD, SEQ + 20, records.framed[20:], Resync(SEQ, 5, b"x" * 20))
    dropped(tx, Counter.TX_DROP_WRONG_SEQ, SEQ, records.framed)


@ALL_SUITES
@pytest.mark.conformance(85)
def test_a_crypto_fault_drops_and_loses_sync(suite: Suite) -> None:
    records = stream(suite, [30])
    for at, resync in ((0, None), (0, Resync(SEQ, 5, b"")), (20, Resync(SEQ, 5, records.framed[:20]))):
        tx = context(suite)
        tx._key.wipe()  # stands for any fault of the library
        dropped(tx, Counter.TX_DROP_CRYPTO, SEQ + at, records.framed[at:], resync)
        dropped(tx, Counter.TX_DROP_WRONG_SEQ, SEQ, records.framed)


@pytest.mark.conformance(85)
def test_another_text_inside_a_record_drops_and_loses_sync() -> None:
    records = stream(GCM_1_2, [200])
    tx = context(GCM_1_2)
    send(tx, SEQ, records.framed[:60])
    send(tx, SEQ + 60, records.framed[60:100])
    send(tx, SEQ, records.framed[:60], Resync(SEQ, 5, b""))
    dropped(tx, Counter.TX_DROP_NONCE_REUSE, SEQ + 60, bytes(40))
    dropped(tx, Counter.TX_DROP_WRONG_SEQ, SEQ + 60, records.framed[60:100])


def test_a_crypto_fault_inside_a_record_drops_and_loses_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    records = stream(GCM_1_2, [90])
    first, middle, rest = cut(records.framed, [40, 60])
    tx = context(GCM_1_2)
    send(tx, SEQ, first)

    def fails(self: SealingRecord, text: memoryview) -> None:
        raise InternalError("broken", [])

    monkeypatch.setattr(SealingRecord, "more", fails)
    dropped(tx, Counter.TX_DROP_CRYPTO, SEQ + 40, middle)
    dropped(tx, Counter.TX_DROP_WRONG_SEQ, SEQ + 40, middle)
    dropped(tx, Counter.TX_DROP_WRONG_SEQ, SEQ + 60, rest)


@ALL_SUITES
def test_wipe_overwrites_every_secret(suite: Suite) -> None:
    params = suite.params(Direction.TX, SEQ, 5)
    tx = TxContext(params)
    send(tx, SEQ, stream(suite, [30]).framed[:20])
    secrets = [params.key, params.salt, params.iv, tx._key._key, tx._fmt._fixed_iv]
    assert any(any(secret) for secret in secrets)
    tx.wipe()
    assert not any(any(secret) for secret in secrets)
    dropped(tx, Counter.TX_DROP_WRONG_SEQ, SEQ + 20, b"x")


def test_describe() -> None:
    tx = context(GCM_1_2)
    records = stream(GCM_1_2, [30])
    send(tx, SEQ, records.framed[:20])
    assert tx.describe() == {
        "dir": "tx",
        "cipher": "aes_gcm_128",
        "version": "tls_1_2",
        "local": "10.0.0.2:4433",
        "remote": "10.0.0.1:50001",
        "state": "in_sync",
        "seq": (SEQ + 20) % 2**32,
        "record": 5,
        "packets": 1,
        "bytes": 7,
        "records": 0,
        "resyncs": 0,
    }
    assert tx.params.key.hex() not in repr(tx.params)
    assert repr(tx.params).count("key") == 0
