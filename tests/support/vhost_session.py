"""A vhost-user front end without a socket: messages straight into a `VhostUserBackend` that stands on a fake host
and device.

Written from the vhost-user document; request numbers and layouts are typed here a second time on purpose.
"""

from __future__ import annotations

import struct

from nicdev.errors import ProtocolError
from nicdev.stats import Counter, Stats
from nicdev.vhost.message import Header
from nicdev.vhost.protocol import VhostUserBackend
from tests.support.fake_driver import FakeQueue
from tests.support.fake_host import FILE_SIZE, FakeDevice, FakeHost

GET_FEATURES, SET_FEATURES, SET_OWNER, RESET_OWNER, SET_MEM_TABLE = 1, 2, 3, 4, 5
VRING_NUM, VRING_ADDR, VRING_BASE, GET_BASE, KICK, CALL, ERR = 8, 9, 10, 11, 12, 13, 14
GET_PROTOCOL, SET_PROTOCOL, QUEUE_NUM, ENABLE, MTU, RESET_DEVICE = 15, 16, 17, 18, 20, 34
SLOTS, ADD_REG, REM_REG, SET_STATUS, GET_STATUS = 36, 37, 38, 39, 40
F_PROTOCOL, F_VERSION_1, F_INDIRECT, F_EVENT_IDX, F_MRG, F_MQ = 1 << 30, 1 << 32, 1 << 28, 1 << 29, 1 << 15, 1 << 22
QUESTIONS = (GET_FEATURES, GET_PROTOCOL, GET_BASE, QUEUE_NUM, SLOTS, GET_STATUS)  # have answers of their own
USUAL = F_PROTOCOL | F_VERSION_1 | F_INDIRECT | F_EVENT_IDX | F_MRG
P_MQ, P_REPLY_ACK, P_MTU, P_RESET, P_SLOTS, P_STATUS = 1, 1 << 3, 1 << 4, 1 << 13, 1 << 15, 1 << 16
ALL_PROTOCOL = P_MQ | P_REPLY_ACK | P_MTU | P_RESET | P_SLOTS | P_STATUS
USER = 0x7F00_0000_0000
PAIRS = 2


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def state(index: int, num: int) -> bytes:
    return struct.pack("=II", index, num)


def region(guest: int = 0, size: int = FILE_SIZE, user: int = USER, offset: int = 0) -> bytes:
    return struct.pack("=QQQQ", guest, size, user, offset)


def table(*regions: bytes) -> bytes:
    return struct.pack("=II", len(regions), 0) + b"".join(regions)


class Session:
    """A front end's view of a back-end, with everything behind it in the open."""

    def __init__(self) -> None:
        self.host = FakeHost()
        self.device = FakeDevice(self.host)
        self.stats = Stats()
        self.backend = VhostUserBackend(self.host, self.device, self.stats, queue_pairs=PAIRS)
        self.ack = False

    def send(self, request: int, payload: bytes = b"", fds: int = 0, flags: int = 1) -> bytes:
        """The reply's payload, checked to answer this request; b"" where there was none."""
        flags |= 8 if self.ack else 0
        reply = self.backend.handle(
            Header(request, flags, len(payload)), payload, [self.host.new_fd() for _ in range(fds)]
        )
        if not reply:
            return b""
        number, reply_flags, size = struct.unpack_from("=III", reply)
        assert (number, reply_flags, size) == (request, 5, len(reply) - 12)
        return reply[12:]

    def refused(self, request: int, payload: bytes = b"", fds: int = 0, flags: int = 1) -> bool:
        """Whether the message is refused, and nothing but its refusal counted."""
        before = self.stats[Counter.VHOST_BAD_MESSAGES]
        try:
            reply = self.send(request, payload, fds, flags)
            refused = reply == u64(1) and request not in QUESTIONS
        except ProtocolError:
            refused = True
        assert self.stats[Counter.VHOST_BAD_MESSAGES] == before + refused
        return refused

    def negotiate(self, features: int = USUAL, protocol: int = ALL_PROTOCOL, memory: bool = True) -> None:
        self.send(SET_PROTOCOL, u64(protocol))
        self.ack = bool(protocol & P_REPLY_ACK)
        self.send(SET_FEATURES, u64(features))
        if memory:
            self.send(SET_MEM_TABLE, table(region()), fds=1)

    def queue(self, index: int, num: int = 16, start: int = 0, event_idx: bool = True) -> FakeQueue:
        return FakeQueue(self.host.ram, 0x4000 * index, num, event_idx=event_idx, start=start)

    def address(self, index: int, queue: FakeQueue) -> bytes:
        return struct.pack("=IIQQQQ", index, 0, USER + queue.desc_at, USER + queue.used_at, USER + queue.avail_at, 0)

    def start(self, index: int, queue: FakeQueue, base: int = 0) -> None:
        """As QEMU does it: the call fd after the kick fd, enabled last."""
        for request, payload, fds in (
            (VRING_NUM, state(index, queue.num), 0),
            (VRING_BASE, state(index, base), 0),
            (VRING_ADDR, self.address(index, queue), 0),
            (KICK, u64(index), 1),
            (CALL, u64(index), 1),
            (ENABLE, state(index, 1), 0),
        ):
            assert not self.refused(request, payload, fds)

    def stop(self, index: int) -> int:
        """GET_VRING_BASE; returns the base."""
        number, base = struct.unpack("=II", self.send(GET_BASE, state(index, 0)))
        assert number == index
        return int(base)

    def close(self) -> None:
        """Hang up; every fd is closed once, all memory unmapped, no queue left."""
        self.backend.close()
        assert self.host.open == set()
        assert self.host.mapped == []
        assert self.device.rings == {}
        assert self.device.resets[-1] == "front end disconnected"
