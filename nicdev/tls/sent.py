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

from nicdev.tls.store import Pool, Store
from nicdev.tls.walk import SEQ_HALF, SEQ_MASK

MAX_SENT: Final = 4 << 20  # bytes of one flow
LARGE: Final = 4096  # bytes of a packet of which a copy costs more than a view


def _mostly(piece: memoryview) -> bool:
    """Whether a view is large and nearly all of its buffer."""
    whole = piece.obj
    return len(piece) >= LARGE and isinstance(whole, bytearray) and len(whole) < len(piece) + LARGE // 8


class Sent:
    """The ciphertext of one flow that left last."""

    __slots__ = ("_end", "_pool", "_start", "_store")

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._store = Store(pool)
        self._start = self._end = 0  # of what was remembered; positions are sequence numbers that do not wrap

    def admit(self, seq: int, data: memoryview) -> bool:
        """Whether ciphertext `data`, from TCP sequence number `seq` on, may leave; it is remembered if so.

        False: a byte of it left before with another value. What `data` shows may not change any more: where it is large
        and nearly all of its buffer, it is remembered itself.
        """
        if not self._store.size:
            self._start = self._end = seq
            self._pool.holders[self._store] = None
        at = self._position(seq)
        fresh = [(at, at + len(data))] if at >= self._end else self._store.missing(at, data)
        if fresh is None:
            return False
        for low, high in fresh:
            piece = data[low - at : high - at]
            self._store.add(low, piece if _mostly(piece) else bytes(piece))
        self._start, self._end = min(self._start, at), max(self._end, at + len(data))
        if self._store.size > MAX_SENT:
            self._forget(MAX_SENT - MAX_SENT // 4)  # not a piece at a time
        while self._pool.free < 0:
            self._pool.shed()
        return True

    def differs(self, seq: int, data: memoryview) -> bool:
        """Whether a byte of `data`, which will not leave, left before with another value."""
        return self._store.missing(self._position(seq), data) is None

    def clear(self) -> None:
        """Forget everything."""
        self._pool.holders.pop(self._store, None)
        self._store.clear()

    def _position(self, seq: int) -> int:
        """The one nearest to the end that has this sequence number."""
        return self._end + ((seq - self._end + SEQ_HALF) & SEQ_MASK) - SEQ_HALF

    def _forget(self, keep: int) -> None:
        """All but what lies in the last `keep` bytes."""
        start = max(self._start, self._end - keep)
        self._store.remove(self._start, start)
        self._start = start
