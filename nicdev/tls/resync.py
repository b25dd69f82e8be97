"""How an rx context that lost its place is told where to go on: one class per personality.

Theory of operation: `rx` knows where it stands, follows the stream while it can, and says so when it cannot. Everything
that differs between kinds of NIC is what happens then: who finds the next record, and what an RX_RESYNC command means.
That is a strategy's business. It holds no keys and sees no cipher state; it answers with a cursor to stand at, or None
to stay.
"""

from __future__ import annotations

from typing import Protocol

from nicdev.tls.walk import SEQ_HALF, SEQ_MASK, Cursor


class ResyncStrategy(Protocol):
    """A way to find one's place again."""

    def answer(self, cursor: Cursor | None, in_sync: bool, tcp_seq: int, rcd_sn: int) -> Cursor | None:
        """Where to stand after an RX_RESYNC command, or None to stay at `cursor` (None: nowhere)."""


class CoreNextHint:
    """core-next-hint (nfp): after two records that the kernel had to decrypt itself, it tells where the next starts.

    The kernel sends the hint when it has read all that arrived, but packets race with it. A hint behind the cursor is
    of no use: in sync, all headers since then were followed; lost, the packets with them have passed. The kernel backs
    off and tries again. Any other hint is where to stand: the packet that covers it resumes.
    """

    def answer(self, cursor: Cursor | None, in_sync: bool, tcp_seq: int, rcd_sn: int) -> Cursor | None:
        """See ResyncStrategy; tcp_seq and rcd_sn are start and number of the next record."""
        hint = Cursor(tcp_seq, rcd_sn)
        if cursor is None:
            return hint
        ahead = (tcp_seq - cursor.seq) & SEQ_MASK
        if ahead >= SEQ_HALF:
            return None
        if in_sync and hint == (cursor.skip(ahead) if ahead else cursor):
            return None  # no news
        return hint
