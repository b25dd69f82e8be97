"""How the explicit nonces of a flow relate to its record numbers.

Theory of operation: TLS 1.2 AES-GCM lets a sender choose the nonce. All known ones count: the difference to the record
number is constant. It is learned from verified records only, and as soon as one does not fit, nothing is predicted any
more for this flow. Before the first, the host's word on the first nonce may be expected (it is right where the sender
told it, and matches nothing otherwise), but nothing is predicted from it. Where nonces are not explicit, the number
says all.
"""

from __future__ import annotations

from nicdev.tls.aead import BytesLike
from nicdev.tls.record import HEADER_LEN, MAX_NUMBER, RecordFormat


class Nonces:
    """What is known of one flow's explicit nonces."""

    __slots__ = ("_hint", "_size", "irregular", "offset")

    def __init__(self, fmt: RecordFormat, number: int = 0, iv: BytesLike = b"") -> None:
        """`iv` is the explicit nonce that the host expects of record `number`."""
        self._size = fmt.prefix - HEADER_LEN
        self.irregular = False  # they do not count
        self._hint = (int.from_bytes(iv, "big") - number) & MAX_NUMBER if iv else None
        self.offset: int | None = None  # nonce less record number

    def learn(self, number: int, head: BytesLike) -> None:
        """Record `number` with prefix `head` was verified."""
        offset = self._offset(number, head)
        if self.offset is None and self._size and not self.irregular:
            self.offset = offset
        elif offset != self.offset:
            self.irregular, self.offset = True, None

    def expects(self, number: int, head: BytesLike) -> bool:
        """Whether record `number` should have the nonce in prefix `head`."""
        if not self._size:
            return True
        expected = self._hint if self.offset is None and not self.irregular else self.offset
        return expected is not None and self._offset(number, head) == expected

    def predict(self, number: int) -> bytes:
        """The explicit nonce of record `number`; `offset` must be known."""
        return ((number + (self.offset or 0)) & MAX_NUMBER).to_bytes(self._size, "big")

    def number(self, head: BytesLike) -> int:
        """Of the record that has this prefix; `offset` must be known."""
        return self._offset(self.offset or 0, head)

    def _offset(self, number: int, head: BytesLike) -> int:
        return (int.from_bytes(head[HEADER_LEN : HEADER_LEN + self._size], "big") - number) & MAX_NUMBER
