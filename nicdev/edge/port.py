"""What every port offers to the device, and the ports that need no operating system: `null` and `pair`.

A port carries Packets: a 12-byte virtio_net_hdr and an Ethernet frame of up to 64 KiB. The header keeps segmentation
and checksum work undone where the other side can take it. `receiver` is set by the device: it gets header and frame
in writable memory, valid until it returns, and answers whether it can take more; after False the port keeps silent
until `resume`. `before_frames`, the device's too, is called before a burst of them: what the guest posted until then
comes first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from nicdev.edge.loop import Loop
from nicdev.nic import Packet
from nicdev.wire import vnet

Receiver = Callable[[memoryview, memoryview], bool]
PAIR_DEPTH: Final = 1024  # packets that wait for a guest whose rx ring is full


class Port:
    """Base of all ports; alone it is the `null` port, which takes everything and gives nothing."""

    def __init__(self) -> None:
        self.receiver: Receiver = lambda _header, _frame: True
        self.before_frames: Callable[[], None] = lambda: None

    def send(self, packet: Packet) -> bool:
        """Transmit one frame; False when it could not be."""
        return True

    @property
    def sender(self) -> Callable[[Packet], bool]:
        """What to call instead of `send` for a burst of frames: the same, by the shortest way there is now."""
        return self.send

    def resume(self) -> None:
        """The device can take packets again."""

    def features_changed(self, accepted: int) -> None:
        """The guest accepted these (virtio feature bits)."""

    def close(self) -> None:
        """Release what the port holds."""


class PairPort(Port):
    """One end of a cable between two NICs of this process. Each end buffers what its guest cannot take yet."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self._loop = loop
        self._peer: PairPort | None = None
        self._waiting: deque[tuple[bytearray, bytearray]] = deque()
        self._silent = False  # the device said that it can take no more

    @classmethod
    def create(cls, loop: Loop) -> tuple[PairPort, PairPort]:
        """Both ends of a new cable."""
        left, right = cls(loop), cls(loop)
        left._peer, right._peer = right, left
        return left, right

    def send(self, packet: Packet) -> bool:
        """Queue a copy at the other end; False when that is full."""
        peer = self._peer
        if peer is None or len(peer._waiting) >= PAIR_DEPTH:
            return False
        peer._waiting.append((bytearray(packet.header[: vnet.VNET_HDR.size]), bytearray(packet.frame)))
        self._loop.soon(peer._hand_over)
        return True

    def resume(self) -> None:
        """The device can take packets again."""
        self._silent = False
        self._hand_over()

    def _hand_over(self) -> None:
        """Give the device what waits, as far as it takes it."""
        self.before_frames()
        while self._waiting and not self._silent:
            header, frame = self._waiting.popleft()
            self._silent = not self.receiver(memoryview(header), memoryview(frame))

    def close(self) -> None:
        """Unplug."""
        if self._peer is not None:
            self._peer._peer = None
        self._peer = None
        self._waiting.clear()
