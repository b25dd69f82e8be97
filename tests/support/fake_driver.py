"""A guest's side of things, written from the specifications alone: virtio 1.2 section 2.7 and the vhost-user document.

`FakeQueue` is a driver of one split virtqueue, in any memory; `FakeFrontEnd` is what QEMU does on the vhost-user
socket. Both can also be made to lie: `FakeQueue.poke` writes any descriptor, `FakeFrontEnd.send` any message. They
share no code with the device, so a misreading of the specification in one is not mirrored in the other.
"""

from __future__ import annotations

import mmap
import os
import random
import select
import socket
import struct
import threading
from collections.abc import Sequence

NEXT, WRITE, INDIRECT = 1, 2, 4
PAGE = 4096


class FakeQueue:
    """Driver of one split virtqueue that lies in `ram` at `offset`; `ram[0]` has guest address `ram_addr`.

    Ring parts one after another: descriptor table, available ring, used ring (each aligned as section 2.7 asks).
    """

    def __init__(
        self, ram: memoryview, offset: int, num: int, *, ram_addr: int = 0, event_idx: bool = False, start: int = 0
    ) -> None:
        self.ram = ram
        self.ram_addr = ram_addr
        self.num = num
        self.event_idx = event_idx
        self.desc_at = offset
        self.avail_at = offset + 16 * num
        self.used_at = (self.avail_at + 6 + 2 * num + 3) // 4 * 4
        self.end = self.used_at + 6 + 8 * num
        ram[offset : self.end] = bytes(self.end - offset)
        self._avail = ram[self.avail_at : self.avail_at + 6 + 2 * num].cast("H")
        self._used = ram[self.used_at : self.used_at + 6 + 8 * num].cast("H")
        self.avail_idx = self._avail[1] = self.seen_used = self._used[1] = start
        self._avail[2 + num] = start
        self._used[2 + 4 * num] = start
        self._kicked_at = start
        self.free = list(range(num))
        self.in_flight: dict[int, tuple[list[int], int]] = {}  # head -> (descriptors, writable bytes)
        self._fence = threading.Lock()

    # -- lawful driver ---------------------------------------------------------------------------------------------

    def add(
        self,
        readable: Sequence[tuple[int, int]],
        writable: Sequence[tuple[int, int]],
        table_addr: int | None = None,
        direct: int = 0,
    ) -> int:
        """Make one chain of (guest address, length) buffers available, not yet visible; returns its head.

        With `table_addr` the descriptors from number `direct` on go into an indirect table at that guest address.
        """
        buffers = [(a, n, 0) for a, n in readable] + [(a, n, WRITE) for a, n in writable]
        if table_addr is not None:
            inner = buffers[direct:]
            for i, (addr, length, flags) in enumerate(inner):
                last = i == len(inner) - 1
                entry = struct.pack("<QIHH", addr, length, flags | (0 if last else NEXT), 0 if last else i + 1)
                at = table_addr - self.ram_addr + 16 * i
                self.ram[at : at + 16] = entry
            buffers = [*buffers[:direct], (table_addr, 16 * len(inner), INDIRECT)]
        taken = [self.free.pop() for _ in buffers]
        for i, (addr, length, flags) in enumerate(buffers):
            last = i == len(buffers) - 1
            self.poke(taken[i], addr, length, flags | (0 if last else NEXT), 0 if last else taken[i + 1])
        self.in_flight[taken[0]] = (taken, sum(n for _, n in writable))
        self.offer(taken[0])
        return taken[0]

    def publish(self) -> bool:
        """Show everything added to the device; returns whether it wants a kick (section 2.7.22)."""
        old, new = self._kicked_at, self.avail_idx
        self._avail[1] = new
        self._kicked_at = new
        with self._fence:  # a store before loads: needs a full barrier, which taking a lock is on x86
            pass
        if self.event_idx:
            event = self._used[2 + 4 * self.num]
            return (new - event - 1) % 65536 < (new - old) % 65536
        return not self._used[0] & 1

    def collect(self) -> list[tuple[int, int]]:
        """Take (head, written) from the used ring; asserts that each head was in flight and nothing was overrun."""
        done = []
        idx = self._used[1]
        while self.seen_used != idx:
            at = self.used_at + 4 + 8 * (self.seen_used % self.num)
            head, written = struct.unpack_from("<II", self.ram, at)
            assert head in self.in_flight, f"head {head} was used twice or never offered"
            taken, room = self.in_flight.pop(head)
            assert written <= room, f"{written} bytes written into {room}"
            self.free += taken
            done.append((head, written))
            self.seen_used = (self.seen_used + 1) % 65536
        return done

    def want_signal(self) -> bool:
        """Ask for a signal at the next used buffer; True if one is there already (section 2.7.10)."""
        if self.event_idx:
            self._avail[2 + self.num] = self.seen_used
        else:
            self._avail[0] = 0
        with self._fence:
            pass
        return self._used[1] != self.seen_used

    def no_signals(self) -> None:
        """VIRTQ_AVAIL_F_NO_INTERRUPT."""
        self._avail[0] = 1

    # -- liar ------------------------------------------------------------------------------------------------------

    def poke(self, index: int, addr: int, length: int, flags: int, following: int) -> None:
        """Write one descriptor as it is."""
        struct.pack_into("<QIHH", self.ram, self.desc_at + 16 * index, addr, length, flags, following)

    def offer(self, head: int) -> None:
        """Write the next available entry; `publish` shows it."""
        self._avail[2 + self.avail_idx % self.num] = head
        self.avail_idx = (self.avail_idx + 1) % 65536

    def set_avail_idx(self, value: int) -> None:
        """Write avail.idx as it is."""
        self._avail[1] = value


def random_chain(rng: random.Random, area: int, size: int, parts: int) -> list[tuple[int, int]]:
    """Up to `parts` buffers, anywhere and not apart, inside `size` bytes from guest address `area`."""
    chain = []
    for _ in range(rng.randint(0, parts)):
        length = rng.randint(1, min(size, 3000))
        chain.append((area + rng.randint(0, size - length), length))
    return chain


class FakeFrontEnd:
    """The front end of a vhost-user connection: one memfd of guest memory and the messages QEMU sends."""

    USER_BASE = 0x7F00_0000_0000

    def __init__(self, sock: socket.socket, memory_size: int = 1 << 20) -> None:
        sock.settimeout(5)
        self.sock = sock
        self.memfd = os.memfd_create("fake-guest", os.MFD_CLOEXEC)
        os.ftruncate(self.memfd, memory_size)
        self.ram = memoryview(mmap.mmap(self.memfd, memory_size))
        self.events: dict[tuple[str, int], int] = {}

    # -- messages --------------------------------------------------------------------------------------------------

    def send(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 1) -> None:
        """One message with its fds."""
        data = struct.pack("=III", request, flags, len(payload)) + payload
        if fds:
            socket.send_fds(self.sock, [data], list(fds))
        else:
            self.sock.sendall(data)

    def receive(self) -> tuple[int, bytes]:
        """One reply: (request, payload)."""
        request, flags, size = struct.unpack("=III", self._exactly(12))
        assert flags == 5, f"reply flags {flags:#x}"  # version 1 and the reply bit
        return request, self._exactly(size)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            assert piece, "the back-end closed the connection"
            data += piece
        return data

    # -- set-up in QEMU's order ------------------------------------------------------------------------------------

    def region(self, size: int | None = None) -> bytes:
        """Region description of our memory: guest address 0, user address USER_BASE."""
        return struct.pack("=QQQQ", 0, len(self.ram) if size is None else size, self.USER_BASE, 0)

    def eventfd(self, kind: str, index: int) -> int:
        """A fresh eventfd, kept under its name."""
        if (old := self.events.pop((kind, index), None)) is not None:
            os.close(old)
        self.events[kind, index] = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return self.events[kind, index]

    def messages_to_start(
        self, index: int, queue: FakeQueue, base: int = 0
    ) -> list[tuple[int, bytes, tuple[int, ...]]]:
        """SET_VRING_NUM, BASE, ADDR, KICK, CALL, ENABLE for `queue`."""
        state = struct.Struct("=II")
        addr = struct.pack(
            "=IIQQQQ",
            index,
            0,
            self.USER_BASE + queue.desc_at,
            self.USER_BASE + queue.used_at,
            self.USER_BASE + queue.avail_at,
            0,
        )
        return [
            (8, state.pack(index, queue.num), ()),
            (10, state.pack(index, base), ()),
            (9, addr, ()),
            (12, struct.pack("=Q", index), (self.eventfd("kick", index),)),
            (13, struct.pack("=Q", index), (self.eventfd("call", index),)),
            (18, state.pack(index, 1), ()),
        ]

    def kick(self, index: int) -> None:
        """Tell the device that vring `index` has work."""
        os.eventfd_write(self.events["kick", index], 1)

    def wait_signal(self, index: int, seconds: float) -> bool:
        """Wait for the device's signal on vring `index` and take it."""
        fd = self.events["call", index]
        if not select.select([fd], [], [], seconds)[0]:
            return False
        os.eventfd_read(fd)
        return True

    def close(self) -> None:
        """Hang up and close what is ours; queues in `ram` that others still hold keep the mapping alive."""
        self.ram = memoryview(b"")
        self.sock.close()
        for fd in self.events.values():
            os.close(fd)
        self.events.clear()
        os.close(self.memfd)
