"""The two things a vhost-user back-end stands on, made of integers and bytes: an operating system and a device that
keep books."""

from __future__ import annotations

import itertools

from nicdev.errors import ProtocolError
from nicdev.virtio.ring import SplitRing

FILE_SIZE = 1 << 20


class FakeHost:
    """Hands out fds that are just numbers; asserts that each is closed once and each mapping unmapped once.

    All memory fds are the same file of FILE_SIZE bytes, `ram`.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count(1000)
        self.open: set[int] = set()
        self.mapped: list[memoryview] = []
        self.signals: list[int] = []
        self.bad_events: set[int] = set()
        self.ram = memoryview(bytearray(FILE_SIZE))

    def new_fd(self) -> int:
        fd = next(self._numbers)
        self.open.add(fd)
        return fd

    def map(self, fd: int, offset: int, size: int) -> memoryview:
        assert fd in self.open
        if offset + size > FILE_SIZE:
            raise ProtocolError("beyond the end of the file")
        view = self.ram[offset : offset + size]
        self.mapped.append(view)
        return view

    def unmap(self, view: memoryview) -> None:
        at = [i for i, mapped in enumerate(self.mapped) if mapped is view]
        assert len(at) == 1, "unmapped twice, or never mapped"
        del self.mapped[at[0]]

    def check_event(self, fd: int) -> None:
        assert fd in self.open
        if fd in self.bad_events:
            raise ProtocolError("not an eventfd")

    def signal(self, fd: int) -> None:
        assert fd in self.open
        self.signals.append(fd)

    def close(self, fd: int) -> None:
        self.open.remove(fd)


class FakeDevice:
    """Keeps the rings it was given and asserts that the callbacks come in an order that makes sense."""

    def __init__(self, host: FakeHost) -> None:
        self._host = host
        self.rings: dict[int, SplitRing] = {}
        self.fds: dict[int, tuple[int, int, int]] = {}
        self.features: list[int] = []
        self.mtu: list[int] = []
        self.resets: list[str] = []
        self.starts = 0

    def queue_started(self, index: int, ring: SplitRing, kick_fd: int, call_fd: int, err_fd: int) -> None:
        assert index not in self.rings, "started twice"
        assert kick_fd in self._host.open
        assert {call_fd, err_fd} <= self._host.open | {-1}
        self.rings[index] = ring
        self.fds[index] = kick_fd, call_fd, err_fd
        self.starts += 1

    def queue_stopped(self, index: int) -> None:
        assert set(self.fds.pop(index)) <= self._host.open | {-1}, "an fd was closed under a running queue"
        del self.rings[index]

    def features_set(self, features: int) -> None:
        assert not self.rings, "features changed under a running queue"
        self.features.append(features)

    def set_mtu(self, mtu: int) -> None:
        self.mtu.append(mtu)

    def reset(self, reason: str) -> None:
        self.resets.append(reason)
