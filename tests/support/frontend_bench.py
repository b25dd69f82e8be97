"""A `Frontend` on a real unix socket, worked by hand, and a lawful front end that shows it still serves."""

from __future__ import annotations

import os
import select
import socket
import struct
from pathlib import Path

from nicdev.edge.frontend import Frontend
from nicdev.edge.host import LinuxHost
from nicdev.stats import Stats
from nicdev.vhost.protocol import VhostUserBackend
from nicdev.virtio.ring import SplitRing
from tests.support.fake_driver import FakeFrontEnd, FakeQueue

USUAL = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 1 << 15
ALL_PROTOCOL = 1 | 1 << 3 | 1 << 4 | 1 << 13 | 1 << 15 | 1 << 16
NEED_REPLY = 9
DEADLINE = 5.0


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


class EchoDevice:
    """Returns every tx chain at once; keeps what it was told."""

    def __init__(self) -> None:
        self.rings: dict[int, tuple[SplitRing, int, int, int]] = {}
        self.resets: list[str] = []
        self.features = 0

    def queue_started(self, index: int, ring: SplitRing, kick_fd: int, call_fd: int, err_fd: int) -> None:
        self.rings[index] = ring, kick_fd, call_fd, err_fd

    def queue_stopped(self, index: int) -> None:
        del self.rings[index]

    def features_set(self, features: int) -> None:
        self.features = features

    def set_mtu(self, mtu: int) -> None:
        assert mtu >= 68

    def reset(self, reason: str) -> None:
        self.resets.append(reason)


class Bench:
    """A `Frontend` with its event loop run by hand: `settle` works until nothing is readable any more."""

    def __init__(self, sock: socket.socket, unlink: Path | None = None) -> None:
        self.device = EchoDevice()
        self.stats = Stats()
        self.host = LinuxHost()
        self.frontend = Frontend(sock, self._backend, unlink)

    def _backend(self) -> VhostUserBackend:
        return VhostUserBackend(self.host, self.device, self.stats, queue_pairs=2)

    def settle(self) -> None:
        while not self.frontend.finished and select.select([self.frontend], [], [], 0)[0]:
            self.frontend.on_readable()

    def ask(self, peer: FakeFrontEnd, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> bytes:
        """One message that is answered; the payload of its answer."""
        peer.send(request, payload, fds, NEED_REPLY)
        self.settle()
        number, reply = peer.receive()
        assert number == request
        return reply

    def negotiate(self, peer: FakeFrontEnd) -> None:
        peer.send(16, u64(ALL_PROTOCOL))
        assert self.ask(peer, 2, u64(USUAL)) == u64(0)
        assert self.ask(peer, 5, struct.pack("=II", 1, 0) + peer.region(), (peer.memfd,)) == u64(0)

    def start(self, peer: FakeFrontEnd, index: int) -> FakeQueue:
        queue = FakeQueue(peer.ram, 0x4000 * index, 64, event_idx=True)
        for request, payload, fds in peer.messages_to_start(index, queue):
            assert self.ask(peer, request, payload, fds) == u64(0)
        return queue


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:fake-guest")


def connect(bench: Bench, path: Path) -> FakeFrontEnd:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    peer = FakeFrontEnd(sock)
    bench.settle()
    return peer


def hung_up(sock: socket.socket) -> bool:
    """Whether the other side closed, with or without unread data in between."""
    sock.settimeout(DEADLINE)
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def serves(bench: Bench, path: Path) -> None:
    """A lawful front end gets a packet through: kick, chain, used, signal."""
    peer = connect(bench, path)
    bench.negotiate(peer)
    queue = bench.start(peer, 1)
    ring, kick, call, _ = bench.device.rings[1]
    assert peer.wait_signal(1, DEADLINE), "one at the start, in case the last back-end owed one"
    assert ring.want_kicks() is False
    assert queue.want_signal() is False
    peer.ram[0x40000:0x40005] = b"hello"
    queue.add([(0x40000, 5)], [])
    assert queue.publish()
    peer.kick(1)
    assert select.select([kick], [], [], DEADLINE)[0]
    chain = ring.pop()
    assert chain is not None
    assert bytes(chain[1][0]) == b"hello"
    ring.push(chain[0], 0)
    assert ring.publish()
    bench.host.signal(call)
    assert peer.wait_signal(1, DEADLINE)
    assert len(queue.collect()) == 1
    del chain, ring
    peer.close()
    bench.settle()
    assert not bench.frontend.connected
    assert bench.device.resets[-1] == "front end disconnected"
