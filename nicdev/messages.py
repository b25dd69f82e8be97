"""What the device has to say to the driver: EVENT and HELLO_REPLY, waiting for a buffer of rx queue 0.

Theory of operation: a driver that takes nothing costs bounded memory. Repeated events of a context merge, past
MAX_MESSAGES events are counted and lost, and of answers to HELLO only the last one is waited for. CONFIG_CHANGED is
not lost: of a context the next packet would tell again, of this nothing would, and one waits at most.
"""

from __future__ import annotations

from typing import Final

from nicdev import abi
from nicdev.stats import Counter, Stats
from nicdev.wire import vnet

MAX_MESSAGES: Final = 256

_HEADER: Final = vnet.VnetHdr(flags=abi.HDR_F_EXT, num_buffers=1).pack()
_IDENTITY: Final = len(_HEADER) + 12  # bytes of a message up to and with type, code, len, slot, generation


class Messages(list[bytes]):
    """The messages that wait, oldest first, each a whole packet: virtio_net_hdr and extension."""

    def __init__(self, stats: Stats) -> None:
        super().__init__()
        self._stats = stats

    def event(self, code: abi.EventCode, slot: int, generation: int, reason: int, value: int) -> None:
        """Queue an EVENT, unless one with the same code and context waits."""
        message = _HEADER + abi.EVENT.pack(abi.ExtType.EVENT, code, abi.EVENT.size, slot, generation, reason, value)
        if any(waiting[:_IDENTITY] == message[:_IDENTITY] for waiting in self):
            return
        if len(self) >= MAX_MESSAGES and code is not abi.EventCode.CONFIG_CHANGED:
            self._stats.add(Counter.EVENTS_DROPPED)
            return
        self.append(message)
        self._stats.add(Counter.EVENTS_SENT)

    def hello_reply(self, reply: bytes) -> None:
        """Queue the answer to a HELLO, in place of earlier ones."""
        self[:] = [m for m in self if m[len(_HEADER)] != abi.ExtType.HELLO_REPLY]
        self.append(_HEADER + reply)
