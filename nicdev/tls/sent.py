"""What has left, so that nothing else leaves in its place.

Theory of operation: TCP repeats what was lost, and the device encrypts it again, with the key and nonce of the first
time. That is harmless as long as the plaintext is the same. It is not where an application broke its word
(TLS_TX_ZEROCOPY_RO: "the file does not change") or a driver takes one record for another: two plaintexts under one
nonce give away their difference and the key of the tag. So the device remembers the ciphertext that left, by place in
the stream, and compares. A packet of which one byte differs may not leave.

Memory is bounded: the last MAX_SENT bytes of a flow are remembered (what Linux holds for retransmission at most, unless
it is told otherwise: tcp_wmem[2]). Where the memory of all flows is used up, they take turns to forget the older half
of what they have; the one that began to send last comes last. What was forgotten is not compared.
"""

from __future__ import annotations

from typing import Final

from nicdev.tls.store import PIECE_COST, Pool, Store
from nicdev.tls.walk import SEQ_HALF, SEQ_MASK

MAX_SENT: Final = 4 << 20  # bytes of one flow
LARGE: Final = 4096  # bytes of a packet of which a copy costs more than a view


def _kept(piece: memoryview) -> bytes | memoryview:
    """A piece itself if it is large and nearly all of its buffer, else a copy."""
    size, whole = len(piece), piece.obj
    if size >= LARGE and isinstance(whole, bytearray) and len(whole) < size + LARGE // 8:
        return piece
    return bytes(piece)


class Sent(Store):
    """The ciphertext of one flow that left last."""

    __slots__ = ("_end",)

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self._end = 0  # of what was remembered; positions are sequence numbers that do not wrap

    def admit(self, seq: int, data: memoryview) -> bool:
        """Whether ciphertext `data`, from TCP sequence number `seq` on, may leave; it is remembered if so.

        False: a byte of it left before with another value. What `data` shows may not change any more: where it is large
        and nearly all of its buffer, it is remembered itself.
        """
        pool = self._pool
        if not self.size:
            self._end = seq
            pool.holders[self] = None
        ahead = (seq - self._end) & SEQ_MASK
        if ahead < SEQ_HALF:  # nothing left before that could be compared
            at, size = self._end + ahead, len(data)
            self._starts.append(at)
            self._blobs.append(_kept(data))
            self._end = at + size
            self.size += size
            pool.free -= size + PIECE_COST
        elif not self._again(self._position(seq), data):
            return False
        while self.size > MAX_SENT:
            self.forget(1 + self.pieces // 64)  # a few: many at once leave cold memory, and one moves all the others
        while pool.free < 0:
            pool.shed()
        return True

    def _again(self, at: int, data: memoryview) -> bool:
        """What `admit` says of what left before, at least its first byte."""
        fresh = self.missing(at, data)
        if fresh is None:
            return False
        for low, high in fresh:
            self.add(low, _kept(data[low - at : high - at]))
        self._end = max(self._end, at + len(data))
        return True

    def differs(self, seq: int, data: memoryview) -> bool:
        """Whether a byte of `data`, which will not leave, left before with another value."""
        return self.missing(self._position(seq), data) is None

    def clear(self) -> None:
        """Forget everything."""
        self._pool.holders.pop(self, None)
        super().clear()

    def _position(self, seq: int) -> int:
        """The one nearest to the end that has this sequence number."""
        return self._end + ((seq - self._end + SEQ_HALF) & SEQ_MASK) - SEQ_HALF
