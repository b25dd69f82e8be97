"""The byte stream that all traffic tools send: cheap to make, different in every block, findable on the wire.

A block of 512 bytes is its number (8 bytes, big-endian) and 504 random bytes that `seed` chooses, the same in every
block. So a block that is lost, doubled or moved changes the hash, and `sample` has every 8-byte window that a leak
could show. guest-image/tools/ktls_common.py makes the same stream in the guest; a test compares the two.
"""

from __future__ import annotations

import hashlib
from typing import Final

BLOCK: Final = 512
NUMBER: Final = 8


def _block(seed: str) -> bytes:
    return hashlib.shake_128(f"tlsnic stream {seed}".encode()).digest(BLOCK)


def stream(seed: str, size: int) -> bytes:
    """The first `size` bytes of the stream named `seed`."""
    rest = _block(seed)[NUMBER:]
    blocks = (number.to_bytes(NUMBER, "big") for number in range(-(-size // BLOCK)))
    return b"".join(part for number in blocks for part in (number, rest))[:size]


def sha256_of(seed: str, size: int) -> str:
    """The hash that a receiver of the first `size` bytes must report."""
    return hashlib.sha256(stream(seed, size)).hexdigest()


def sample(seed: str) -> bytes:
    """Bytes of the stream that must never be seen on the wire (for testbed.wire.plaintext)."""
    return _block(seed)[NUMBER:]
