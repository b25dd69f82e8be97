"""Authenticated encryption: the only place that touches a crypto library.

Theory of operation: an `AeadKey` seals or opens a record in one call when the whole record is at hand (1.3 us for
16 KiB), or hands out a `Sealer` or `Opener` that takes it piece by piece (3 us to make), since records are cut
anywhere. Source and destination are the caller's buffers, and may be one and the same.

The library streams AES-GCM but not ChaCha20-Poly1305, so that one is put together here from its two parts (RFC 8439
2.8): block 0 of the key stream is the Poly1305 key, the text starts with block 1; the MAC covers the associated data
and the ciphertext, each padded to 16 bytes, and both lengths.

The library expands a key to 2.4 KB. That is done when the key is first needed for a whole record (1 us), and undone
when MAX_EXPANDED others were expanded since. These are so few that their memory stays in the processor's cache. With
100,000 flows, a record of any of them costs what it would if all keys stayed expanded: 2.4 KB from far memory take as
long, and 240 MB are saved. With more than MAX_EXPANDED flows but not many, a record costs 0.6 us more.

Keys are wiped by `AeadKey.wipe`: our copy is overwritten, and the library clears its own when the objects are dropped.
A wrong tag is an answer, not an error; everything in `FAULTS` is an error of the machinery.
"""

from __future__ import annotations

from collections import deque
from struct import Struct
from typing import Final, Protocol

from cryptography.exceptions import AlreadyFinalized, InternalError, InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.ciphers import (
    AEADDecryptionContext,
    algorithms,
    modes,
)
from cryptography.hazmat.primitives.ciphers import Cipher as Ciphering
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.poly1305 import Poly1305

from nicdev.abi import Cipher

BytesLike = bytes | bytearray | memoryview
TAG_LEN: Final = 16  # bytes, of every AEAD here
NONCE_LEN: Final = 12
MAX_EXPANDED: Final = 512  # keys

_AES_BLOCK: Final = 16
_CHACHA_BLOCK: Final = 64
_CHACHA_BLOCK_0: Final = bytes(_CHACHA_BLOCK)
_LENGTHS: Final = Struct("<QQ")


class KeyWipedError(Exception):
    """Use of a key after `AeadKey.wipe`."""


FAULTS: Final = (KeyWipedError, InternalError, AlreadyFinalized)


class Sealer(Protocol):
    """Encrypts one message piece by piece, as the library itself does it. Any method may raise one of FAULTS."""

    def update_into(self, data: BytesLike, buf: memoryview) -> int:
        """Encrypt `data` into `buf` of the same length."""

    def finalize(self) -> bytes:
        """Make the tag; once, after the last piece. What it returns says nothing."""

    @property
    def tag(self) -> bytes:
        """The tag, once it was made."""


class Opener(Protocol):
    """Decrypts one message piece by piece; nothing is authentic before `verify` says so. May raise one of FAULTS."""

    def update_into(self, data: BytesLike, buf: memoryview) -> int:
        """Decrypt `data` into `buf` of the same length."""

    def verify(self, tag: BytesLike) -> bool:
        """Whether the tag is right; once, after the last piece."""


class Keystream(Protocol):
    """The bare cipher from some place on."""

    def update_into(self, data: BytesLike, buf: memoryview) -> int:
        """XOR `data` with the key stream into `buf`, of at least the same length."""


class AeadKey:
    """One key of one cipher. `key` is taken over, not copied, and must have the cipher's length."""

    __slots__ = ("_aes", "_key", "_kind", "_one_shot")

    def __init__(self, cipher: Cipher, key: bytearray) -> None:
        self._key = key
        self._kind: type[AESGCM] | type[ChaCha20Poly1305] | None  # None: wiped
        self._kind = ChaCha20Poly1305 if cipher is Cipher.CHACHA20_POLY1305 else AESGCM
        self._one_shot: AESGCM | ChaCha20Poly1305 | None = None  # None: not expanded
        self._aes: algorithms.AES | None = None  # None: not needed yet

    def _expand(self) -> AESGCM | ChaCha20Poly1305:
        """What seals and opens whole records."""
        if self._kind is None:
            raise KeyWipedError
        self._one_shot = one_shot = self._kind(self._key)
        _expanded.append(self)
        if len(_expanded) > MAX_EXPANDED:
            _expanded.popleft()._one_shot = None
        return one_shot

    def _block_cipher(self) -> algorithms.AES | None:
        """What streams are made of; None: ChaCha20, which needs no more than the key."""
        if self._kind is None:
            raise KeyWipedError
        if self._aes is None and self._kind is AESGCM:
            self._aes = algorithms.AES(self._key)
        return self._aes

    def seal(self, nonce: BytesLike, aad: BytesLike, plaintext: memoryview, out: memoryview) -> None:
        """Write ciphertext and tag into `out`, TAG_LEN longer than `plaintext`. May raise one of FAULTS."""
        (self._one_shot or self._expand()).encrypt_into(nonce, plaintext, aad, out)

    def open(self, nonce: BytesLike, aad: BytesLike, sealed: memoryview, out: memoryview) -> bool:
        """Decrypt ciphertext and tag into `out`, TAG_LEN shorter; False if the tag is wrong (`out` is then garbage).

        May raise one of FAULTS.
        """
        try:
            (self._one_shot or self._expand()).decrypt_into(nonce, sealed, aad, out)
        except InvalidTag:
            return False
        return True

    def sealer(self, nonce: BytesLike, aad: BytesLike) -> Sealer:
        """Start to encrypt a message in pieces. May raise one of FAULTS."""
        aes = self._block_cipher()
        if aes is None:
            return _ChaChaSealer(self._key, nonce, aad)
        sealer = Ciphering(aes, modes.GCM(nonce)).encryptor()
        sealer.authenticate_additional_data(aad)
        return sealer

    def opener(self, nonce: BytesLike, aad: BytesLike) -> Opener:
        """Start to decrypt a message in pieces. May raise one of FAULTS."""
        aes = self._block_cipher()
        if aes is None:
            return _ChaChaOpener(self._key, nonce, aad)
        return _GcmOpener(Ciphering(aes, modes.GCM(nonce)).decryptor(), aad)

    def keystream(self, nonce: bytes, offset: int) -> Keystream:
        """The bare cipher at byte `offset` of a message's text: `update_into` decrypts, nothing is authenticated.

        NIST SP 800-38D 7.1: the text of AES-GCM starts with counter 2; RFC 8439 2.8: that of ChaCha20 with block 1.
        May raise one of FAULTS.
        """
        aes = self._block_cipher()
        mode: modes.CTR | None = None
        if aes is None:
            block, skip = divmod(offset, _CHACHA_BLOCK)
            cipher: algorithms.AES | algorithms.ChaCha20 = algorithms.ChaCha20(
                self._key, (block + 1).to_bytes(4, "little") + nonce
            )
        else:
            block, skip = divmod(offset, _AES_BLOCK)
            cipher, mode = aes, modes.CTR(nonce + (block + 2).to_bytes(4, "big"))
        stream = Ciphering(cipher, mode).decryptor()
        stream.update(bytes(skip))
        return stream

    def wipe(self) -> None:
        """Overwrite the key and forget the library's objects; every later use raises KeyWipedError."""
        self._key[:] = bytes(len(self._key))
        self._kind = self._one_shot = self._aes = None


_expanded: Final[deque[AeadKey]] = deque()  # the first is the next that is not any more


class _GcmOpener:
    __slots__ = ("_context",)

    def __init__(self, context: AEADDecryptionContext, aad: BytesLike) -> None:
        self._context = context
        context.authenticate_additional_data(aad)

    def update_into(self, data: BytesLike, buf: memoryview) -> int:
        return self._context.update_into(data, buf)

    def verify(self, tag: BytesLike) -> bool:
        try:
            self._context.finalize_with_tag(bytes(tag))
        except InvalidTag:
            return False
        return True


class _ChaChaStream:
    """Key stream and MAC; the MAC sees the ciphertext, which is the only difference between the directions."""

    __slots__ = ("_aad_len", "_length", "_mac", "_stream")

    def __init__(self, key: bytearray, nonce: BytesLike, aad: BytesLike) -> None:
        self._stream = Ciphering(algorithms.ChaCha20(key, bytes(4) + nonce), None).encryptor()
        block = bytearray(_CHACHA_BLOCK)
        self._stream.update_into(_CHACHA_BLOCK_0, block)
        self._mac = Poly1305(memoryview(block)[:32])
        block[:] = _CHACHA_BLOCK_0
        self._mac.update(aad)
        self._mac.update(bytes(-len(aad) % 16))
        self._aad_len = len(aad)
        self._length = 0

    def _close(self) -> None:
        self._mac.update(bytes(-self._length % 16) + _LENGTHS.pack(self._aad_len, self._length))


class _ChaChaSealer(_ChaChaStream):
    __slots__ = ("tag",)

    def update_into(self, data: BytesLike, buf: memoryview) -> int:
        size = self._stream.update_into(data, buf)
        self._length += size
        self._mac.update(buf)
        return size

    def finalize(self) -> bytes:
        self._close()
        self.tag = self._mac.finalize()
        return b""


class _ChaChaOpener(_ChaChaStream):
    __slots__ = ()

    def update_into(self, data: BytesLike, buf: memoryview) -> int:
        self._mac.update(data)  # first, since buf may be the same memory
        size = self._stream.update_into(data, buf)
        self._length += size
        return size

    def verify(self, tag: BytesLike) -> bool:
        self._close()
        try:
            self._mac.verify(bytes(tag))
        except InvalidSignature:
            return False
        return True
