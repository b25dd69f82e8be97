"""A record that lies in more than one packet.

Theory of operation: the bytes of the record are fed in order, in pieces cut anywhere. Prefix bytes (header, explicit
nonce) are collected and start the cipher when complete; text goes through the cipher at once, since a NIC holds no
packet back; the tag is written (`SealingRecord`) or collected (`OpeningRecord`) piece by piece. What is kept between
packets is what a real NIC keeps: the cipher's state and at most 13 prefix and 16 tag bytes.
"""

from __future__ import annotations

from nicdev.tls.aead import TAG_LEN, AeadKey, BytesLike, Opener, Sealer
from nicdev.tls.record import RecordFormat


class _PartialRecord:
    """Position in the record and its prefix; the record must be well framed (see walk)."""

    __slots__ = ("_fmt", "_key", "_number", "_pos", "_tag", "_text_end", "head")

    def __init__(self, fmt: RecordFormat, key: AeadKey, number: int) -> None:
        self._fmt = fmt
        self._key = key
        self._number = number
        self.head = b""  # what was fed of header and explicit nonce
        self._pos = 0  # bytes fed
        self._text_end = 0  # where the tag starts in the record; 0 while the prefix is incomplete
        self._tag = b""  # what is known of it

    def inside(self, size: int) -> bool:
        """Whether the next `size` (>= 1) bytes are text, all of them."""
        return self._pos + size <= self._text_end

    def _split(self, src: BytesLike) -> tuple[int, int]:
        """Take the prefix bytes of `src`; start and end of the text in it. Moves the position behind `src`."""
        start, size, pos = 0, len(src), self._pos
        if not self._text_end:
            fmt = self._fmt
            self.head = head = self.head + src[: fmt.prefix - pos]
            start = len(head) - pos
            if len(head) == fmt.prefix:
                self._text_end = fmt.total(head) - TAG_LEN
                self._begin(*fmt.sealing(self._number, head, 0))
        self._pos = pos + size
        tag = self._text_end - pos  # where it starts in `src`
        return start, size if tag >= size else max(start, tag)

    def _begin(self, nonce: BytesLike, aad: bytes) -> None:
        raise NotImplementedError


class SealingRecord(_PartialRecord):
    """Encrypts one record in pieces."""

    __slots__ = ("_sealer",)
    _sealer: Sealer

    def _begin(self, nonce: BytesLike, aad: bytes) -> None:
        self._sealer = self._key.sealer(nonce, aad)

    def more(self, text: memoryview) -> None:
        """`feed` of what is text to its last byte (see inside), encrypted in place."""
        self._sealer.update_into(text, text)
        self._pos += len(text)

    def feed(self, src: memoryview, dst: memoryview) -> int:
        """Take the next piece; write its ciphertext and tag bytes into `dst`, which may be `src`. Returns text bytes.

        Prefix bytes are not written. May raise one of aead.FAULTS.
        """
        start, end = self._split(src)
        if start < end:
            self._sealer.update_into(src[start:end], dst[start:end])
        if end < len(src):
            if not self._tag:
                self._sealer.finalize()
                self._tag = self._sealer.tag
            done = self._pos - self._text_end
            dst[end:] = self._tag[done - (len(src) - end) : done]
        return end - start


class OpeningRecord(_PartialRecord):
    """Decrypts one record in pieces."""

    __slots__ = ("_opener",)
    _opener: Opener

    def _begin(self, nonce: BytesLike, aad: bytes) -> None:
        self._opener = self._key.opener(nonce, aad)

    def more(self, src: memoryview, dst: memoryview) -> None:
        """`feed` of what is text to its last byte (see inside)."""
        self._opener.update_into(src, dst)
        self._pos += len(src)

    def feed(self, src: memoryview, dst: memoryview) -> tuple[int, int]:
        """Take the next piece; write its plaintext, unauthenticated, into `dst` where the ciphertext is in `src`.

        Returns start and end of that. May raise one of aead.FAULTS.
        """
        start, end = self._split(src)
        if start < end:
            self._opener.update_into(src[start:end], dst[start:end])
        self._tag += src[end:]
        return start, end

    def verify(self) -> bool:
        """Whether the tag is right; once, when the whole record was fed. May raise one of aead.FAULTS."""
        return self._opener.verify(self._tag)
