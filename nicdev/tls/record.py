"""The layout of protected TLS records, as they lie in the TCP stream, and their nonces and associated data.

    TLS 1.2 AES-GCM (RFC 5288)     header 5 | explicit nonce 8 | text | tag 16
    TLS 1.2 ChaCha20 (RFC 7905)    header 5 | text | tag 16
    TLS 1.3 (RFC 8446 5.2)         header 5 | text, the last of it the inner content type | tag 16

Theory of operation: a `RecordFormat` belongs to one context and answers every question about a record from its first
`prefix` bytes (header and explicit nonce) and its number. Nothing here holds a position or a state.

The nonce of TLS 1.2 AES-GCM is salt and the eight bytes found in the record. They are often the record number, but the
kernel counts them from the user's initial vector, so they are never assumed to be. All other nonces are the 12-byte
vector (salt and iv) XOR the record number.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from nicdev.abi import Cipher, TlsVersion
from nicdev.tls.aead import NONCE_LEN, TAG_LEN, BytesLike

HEADER_LEN: Final = 5
LEGACY_VERSION: Final = 0x0303  # in the header of both versions
MAX_PLAINTEXT: Final = 1 << 14
MAX_NUMBER: Final = (1 << 64) - 1  # a record number never wraps

_HEADER: Final = Struct(">BHH")  # content type, version, length of what follows
_PREFIX: Final = Struct(">BHH8s")  # a header and the explicit nonce behind it
_AAD_1_2: Final = Struct(">QBHH")  # record number, content type, version, length of the plaintext
_CONTENT_TYPES: Final = {
    TlsVersion.TLS_1_2: frozenset(range(20, 25)),  # change_cipher_spec to heartbeat
    TlsVersion.TLS_1_3: frozenset((23,)),  # RFC 8446 5.2: opaque_type is always application_data
}
_ANY_TYPE: Final = frozenset(range(256))


class RecordFormat:
    """Record layout of a TLS version and cipher. Lengths are in bytes.

    prefix: header and explicit nonce; min_length, max_length: bounds of the header's length field.
    """

    __slots__ = ("_fixed_iv", "_overhead", "_types", "_version", "max_length", "min_length", "prefix")

    def __init__(self, version: TlsVersion, cipher: Cipher, fixed_iv: bytearray, any_type: bool = False) -> None:
        """`fixed_iv` is taken over, not copied: salt (4) where nonces are explicit, else salt and iv (12).

        `any_type`: the header's content type is the sender's choice; else it must be one of the version's.
        """
        explicit = NONCE_LEN - len(fixed_iv)
        inner_type = 1 if version is TlsVersion.TLS_1_3 else 0
        if (explicit == 8) != (version is TlsVersion.TLS_1_2 and cipher is not Cipher.CHACHA20_POLY1305):
            raise ValueError("length of the fixed nonce part does not belong to this version and cipher")
        self._version = version
        self._types = _ANY_TYPE if any_type else _CONTENT_TYPES[version]
        self._fixed_iv = fixed_iv
        self._overhead = explicit + TAG_LEN
        self.prefix = HEADER_LEN + explicit
        self.min_length = self._overhead + inner_type
        self.max_length = self._overhead + inner_type + MAX_PLAINTEXT

    def total(self, head: BytesLike, at: int = 0) -> int:
        """Length of the record whose 5-byte header is at head[at], header and tag included; 0 if it is no header."""
        kind: int
        version: int
        length: int
        kind, version, length = _HEADER.unpack_from(head, at)
        if version != LEGACY_VERSION or kind not in self._types or not self.min_length <= length <= self.max_length:
            return 0
        return HEADER_LEN + length

    def header(self, total: int) -> bytes:
        """Header of an application data record of that length, header and tag included."""
        return _HEADER.pack(23, LEGACY_VERSION, total - HEADER_LEN)

    def may_start(self, head: bytes) -> bool:
        """Whether a header can begin with these 1 to 4 bytes."""
        return (
            head[0] in self._types
            and head[1:3] == b"\x03\x03"[: len(head) - 1]
            and (len(head) < 4 or head[3] <= self.max_length >> 8)
        )

    def sealing(self, number: int, head: BytesLike, at: int) -> tuple[BytesLike, bytes]:
        """`nonce` and `aad` at once: what it takes to seal or open the whole record at head[at]."""
        if self.prefix == HEADER_LEN:
            return self.nonce(number, head, at), self.aad(number, head, at)
        kind, version, length, explicit = _PREFIX.unpack_from(head, at)
        return self._fixed_iv + explicit, _AAD_1_2.pack(number, kind, version, length - self._overhead)

    def nonce(self, number: int, head: BytesLike, at: int = 0) -> bytes:
        """12-byte nonce of record `number`, whose prefix is at head[at]."""
        if self.prefix != HEADER_LEN:
            return b"".join((self._fixed_iv, head[at + HEADER_LEN : at + self.prefix]))
        return (int.from_bytes(self._fixed_iv, "big") ^ number).to_bytes(NONCE_LEN, "big")

    def aad(self, number: int, head: BytesLike, at: int = 0) -> bytes:
        """Associated data of record `number`, whose header is at head[at]. RFC 5246 6.2.3.3, RFC 8446 5.2."""
        if self._version is TlsVersion.TLS_1_3:
            return bytes(head[at : at + HEADER_LEN])
        kind, version, length = _HEADER.unpack_from(head, at)
        return _AAD_1_2.pack(number, kind, version, length - self._overhead)

    def wipe(self) -> None:
        """Overwrite the fixed part of the nonces."""
        self._fixed_iv[:] = bytes(len(self._fixed_iv))
