"""Decryption of packets that arrive in order: every cut, every wrong byte."""

from __future__ import annotations

from itertools import combinations

import pytest
from cryptography.exceptions import InternalError
from hypothesis import given, settings
from hypothesis import strategies as st

from nicdev.abi import Direction, RxPersonality, TlsVersion
from nicdev.tls.aead import BytesLike, Opener
from nicdev.tls.history import Happened
from nicdev.tls.personality import rx_context
from nicdev.tls.rx import RxContext, RxResult
from tests.support.tls_link import decrypt
from tests.support.tls_oracle import GCM_1_2, SUITES, Stream, Suite, cut, stream

SEQ = 0xFFFFFFD0  # wraps within the first record
ALL_SUITES = pytest.mark.parametrize("suite", SUITES, ids=str)


class FailsOnce:
    """A library that fails once."""

    def __init__(self, good: Opener) -> None:
        self._good = good
        self._failed = False

    def update_into(self, data: BytesLike, buf: memoryview) -> int:
        if not self._failed:
            self._failed = True
            raise InternalError("broken", [])
        return self._good.update_into(data, buf)

    def verify(self, tag: BytesLike) -> bool:
        return self._good.verify(tag)


def context(suite: Suite, seq: int = SEQ, number: int = 5, *, no_sync: bool = False) -> RxContext:
    return RxContext(suite.params(Direction.RX, seq, number, no_sync=no_sync))


def receive(rx: RxContext, seq: int, data: bytes) -> tuple[RxResult, bytes]:
    buffer = bytearray(data)
    result = decrypt(rx, seq, buffer)
    return result, bytes(buffer)


def receive_all(rx: RxContext, pieces: list[bytes], seq: int = SEQ) -> bytes:
    """All pieces in order, each of which must come out decrypted."""
    out = b""
    for piece in pieces:
        result, data = receive(rx, seq + len(out), piece)
        assert result.decrypted
        assert not result.error
        out += data
    return out


@ALL_SUITES
@pytest.mark.conformance(22)
@pytest.mark.conformance(23)
@pytest.mark.conformance(24)
@pytest.mark.conformance(37)
def test_every_cut_into_two(suite: Suite) -> None:
    for sizes in ([33, 20], [0, 16, 15], [1]):
        records = stream(suite, sizes)
        for at in range(len(records.wire)):
            assert receive_all(context(suite), cut(records.wire, [at])) == records.clear


@ALL_SUITES
def test_every_cut_into_three(suite: Suite) -> None:
    records = stream(suite, [17])
    for cuts in combinations(range(1, len(records.wire)), 2):
        assert receive_all(context(suite), cut(records.wire, cuts)) == records.clear


@ALL_SUITES
def test_byte_by_byte(suite: Suite) -> None:
    records = stream(suite, [50, 0, 31])
    assert receive_all(context(suite), cut(records.wire, range(1, len(records.wire)))) == records.clear


@ALL_SUITES
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 1399, 1400, 1401, 16383, 16384])
def test_header_splits_times_tag_splits(suite: Suite, size: int) -> None:
    records = stream(suite, [size])
    total = len(records.wire)
    for head in (1, 2, 3, 4, 5, suite.prefix - 1, suite.prefix):
        for tag in (16, 15, 8, 1):
            pieces = cut(records.wire, [head, max(head, total - tag)])
            assert receive_all(context(suite), pieces) == records.clear


@settings(max_examples=60, deadline=None)
@given(
    suite=st.sampled_from(SUITES),
    sizes=st.lists(st.one_of(st.integers(0, 64), st.integers(0, 16384), st.just(16384)), min_size=1, max_size=3),
    data=st.data(),
)
@pytest.mark.conformance(21)
def test_random_segmentation(suite: Suite, sizes: list[int], data: st.DataObject) -> None:
    records = stream(suite, sizes)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(records.wire)), max_size=10)))
    assert receive_all(context(suite), cut(records.wire, cuts)) == records.clear


@ALL_SUITES
@pytest.mark.conformance(36)
def test_many_records_in_one_packet_with_results(suite: Suite) -> None:
    for count in (1, 2, 50):
        records = stream(suite, [64] * count)
        result, data = receive(context(suite), SEQ, records.wire)
        assert data == records.clear
        inner = suite.version is TlsVersion.TLS_1_3
        assert result == RxResult(decrypted=True, records=count, plaintext=count * (64 + inner))


def test_plaintext_and_records_are_counted_per_packet() -> None:
    records = stream(GCM_1_2, [40, 40])
    rx = context(GCM_1_2)
    results = []
    for a, b in ((0, 20), (20, 53), (53, 60), (60, 75), (75, len(records.wire))):
        result, _ = receive(rx, SEQ + a, records.wire[a:b])
        results.append((result.records, result.plaintext))
    # 13 prefix, 40 text, 16 tag: 69 per record
    assert results == [(0, 7), (0, 33), (0, 0), (1, 0), (1, 40)]
    assert (rx.packets, rx.records, rx.passed) == (5, 2, 0)


def test_content_type_is_authenticated() -> None:
    records = Stream(GCM_1_2)
    for kind in (20, 21, 22, 23, 24):
        records.add(b"text", kind)
    assert receive_all(context(GCM_1_2), [records.wire]) == records.clear
    other = bytearray(records.wire)
    other[0] = 21
    result, data = receive(context(GCM_1_2), SEQ, bytes(other))
    assert (result.decrypted, result.auth_failed, data) == (False, 1, bytes(other))


@ALL_SUITES
@pytest.mark.conformance(86)
@pytest.mark.conformance(87)
@pytest.mark.conformance(88)
@pytest.mark.conformance(90)
def test_every_wrong_bit_of_a_three_record_packet(suite: Suite) -> None:
    records = stream(suite, [9, 10, 11])
    lengths = {start + byte for start in records.starts() for byte in (3, 4)}
    headers = {start + byte for start in records.starts() for byte in range(3)}
    for at in range(len(records.wire)):
        for bit in range(8):
            wire = bytearray(records.wire)
            wire[at] ^= 1 << bit
            result, data = receive(context(suite), SEQ, bytes(wire))
            if at in lengths and result.decrypted:
                # The record seems to go on in the next packet: nothing that is complete is wrong. Its tag will be.
                assert result.records <= records.starts().index(at - 3 if at - 3 in records.starts() else at - 4)
                continue
            assert not result.decrypted
            assert result.error
            assert data == wire
            assert (result.records, result.plaintext) == (0, 0)
            if at not in lengths | headers:
                assert (result.auth_failed, result.lost_sync) == (1, False)


@ALL_SUITES
@pytest.mark.conformance(87)
def test_wrong_record_spoils_its_last_packet_only(suite: Suite) -> None:
    """Text and tag of the second of three records, in packets of every size: framing is known, so sync is kept."""
    records = stream(suite, [21, 22, 23])
    start, end = records.starts()[1] + suite.prefix, records.ends[1]
    for at in (start, records.texts[1][1] - 1, end - 16, end - 1):
        wire = bytearray(records.wire)
        clear = bytearray(records.clear)
        wire[at] ^= 0x10
        clear[at] ^= 0x10  # counter mode: the same bit of the plaintext
        for size in (7, 16, 30, 61):
            rx = context(suite)
            for a in range(0, len(wire), size):
                b = min(a + size, len(wire))
                result, data = receive(rx, SEQ + a, bytes(wire[a:b]))
                verdict_here = a < end <= b
                assert result.decrypted is not verdict_here
                assert (result.error, result.auth_failed) == (verdict_here, verdict_here)
                assert data == (wire if verdict_here else clear)[a:b]
                assert not result.lost_sync
            # The packet that holds the bad tag may hold the end of another record, which is then not counted.
            assert rx.auth_failed == 1
            assert rx.describe()["state"] == "in_sync"
            assert rx.describe()["record"] == 8


def test_three_wrong_records_in_one_packet() -> None:
    records = stream(GCM_1_2, [9, 10, 11])
    wire = bytearray(records.wire)
    for end in records.ends:
        wire[end - 1] ^= 1
    result, data = receive(context(GCM_1_2), SEQ, bytes(wire))
    assert (result.auth_failed, result.error, data) == (3, True, bytes(wire))


@ALL_SUITES
@pytest.mark.conformance(25)
def test_a_packet_is_decrypted_when_it_arrives(suite: Suite) -> None:
    """No packet waits for the end of its record; a record may take as many packets as it likes."""
    records = stream(suite, [16384])
    rx = context(suite)
    for a in range(0, len(records.wire), 1000):
        result, data = receive(rx, SEQ + a, records.wire[a : a + 1000])
        assert result.decrypted
        assert data == records.clear[a : a + 1000]


@ALL_SUITES
def test_wrong_record_number_fails_where_it_should(suite: Suite) -> None:
    records = stream(suite, [30])
    result, data = receive(context(suite, number=6), SEQ, records.wire)
    assert (result.decrypted, result.auth_failed, data) == (False, 1, records.wire)


def test_record_number_never_wraps() -> None:
    last = 2**64 - 1
    for suite in SUITES:
        records = stream(suite, [10], first_number=last)
        rx = context(suite, number=last)
        result, data = receive(rx, SEQ, records.wire * 2)
        assert (result.decrypted, result.error, data) == (False, True, records.wire * 2)
        assert receive_all(rx, [records.wire]) == records.clear
        result, data = receive(rx, SEQ + len(data) // 2, records.wire)
        assert (result.decrypted, result.error, data) == (False, True, records.wire)


@ALL_SUITES
def test_a_crypto_fault_leaves_the_packet_alone(suite: Suite) -> None:
    records = stream(suite, [30])
    for pieces in ([records.wire], cut(records.wire, [20])):
        rx = context(suite)
        rx._key.wipe()  # stands for any fault of the library
        at = 0
        for piece in pieces:
            result, data = receive(rx, SEQ + at, piece)
            assert (result.decrypted, data) == (False, piece)
            at += len(piece)
        assert rx.passed == len(pieces)


@pytest.mark.conformance(4)
@pytest.mark.parametrize("personality", RxPersonality)
def test_a_crypto_fault_inside_a_record_leaves_it_alone(personality: RxPersonality) -> None:
    """From that packet to the record's end, even if the library recovers: where its cipher stands nobody knows."""
    records = stream(GCM_1_2, [20, 90, 30])
    _, start, last = records.starts()
    rx = rx_context(GCM_1_2.params(Direction.RX, SEQ, 5)._replace(rx_personality=personality))
    known, first, middle, more, rest, second = cut(records.wire, [start, start + 40, start + 60, start + 80, last])
    assert receive(rx, SEQ, known)[0].decrypted  # from now on nonces are expected
    assert receive(rx, SEQ + start, first)[0].decrypted
    assert rx._open is not None
    rx._open._opener = FailsOnce(rx._open._opener)
    result, data = receive(rx, SEQ + start + 40, middle)
    assert (result.decrypted, result.error, data) == (False, True, middle)
    for at, piece in ((start + 60, more), (start + 80, rest)):
        result, data = receive(rx, SEQ + at, piece)
        assert (result.decrypted, data) == (False, piece)
    result, data = receive(rx, SEQ + last, second)
    asks = personality is RxPersonality.IDEAL
    assert (result.decrypted, result.ask is not None) == (not asks, asks)
    assert data == (second if asks else records.clear[last:])


@pytest.mark.parametrize("personality", [p for p in RxPersonality if p is not RxPersonality.IDEAL])
def test_a_late_packet_inside_a_record_ends_the_loss(personality: RxPersonality) -> None:
    records = stream(GCM_1_2, [200, 60, 60])
    rx = rx_context(GCM_1_2.params(Direction.RX, SEQ, 5)._replace(rx_personality=personality))
    assert receive(rx, SEQ, records.wire[:60])[0].decrypted
    assert receive(rx, SEQ + records.starts()[2], records.wire[records.starts()[2] :])[0].lost_sync
    result, data = receive(rx, SEQ + 60, records.wire[60:100])
    assert (result.decrypted, data) == (True, records.clear[60:100])
    assert rx.place is not None
    assert rx.history.events[-1].what is Happened.IN_SYNC


@ALL_SUITES
def test_wipe_overwrites_every_secret(suite: Suite) -> None:
    params = suite.params(Direction.RX, SEQ, 5)
    rx = RxContext(params)
    records = stream(suite, [30])
    receive(rx, SEQ, records.wire[:20])
    secrets = [params.key, params.salt, params.iv, rx._key._key, rx._fmt._fixed_iv]
    assert any(any(secret) for secret in secrets)
    rx.wipe()
    assert not any(any(secret) for secret in secrets)
    assert receive(rx, SEQ + 20, records.wire[20:]) == (RxResult(), records.wire[20:])


def test_describe() -> None:
    rx = context(GCM_1_2)
    receive(rx, SEQ, stream(GCM_1_2, [30]).wire[:20])
    assert rx.describe() == {
        "dir": "rx",
        "cipher": "aes_gcm_128",
        "version": "tls_1_2",
        "local": "10.0.0.2:4433",
        "remote": "10.0.0.1:50001",
        "personality": "core-next-hint",
        "state": "in_sync",
        "seq": (SEQ + 20) % 2**32,
        "record": 5,
        "packets": 1,
        "passed": 0,
        "bytes": 7,
        "records": 0,
        "records_software": 0,
        "auth_failed": 0,
        "losses": 0,
        "requested": 0,
        "answered": 0,
        "resyncs": 0,
    }
