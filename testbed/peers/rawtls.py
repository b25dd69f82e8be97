"""TLS 1.2 AES-GCM records in user space, for the raw peer: the other end of a kTLS socket with fixed keys.

Record: type, version 03 03, length (2 bytes), explicit nonce (8), ciphertext, tag (16). Nonce = salt || explicit
nonce; additional data = record number (8 bytes) || type || version || plaintext length (RFC 5288; RFC 5246,
6.2.3.3). The sender may spoil chosen records.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from testbed.peers.flowkeys import DirectionKeys

HEADER: Final = struct.Struct(">BHH")
ADDITIONAL: Final = struct.Struct(">QBHH")
VERSION: Final = 0x0303
NONCE: Final = 8
TAG: Final = 16
MAX_PLAINTEXT: Final = 1 << 14
APPLICATION_DATA: Final = 23
# what to flip a bit of, as an offset from the record's start (negative: from its end)
SPOTS: Final = {"type": 0, "version": 1, "length": 4, "nonce": 5 + NONCE - 1, "ciphertext": 5 + NONCE, "tag": -1}


class RecordError(Exception):
    """A record that the peer should not have sent; `number` is its TLS record number."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"record {number}: {reason}")
        self.number = number


class Sealer:
    """Makes records; `spoil` maps record numbers, counted from 0 at the first one, to a key of SPOTS."""

    def __init__(self, keys: DirectionKeys, spoil: dict[int, str] | None = None) -> None:
        self._aead = AESGCM(keys.key)
        self._keys = keys
        self._spoil = spoil or {}
        self.records = 0

    def seal(self, plaintext: bytes | memoryview, kind: int = APPLICATION_DATA) -> bytes:
        """One record of type `kind`."""
        count = int.from_bytes(self._keys.iv, "big") + self.records
        explicit = (count % (1 << 64)).to_bytes(NONCE, "big")
        additional = ADDITIONAL.pack(self._keys.rec_seq + self.records, kind, VERSION, len(plaintext))
        sealed = self._aead.encrypt(self._keys.salt + explicit, plaintext, additional)
        record = bytearray(HEADER.pack(kind, VERSION, NONCE + len(sealed)) + explicit + sealed)
        if self.records in self._spoil:
            record[SPOTS[self._spoil[self.records]]] ^= 1
        self.records += 1
        return bytes(record)


class Opener:
    """Takes bytes as they arrive and gives back records."""

    def __init__(self, keys: DirectionKeys) -> None:
        self._aead = AESGCM(keys.key)
        self._keys = keys
        self._buffer = bytearray()
        self.records = 0

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[int, bytes]]:
        """(type, plaintext) of every record that is now complete. Raises RecordError."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= HEADER.size:
                kind, version, length = HEADER.unpack_from(self._buffer, start)
                number = self._keys.rec_seq + self.records
                if version != VERSION or not NONCE + TAG <= length <= NONCE + TAG + MAX_PLAINTEXT:
                    raise RecordError(number, f"bad header {bytes(self._buffer[start : start + HEADER.size]).hex()}")
                body, end = start + HEADER.size, start + HEADER.size + length
                if len(self._buffer) < end:
                    break
                nonce = self._keys.salt + self._buffer[body : body + NONCE]
                additional = ADDITIONAL.pack(number, kind, version, length - NONCE - TAG)
                try:
                    plaintext = self._aead.decrypt(nonce, bytes(self._buffer[body + NONCE : end]), additional)
                except InvalidTag:
                    raise RecordError(number, "its tag does not verify") from None
                self.records += 1
                start = end
                yield kind, plaintext
        finally:
            del self._buffer[:start]

    @property
    def pending(self) -> int:
        """Bytes of a record that is not complete yet."""
        return len(self._buffer)
