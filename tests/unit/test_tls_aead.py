"""AEAD wrapper against published vectors, whole and in pieces."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from nicdev.abi import Cipher
from nicdev.tls import aead
from nicdev.tls.aead import AeadKey, KeyWipedError

VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "aead.json").read_text())


class Vector:
    def __init__(self, entry: dict[str, str]) -> None:
        self.cipher = Cipher[entry["cipher"]]
        fields = ("key", "nonce", "aad", "plaintext", "ciphertext", "tag")
        self.key, self.nonce, self.aad, self.plaintext, self.ciphertext, self.tag = (
            bytes.fromhex(entry[name]) for name in fields
        )

    def aead(self) -> AeadKey:
        return AeadKey(self.cipher, bytearray(self.key))


@pytest.fixture(params=VECTORS, ids=lambda entry: entry["source"])
def vector(request: pytest.FixtureRequest) -> Vector:
    return Vector(request.param)


def test_seal_in_place(vector: Vector) -> None:
    buffer = memoryview(bytearray(vector.plaintext + b"\xee" * 16))
    vector.aead().seal(vector.nonce, vector.aad, buffer[:-16], buffer)
    assert buffer == vector.ciphertext + vector.tag


def test_open_into_other_buffer(vector: Vector) -> None:
    sealed = memoryview(bytearray(vector.ciphertext + vector.tag))
    out = memoryview(bytearray(len(vector.plaintext)))
    assert vector.aead().open(vector.nonce, vector.aad, sealed, out)
    assert out == vector.plaintext
    assert sealed == vector.ciphertext + vector.tag


def test_open_refuses_every_wrong_byte(vector: Vector) -> None:
    aead = vector.aead()
    sealed = bytearray(vector.ciphertext + vector.tag)
    out = memoryview(bytearray(len(vector.plaintext)))
    for at in range(len(sealed)):
        sealed[at] ^= 0x40
        assert not aead.open(vector.nonce, vector.aad, memoryview(sealed), out)
        sealed[at] ^= 0x40
    assert not aead.open(vector.nonce, vector.aad + b"x", memoryview(sealed), out)


@pytest.mark.parametrize("step", [1, 3, 15, 16, 17, 64])
def test_sealer_in_pieces_in_place(vector: Vector, step: int) -> None:
    sealer = vector.aead().sealer(vector.nonce, vector.aad)
    buffer = memoryview(bytearray(vector.plaintext))
    for at in range(0, len(buffer), step):
        sealer.update_into(buffer[at : at + step], buffer[at : at + step])
    assert buffer == vector.ciphertext
    sealer.finalize()
    assert sealer.tag == vector.tag


@pytest.mark.parametrize("step", [1, 3, 15, 16, 17, 64])
def test_opener_in_pieces_in_place(vector: Vector, step: int) -> None:
    opener = vector.aead().opener(vector.nonce, vector.aad)
    buffer = memoryview(bytearray(vector.ciphertext))
    for at in range(0, len(buffer), step):
        opener.update_into(buffer[at : at + step], buffer[at : at + step])
    assert buffer == vector.plaintext
    assert opener.verify(vector.tag)


def test_opener_refuses_every_wrong_tag_byte(vector: Vector) -> None:
    for at in range(16):
        opener = vector.aead().opener(vector.nonce, vector.aad)
        opener.update_into(vector.ciphertext, memoryview(bytearray(len(vector.ciphertext))))
        tag = bytearray(vector.tag)
        tag[at] ^= 1
        assert not opener.verify(tag)


def test_wipe_overwrites_the_key_and_ends_every_use(vector: Vector) -> None:
    key = bytearray(b"\x55" * len(vector.key))
    aead = AeadKey(vector.cipher, key)
    aead.wipe()
    assert key == bytes(len(key))
    buffer = memoryview(bytearray(48))
    with pytest.raises(KeyWipedError):
        aead.seal(vector.nonce, b"", buffer[:32], buffer)
    with pytest.raises(KeyWipedError):
        aead.open(vector.nonce, b"", buffer, buffer[:32])
    with pytest.raises(KeyWipedError):
        aead.sealer(vector.nonce, b"")
    with pytest.raises(KeyWipedError):
        aead.opener(vector.nonce, b"")


@pytest.mark.parametrize("cipher", Cipher)
def test_more_keys_than_are_kept_expanded(cipher: Cipher, monkeypatch: pytest.MonkeyPatch) -> None:
    """They work on in turn, one among them wiped, and no more of them are expanded than may be."""
    monkeypatch.setattr(aead, "MAX_EXPANDED", 3)
    monkeypatch.setattr(aead, "_expanded", deque())
    secrets = [bytes([n]) * (16 if cipher is Cipher.AES_GCM_128 else 32) for n in range(8)]
    keys = [AeadKey(cipher, bytearray(secret)) for secret in secrets]
    library = ChaCha20Poly1305 if cipher is Cipher.CHACHA20_POLY1305 else AESGCM
    for lap in range(3):
        for number, (key, secret) in enumerate(zip(keys, secrets, strict=True)):
            if lap and number == 5:
                key.wipe()
                with pytest.raises(KeyWipedError):
                    key.open(bytes(12), b"", memoryview(bytes(16)), memoryview(b""))
                continue
            sealed = memoryview(library(secret).encrypt(bytes(12), bytes([lap, number]), b""))
            out = memoryview(bytearray(2))
            assert key.open(bytes(12), b"", sealed, out)
            assert out == bytes([lap, number])
            assert sum(key._one_shot is not None for key in keys) <= 3
