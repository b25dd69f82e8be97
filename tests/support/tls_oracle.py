"""Protected TLS records made by one-shot AEAD calls over whole records: the oracle of the engine's tests.

Shares nothing with nicdev.tls. A `Stream` holds the same records in three forms, byte for byte in the same places:
framed (what the kernel hands to the NIC: plaintext, tag space full of rubbish), wire, and clear (what the NIC hands to
the kernel: plaintext, the tag as on the wire).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from nicdev.abi import Cipher, Direction, RxPersonality, TlsVersion
from nicdev.tls.context import ContextParams

RUBBISH = b"\xee" * 16
LOCAL = (b"\x0a\x00\x00\x02", 4433)
REMOTE = (b"\x0a\x00\x00\x01", 50001)


@dataclass(frozen=True)
class Suite:
    """A version, a cipher and key material."""

    version: TlsVersion
    cipher: Cipher
    key: bytes
    salt: bytes
    iv: bytes

    def __str__(self) -> str:
        return f"{self.version.name}-{self.cipher.name}"

    @property
    def explicit(self) -> int:
        """Bytes of explicit nonce in each record."""
        return 8 if self.version is TlsVersion.TLS_1_2 and self.cipher is not Cipher.CHACHA20_POLY1305 else 0

    @property
    def prefix(self) -> int:
        """Bytes before the text of each record."""
        return 5 + self.explicit

    def aead(self) -> AESGCM | ChaCha20Poly1305:
        """The one-shot cipher."""
        return ChaCha20Poly1305(self.key) if self.cipher is Cipher.CHACHA20_POLY1305 else AESGCM(self.key)

    def params(
        self,
        direction: Direction,
        start_seq: int,
        rec_seq: int,
        *,
        no_sync: bool = False,
        rx_personality: RxPersonality = RxPersonality.IDEAL,
    ) -> ContextParams:
        """Context parameters with fresh copies of the secrets."""
        secrets = (bytearray(self.salt), bytearray(self.iv), bytearray(self.key))
        place = (start_seq, rec_seq)
        return ContextParams(
            direction, 4, self.version, self.cipher, *place, *secrets, LOCAL, REMOTE, no_sync, rx_personality
        )


def _suites() -> list[Suite]:
    rng = random.Random(20240229)
    return [
        Suite(version, cipher, rng.randbytes(key_len), rng.randbytes(salt_len), rng.randbytes(12 - salt_len))
        for version in TlsVersion
        for cipher, key_len, salt_len in (
            (Cipher.AES_GCM_128, 16, 4),
            (Cipher.AES_GCM_256, 32, 4),
            (Cipher.CHACHA20_POLY1305, 32, 0),
        )
    ]


SUITES = _suites()
GCM_1_2 = SUITES[0]


def seal(suite: Suite, number: int, text: bytes, *, kind: int = 23, nonce: bytes = b"") -> bytes:
    """The record on the wire. `nonce` is the explicit one, 8 bytes, where the suite has one."""
    length = len(nonce) + len(text) + 16
    header = bytes((kind, 3, 3)) + length.to_bytes(2, "big")
    if suite.version is TlsVersion.TLS_1_3:
        aad = header
    else:
        aad = number.to_bytes(8, "big") + header[:3] + len(text).to_bytes(2, "big")
    if suite.explicit:
        full_nonce = suite.salt + nonce
    else:
        full_nonce = bytes(a ^ b for a, b in zip(suite.salt + suite.iv, number.to_bytes(12, "big"), strict=True))
    return header + nonce + suite.aead().encrypt(full_nonce, text, aad)


@dataclass
class Stream:
    """Records back to back."""

    suite: Suite
    first_number: int = 5
    seed: int = 1
    framed: bytes = b""
    wire: bytes = b""
    clear: bytes = b""
    ends: list[int] = field(default_factory=list)  # offset behind each record
    texts: list[tuple[int, int]] = field(default_factory=list)  # where each record's text is

    def add(self, text: bytes, kind: int = 23) -> None:
        """Append a record; its explicit nonce has nothing to do with its number."""
        suite = self.suite
        index = len(self.ends)
        nonce = (0xF00D_0000_0000_0000 + 977 * self.seed + index).to_bytes(8, "big")[: suite.explicit]
        record = seal(suite, self.first_number + index, text, kind=kind, nonce=nonce)
        start = len(self.wire) + suite.prefix
        self.texts.append((start, start + len(text)))
        self.wire += record
        self.framed += record[: suite.prefix] + text + RUBBISH
        self.clear += record[: suite.prefix] + text + record[-16:]
        self.ends.append(len(self.wire))

    def starts(self) -> list[int]:
        """Offset of each record."""
        return [0, *self.ends[:-1]]


def stream(suite: Suite, sizes: Sequence[int], first_number: int = 5, seed: int = 1) -> Stream:
    """Records with random text of these sizes (TLS 1.3: plus the inner content type)."""
    rng = random.Random(seed)
    result = Stream(suite, first_number, seed)
    for size in sizes:
        text = rng.randbytes(size)
        result.add(text + b"\x17" if suite.version is TlsVersion.TLS_1_3 else text)
    return result


def corrupt(records: Stream, *offsets: int) -> Stream:
    """The same stream with a flipped bit in each of these bytes: no record there is authentic."""
    for at in offsets:
        flipped = bytes((records.wire[at] ^ 1,))
        records.wire = records.wire[:at] + flipped + records.wire[at + 1 :]
        records.clear = records.clear[:at] + flipped + records.clear[at + 1 :]
    return records


def cut(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    """`data` in pieces, cut at these ascending offsets."""
    edges = [0, *cuts, len(data)]
    return [data[a:b] for a, b in pairwise(edges) if a < b]
