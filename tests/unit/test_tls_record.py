"""Record layouts, nonces, associated data; following records through a cut stream."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nicdev.abi import Cipher, TlsVersion
from nicdev.tls.aead import AeadKey
from nicdev.tls.record import MAX_NUMBER, RecordFormat
from nicdev.tls.walk import Cursor, walk
from tests.support.tls_oracle import GCM_1_2, SUITES, Suite, stream

RFC8448 = json.loads((Path(__file__).parent.parent / "vectors" / "tls13_rfc8448.json").read_text())


def fmt_of(suite: Suite) -> RecordFormat:
    return RecordFormat(suite.version, suite.cipher, bytearray(suite.salt if suite.explicit else suite.salt + suite.iv))


def header(length: int, kind: int = 23, version: int = 0x0303) -> bytes:
    return bytes((kind, version >> 8, version & 0xFF)) + length.to_bytes(2, "big")


def test_tls13_record_of_rfc8448() -> None:
    key, iv, inner, record = (bytes.fromhex(RFC8448[name]) for name in ("key", "iv", "inner", "record"))
    fmt = RecordFormat(TlsVersion.TLS_1_3, Cipher.AES_GCM_128, bytearray(iv))
    assert fmt.total(record) == len(record)
    out = memoryview(bytearray(len(inner)))
    number = RFC8448["number"]
    aead = AeadKey(Cipher.AES_GCM_128, bytearray(key))
    assert aead.open(fmt.nonce(number, record), fmt.aad(number, record), memoryview(record)[fmt.prefix :], out)
    assert out == inner


def test_explicit_nonce_comes_from_the_record() -> None:
    record = header(8 + 16) + bytes.fromhex("a1a2a3a4a5a6a7a8") + bytes(16)
    fmt = RecordFormat(TlsVersion.TLS_1_2, Cipher.AES_GCM_128, bytearray(b"SALT"))
    assert fmt.nonce(7, record) == b"SALT" + bytes.fromhex("a1a2a3a4a5a6a7a8")


@pytest.mark.parametrize("version", list(TlsVersion))
def test_implicit_nonce_is_iv_xor_number(version: TlsVersion) -> None:
    fmt = RecordFormat(version, Cipher.CHACHA20_POLY1305, bytearray(range(12)))
    assert fmt.nonce(0x1122334455667788, header(17 + 16)).hex() == "000102031527" + "35435d6f7d83"


def test_aad_of_tls12_has_number_and_plaintext_length() -> None:
    aes = RecordFormat(TlsVersion.TLS_1_2, Cipher.AES_GCM_256, bytearray(4))
    chacha = RecordFormat(TlsVersion.TLS_1_2, Cipher.CHACHA20_POLY1305, bytearray(12))
    assert aes.aad(0x0102030405060708, b"??" + header(8 + 100 + 16, 22), 2).hex() == "01020304050607081603030064"
    assert chacha.aad(MAX_NUMBER, header(100 + 16, 21)).hex() == "ffffffffffffffff1503030064"


def test_aad_of_tls13_is_the_header() -> None:
    fmt = RecordFormat(TlsVersion.TLS_1_3, Cipher.CHACHA20_POLY1305, bytearray(12))
    assert fmt.aad(9, header(99) + b"text") == header(99)


@pytest.mark.parametrize(
    ("version", "cipher", "least", "most"),
    [
        (TlsVersion.TLS_1_2, Cipher.AES_GCM_128, 24, 16384 + 24),
        (TlsVersion.TLS_1_2, Cipher.AES_GCM_256, 24, 16384 + 24),
        (TlsVersion.TLS_1_2, Cipher.CHACHA20_POLY1305, 16, 16384 + 16),
        (TlsVersion.TLS_1_3, Cipher.AES_GCM_128, 17, 16385 + 16),
        (TlsVersion.TLS_1_3, Cipher.AES_GCM_256, 17, 16385 + 16),
        (TlsVersion.TLS_1_3, Cipher.CHACHA20_POLY1305, 17, 16385 + 16),
    ],
)
def test_length_bounds(version: TlsVersion, cipher: Cipher, least: int, most: int) -> None:
    explicit = version is TlsVersion.TLS_1_2 and cipher is not Cipher.CHACHA20_POLY1305
    fmt = RecordFormat(version, cipher, bytearray(4 if explicit else 12))
    for length in (least, least + 1, most):
        assert fmt.total(header(length)) == 5 + length
    for length in (0, least - 1, most + 1, 0xFFFF):
        assert fmt.total(header(length)) == 0


@pytest.mark.conformance(63)
def test_content_types_and_version() -> None:
    tls12 = fmt_of(GCM_1_2)
    tls13 = RecordFormat(TlsVersion.TLS_1_3, Cipher.AES_GCM_128, bytearray(12))
    assert [kind for kind in range(256) if tls12.total(header(100, kind))] == [20, 21, 22, 23, 24]
    assert [kind for kind in range(256) if tls13.total(header(100, kind))] == [23]
    for version in (0x0302, 0x0304, 0x0203, 0x0000, 0xFFFF):
        assert not tls12.total(header(100, version=version))
        assert not tls13.total(header(100, version=version))


@pytest.mark.parametrize("suite", SUITES, ids=str)
def test_may_start_agrees_with_total(suite: Suite) -> None:
    fmt = fmt_of(suite)
    for good in (fmt.min_length, fmt.max_length, 300):
        whole = header(good)
        assert all(fmt.may_start(whole[:n]) for n in range(1, 5))
    assert not fmt.may_start(b"\x19")
    assert not fmt.may_start(b"\x17\x02")
    assert not fmt.may_start(b"\x17\x03\x04")
    assert not fmt.may_start(b"\x17\x03\x03" + bytes(((fmt.max_length >> 8) + 1,)))


def test_wrong_fixed_iv_is_refused() -> None:
    for version, cipher, size in (
        (TlsVersion.TLS_1_2, Cipher.AES_GCM_128, 12),
        (TlsVersion.TLS_1_3, Cipher.AES_GCM_128, 4),
        (TlsVersion.TLS_1_2, Cipher.CHACHA20_POLY1305, 4),
    ):
        with pytest.raises(ValueError, match="fixed nonce"):
            RecordFormat(version, cipher, bytearray(size))


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 400), max_size=12),
    seq=st.sampled_from([0, 77, 0xFFFFFFF0, 0x7FFFFFF8]),
)
def test_walk_finds_every_end_however_the_stream_is_cut(sizes: list[int], cuts: list[int], seq: int) -> None:
    for suite in (GCM_1_2, SUITES[-1]):
        records = stream(suite, sizes)
        fmt = fmt_of(suite)
        edges = sorted({0, len(records.wire), *(c for c in cuts if c < len(records.wire))})
        cursor = Cursor(seq, 5)
        for a, b in pairwise(edges):
            walked = walk(fmt, cursor, memoryview(records.wire)[a:b])
            assert walked is not None
            assert walked.ends == [end - a for end in records.ends if a < end <= b]
            assert walked.last == 5 + sum(1 for start in records.starts() if start < b) - 1
            cursor = walked.after
            assert cursor.seq == (seq + b) % 2**32
            assert cursor.number == 5 + sum(1 for end in records.ends if end <= b)
            current = max(edge for edge in (0, *records.ends) if edge <= b)
            assert cursor.pos == b - current
        assert cursor == Cursor((seq + len(records.wire)) % 2**32, 5 + len(sizes))


@pytest.mark.parametrize("suite", SUITES, ids=str)
def test_walk_refuses_a_bad_header_at_every_place_and_cut(suite: Suite) -> None:
    records = stream(suite, [3, 4])
    fmt = fmt_of(suite)
    second = records.ends[0]
    for byte, bad in ((0, 99), (1, 2), (2, 1), (3, 0x42)):
        data = bytearray(records.wire)
        data[second + byte] = bad
        for at in range(1, len(data)):
            first = walk(fmt, Cursor(0, 0), memoryview(data)[:at])
            if at > second + byte:
                assert first is None
            else:
                assert first is not None
                assert walk(fmt, first.after, memoryview(data)[at:]) is None


def test_cursor_skip() -> None:
    inside = Cursor(0xFFFFFFF0, 9, 20, 100)
    assert inside.skip(1) == Cursor(0xFFFFFFF1, 9, 21, 100)
    assert inside.skip(79) == Cursor(63, 9, 99, 100)
    assert inside.skip(80) == Cursor(64, 10)
    assert inside.skip(81) is None
    assert Cursor(5, 9).skip(1) is None
    assert Cursor(5, 9, 3, 0, b"\x17\x03\x03").skip(1) is None
