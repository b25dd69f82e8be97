"""What a device has for its driver, on the way between them: where lies.py changes it.

Numbers and layouts are those of nicdev.abi and of the virtio specification, sections 2.7.8 (used ring) and 5.1.6
(virtio_net_hdr).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Final

from nicdev import abi
from nicdev.wire import vnet

EXT: Final = abi.VNET_HDR_LEN  # where the extension begins
Handle = tuple[int, int]


@dataclass
class Handles:
    """The contexts that the driver made, as its commands tell."""

    live: dict[Handle, abi.Direction] = field(default_factory=dict)
    closed: list[Handle] = field(default_factory=list)
    asked: set[Handle] = field(default_factory=set)  # whose first attempt has begun

    def hear(self, chain: bytes) -> int:
        """One tx chain; returns the opcode if it is a command, else 0."""
        if len(chain) < EXT + abi.COMMAND.size or not chain[0] & abi.HDR_F_EXT or chain[EXT] != abi.ExtType.COMMAND:
            return 0
        _, opcode, _, slot, generation = abi.COMMAND.unpack_from(chain, EXT)
        if opcode == abi.Opcode.CTX_ADD:
            self.live[slot, generation] = abi.Direction(chain[EXT + abi.COMMAND.size])
        elif opcode == abi.Opcode.CTX_DEL and self.live.pop((slot, generation), None) is not None:
            self.closed.append((slot, generation))
        return int(opcode)

    def any_of(self, rng: Random, direction: abi.Direction) -> Handle | None:
        """A live context of this direction."""
        found = [handle for handle, its in self.live.items() if its == direction]
        return rng.choice(found) if found else None


@dataclass
class Delivery:
    """A frame or a message for the driver: `head` is guest memory from its first byte on, the first buffer at least.

    `used` are its entries in the used ring (section 2.7.8): id, and length << 32. `inject` delivers a
    message before it, unless there is no buffer.
    """

    head: memoryview
    used: list[int]
    ring_size: int
    handles: Handles
    inject: Callable[[bytes], bool]

    def length(self) -> int:
        """Bytes in the first buffer."""
        return self.used[0] >> 32

    def set_length(self, length: int, index: int = 0) -> None:
        """Bytes that the driver will hear of."""
        self.used[index] = self.used[index] & 0xFFFF_FFFF | length << 32

    def extension(self) -> int:
        """Its type, or 0."""
        return self.head[EXT] if self.head[0] & abi.HDR_F_EXT else 0

    def set_header(self, **fields: int) -> None:
        """Fields of the virtio_net_hdr that are other than they were."""
        header = vnet.VnetHdr.unpack_from(self.head)._replace(**fields)
        self.head[: abi.VNET_HDR_LEN] = header.pack()

    def mark(self, flags: int, handle: Handle, seq: int = 0, length: int = 0) -> bool:
        """Put this verdict before the frame, in place of the one it has, if it has one."""
        if self.extension() == 0:
            end = self.length()
            if len(self.used) > 1 or end + abi.RX_TLS.size > len(self.head):
                return False
            self.head[EXT + abi.RX_TLS.size : end + abi.RX_TLS.size] = bytes(self.head[EXT:end])
            self.head[0] |= abi.HDR_F_EXT
            self.set_length(end + abi.RX_TLS.size)
        elif self.extension() != abi.ExtType.RX_TLS:
            return False
        abi.RX_TLS.pack_into(
            self.head, EXT, abi.ExtType.RX_TLS, flags, abi.RX_TLS.size, *handle, seq & 0xFFFF_FFFF, length, 1, 1
        )
        return True

    def verdict(self) -> abi.RxTls | None:
        """What the honest device said about the frame."""
        if self.extension() != abi.ExtType.RX_TLS:
            return None
        return abi.RxTls._make(abi.RX_TLS.unpack_from(self.head, EXT))


@dataclass
class Answer:
    """A command's reply, in guest memory: `view` is the device-writable part, of which `written` bytes are used."""

    opcode: int
    view: memoryview
    written: int
