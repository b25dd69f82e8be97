"""What `ideal` expects of explicit nonces: what it has seen, and before that what the host told."""

from __future__ import annotations

from nicdev.abi import Cipher, TlsVersion
from nicdev.tls.nonces import Nonces
from nicdev.tls.record import RecordFormat

GCM = RecordFormat(TlsVersion.TLS_1_2, Cipher.AES_GCM_128, bytearray(4))


def head(nonce: int) -> bytes:
    return b"\x17\x03\x03\x00\x40" + nonce.to_bytes(8, "big")


def test_nothing_is_expected_of_a_flow_of_which_nothing_is_known() -> None:
    assert not Nonces(GCM).expects(0, head(0))


def test_the_host_s_iv_is_expected_but_nothing_is_predicted_from_it() -> None:
    nonces = Nonces(GCM, 7, (1000).to_bytes(8, "big"))
    assert nonces.expects(7, head(1000))
    assert nonces.expects(9, head(1002))
    assert not nonces.expects(7, head(1001))
    assert nonces.offset is None


def test_what_was_verified_counts_more_than_what_the_host_told() -> None:
    nonces = Nonces(GCM, 0, bytes(8))
    nonces.learn(0, head(500))
    assert nonces.expects(1, head(501))
    assert not nonces.expects(1, head(1))
    nonces.learn(1, head(900))
    assert not nonces.expects(2, head(901))
    assert not nonces.expects(2, head(2))
