"""Where a received packet is put together that the guest gets decrypted.

Theory of operation: what came from the wire is never written to, since the verdict may be that it stays as it is. The
plaintext goes to `text`, at the offsets that the ciphertext has in its payload. In front of it is room for headers of
any length, so the whole frame then lies in one piece, and no text was copied for it.
"""

from __future__ import annotations

from typing import Final

from nicdev.abi import MAX_TCP_PAYLOAD
from nicdev.wire.frame import MAX_FRAME

HEADROOM: Final = MAX_FRAME


class Scratch:
    """Room for one frame at a time; `text` (MAX_TCP_PAYLOAD bytes) is where its TCP payload is."""

    __slots__ = ("_room", "text")

    def __init__(self) -> None:
        self._room = memoryview(bytearray(HEADROOM + MAX_FRAME))
        self.text = self._room[HEADROOM : HEADROOM + MAX_TCP_PAYLOAD]

    def frame(self, wire: memoryview, payload: int, end: int) -> memoryview:
        """The frame that has `text` in place of the TCP payload wire[payload:end]; good until the next packet."""
        start = HEADROOM - payload
        room = self._room
        room[start:HEADROOM] = wire[:payload]
        size = len(wire)
        if end != size:  # Ethernet padding
            room[start + end : start + size] = wire[end:]
        return room[start : start + size]

    def wipe(self) -> None:
        """Overwrite what is left of the last packet."""
        self._room[:] = bytes(len(self._room))
