"""Which receive queue a flow belongs to.

Theory of operation: automatic receive steering (virtio 1.2, 5.1.6.5.6.2): a flow is received where it last transmitted.
Most packets belong to the same flow as the one before, so the last flow is recognised by its bytes, without parsing.
"""

from __future__ import annotations

from typing import Final

from nicdev.wire.frame import ETH_HLEN, PLAIN_IPV4, Frame, parse

MAX_FLOWS: Final = 65536
_IPV4_FLOW: Final = slice(26, 38)  # addresses and ports of a TCP segment in PLAIN_IPV4


class Steering:
    """Receive queues of TCP flows; those of unknown flows are 0."""

    __slots__ = ("_last", "_last_queue", "_queues")

    def __init__(self) -> None:
        self._queues: dict[tuple[bytes, int, bytes, int], int] = {}  # source and destination of what is received
        self._last, self._last_queue = b"", 0  # the entry that was set last, if over PLAIN_IPV4

    def transmitted(self, queue: int, frame: memoryview) -> None:
        """A frame left by transmit queue `queue`."""
        flow = bytes(frame[_IPV4_FLOW])
        if flow == self._last and queue == self._last_queue and frame[ETH_HLEN] == PLAIN_IPV4:
            return
        parsed = parse(frame)
        if parsed is None:
            return
        if len(self._queues) >= MAX_FLOWS:
            self._queues.clear()
        self._queues[(parsed.dst, parsed.dport, parsed.src, parsed.sport)] = queue
        if frame[ETH_HLEN] == PLAIN_IPV4:
            self._last, self._last_queue = flow, queue

    def queue(self, parsed: Frame) -> int:
        """Where a frame from the wire is to be received."""
        return self._queues.get((parsed.src, parsed.sport, parsed.dst, parsed.dport), 0)

    def clear(self) -> None:
        """Forget all flows."""
        self._queues.clear()
        self._last = b""
