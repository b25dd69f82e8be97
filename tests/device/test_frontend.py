"""The vhost-user socket on a real unix socket with memfds and eventfds: no QEMU, no guest, the same code.

Steps: a fake front end negotiates and starts queues, a driver in the same memory posts buffers; then every way in
which a connection can go wrong. Verify: after each, open fds and mappings are back at the baseline and a lawful
front end is served.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nicdev.edge.frontend import Frontend
from nicdev.edge.host import LinuxHost
from nicdev.edge.unix_socket import from_fd, listen_at
from nicdev.errors import ConfigError, ProtocolError
from nicdev.stats import Counter, Stats
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


@pytest.fixture
def path() -> Iterator[Path]:
    """A socket path short enough for any machine."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "nic.sock"


@pytest.fixture
def bench(path: Path) -> Iterator[Bench]:
    """A listening front end; at the end no fd and no mapping is left of all that happened."""
    before = open_fds(), mappings()
    bench = Bench(listen_at(path), path)
    yield bench
    bench.frontend.close()
    assert not path.exists()
    assert (open_fds(), mappings()) == before
    assert bench.device.rings == {}


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


def test_serves_one_after_another(bench: Bench, path: Path) -> None:
    for _ in range(3):
        serves(bench, path)


def test_five_hundred_connections(bench: Bench, path: Path) -> None:
    before = open_fds()
    for i in range(500):
        peer = connect(bench, path)
        if i % 5 == 0:
            bench.negotiate(peer)
            bench.start(peer, 1)
        peer.close()
        bench.settle()
        assert open_fds() == before
    serves(bench, path)


def test_second_front_end_is_refused(bench: Bench, path: Path) -> None:
    first = connect(bench, path)
    bench.negotiate(first)
    second = connect(bench, path)
    assert hung_up(second.sock)
    second.close()
    assert len(bench.ask(first, 1)) == 8, "the first does not notice"
    first.close()
    bench.settle()
    serves(bench, path)


def test_disconnect_from_our_side(bench: Bench, path: Path) -> None:
    peer = connect(bench, path)
    bench.negotiate(peer)
    bench.start(peer, 0)
    bench.frontend.disconnect("test")
    assert bench.device.rings == {}
    assert hung_up(peer.sock)
    peer.close()
    serves(bench, path)


def test_one_byte_at_a_time(bench: Bench, path: Path) -> None:
    """A slow peer blocks nobody: every call returns at once, and the messages are whole in the end."""
    peer = connect(bench, path)
    data = struct.pack("=III", 16, 1, 8) + u64(ALL_PROTOCOL) + struct.pack("=III", 1, 1, 0)
    for i in range(len(data)):
        peer.sock.sendall(data[i : i + 1])
        bench.settle()
    assert peer.receive()[0] == 1
    peer.close()


def test_many_messages_in_one_piece(bench: Bench, path: Path) -> None:
    peer = connect(bench, path)
    peer.sock.sendall(struct.pack("=III", 1, 1, 0) * 200)
    bench.settle()
    assert [peer.receive()[0] for _ in range(200)] == [1] * 200
    peer.close()


def test_fds_stay_with_their_message(bench: Bench, path: Path) -> None:
    """Three messages in the socket at once, the middle one with an fd."""
    peer = connect(bench, path)
    bench.negotiate(peer)
    fd = peer.eventfd("call", 1)
    peer.send(18, struct.pack("=II", 1, 1), flags=NEED_REPLY)
    peer.send(13, u64(1), (fd,), NEED_REPLY)
    peer.send(18, struct.pack("=II", 0, 1), flags=NEED_REPLY)
    bench.settle()
    assert [peer.receive() for _ in range(3)] == [(18, u64(0)), (13, u64(0)), (18, u64(0))]
    peer.close()


def half_a_header(peer: FakeFrontEnd) -> None:
    peer.sock.sendall(b"\1\0\0")
    peer.sock.shutdown(socket.SHUT_WR)


def half_a_message_with_an_fd(peer: FakeFrontEnd) -> None:
    socket.send_fds(peer.sock, [struct.pack("=III", 5, 1, 40)[:9]], [peer.memfd])
    peer.sock.shutdown(socket.SHUT_WR)


def header_with_fds_and_no_payload(peer: FakeFrontEnd) -> None:
    socket.send_fds(peer.sock, [struct.pack("=III", 5, 1, 40)], [peer.memfd] * 8)
    peer.sock.shutdown(socket.SHUT_WR)


def fds_byte_by_byte(peer: FakeFrontEnd) -> None:
    for byte in struct.pack("=III", 5, 1, 40):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(peer.sock, [bytes([byte])], [peer.memfd])


def send_memory(peer: FakeFrontEnd, fds: tuple[int, ...]) -> None:
    peer.send(5, struct.pack("=II", 1, 0) + peer.region(), (fds or (peer.memfd,))[:1])
    for fd in fds:
        os.close(fd)


def short_memory(peer: FakeFrontEnd) -> None:
    os.ftruncate(peer.memfd, 4096)
    send_memory(peer, ())


def one_fd_too_many_for_a_good_table(peer: FakeFrontEnd) -> None:
    """Cut to the 8 that fit, it would be accepted."""
    pages = [struct.pack("=QQQQ", 4096 * i, 4096, peer.USER_BASE + 4096 * i, 4096 * i) for i in range(8)]
    peer.send(5, struct.pack("=II", 8, 0) + b"".join(pages), [peer.memfd] * 9)


BAD_ENDS: dict[str, Callable[[FakeFrontEnd], None]] = {
    "gone at once": lambda peer: None,
    "half close": lambda peer: peer.sock.shutdown(socket.SHUT_WR),
    "half a header": half_a_header,
    "half a message with an fd": half_a_message_with_an_fd,
    "fds and no payload": header_with_fds_and_no_payload,
    "an fd with every byte": fds_byte_by_byte,
    "9 fds": one_fd_too_many_for_a_good_table,
    "253 fds": lambda peer: peer.send(5, bytes(8), [peer.memfd] * 253),
    "payload of 4097 bytes": lambda peer: peer.send(3, bytes(4097)),
    "payload of 4 GiB": lambda peer: peer.sock.sendall(struct.pack("=III", 2, 1, 0xFFFFFFFF)),
    "version 2": lambda peer: peer.send(1, flags=2),
    "noise": lambda peer: peer.sock.sendall(bytes(range(256)) * 4),
    "wrong size": lambda peer: peer.send(2, bytes(7)),
    "fds with SET_OWNER": lambda peer: peer.send(3, b"", [peer.memfd] * 3),
    "memory from a pipe": lambda peer: send_memory(peer, os.pipe()),
    "memory from a directory": lambda peer: send_memory(peer, (os.open("/", os.O_RDONLY),)),
    "memory read-only": lambda peer: send_memory(peer, (os.open(f"/proc/self/fd/{peer.memfd}", os.O_RDONLY),)),
    "memory shorter than said": short_memory,
    "kick from a file": lambda peer: peer.send(12, u64(0), (peer.memfd,)),
    "kick from a socket": lambda peer: peer.send(12, u64(0), (peer.sock.fileno(),)),
}


@pytest.mark.parametrize("started", [False, True], ids=["fresh", "running"])
@pytest.mark.parametrize("name", BAD_ENDS)
def test_bad_ends(bench: Bench, path: Path, name: str, started: bool) -> None:
    """Whatever a peer does last: it is hung up on, everything it brought is closed, and the next is served."""
    before = open_fds(), mappings()
    peer = connect(bench, path)
    if started:
        bench.negotiate(peer)
        bench.start(peer, 0)
        bench.start(peer, 1)
    BAD_ENDS[name](peer)
    bench.settle()
    if name == "gone at once":
        peer.close()
        bench.settle()
    else:
        assert hung_up(peer.sock)
        peer.close()
    del peer
    assert not bench.frontend.connected
    assert (open_fds(), mappings()) == before
    serves(bench, path)


def test_too_large_a_payload_is_answered_first(bench: Bench, path: Path) -> None:
    peer = connect(bench, path)
    bench.negotiate(peer)
    peer.sock.sendall(struct.pack("=III", 2, NEED_REPLY, 5000))
    bench.settle()
    assert peer.receive() == (2, u64(1))
    assert hung_up(peer.sock)
    assert bench.stats[Counter.VHOST_BAD_MESSAGES] == 1
    peer.close()


def test_peer_that_does_not_read(bench: Bench, path: Path) -> None:
    """Replies are not queued without end: when the socket is full the connection is over."""
    peer = connect(bench, path)
    peer.sock.settimeout(0)
    with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
        for _ in range(100_000):
            peer.sock.sendall(struct.pack("=III", 1, 1, 0))
            bench.settle()
            if not bench.frontend.connected:
                break
    assert not bench.frontend.connected
    peer.close()
    serves(bench, path)


def test_memory_in_the_middle_of_a_file(bench: Bench, path: Path) -> None:
    """mmap offsets need not be page-aligned, and neither does the size."""
    peer = connect(bench, path)
    bench.negotiate(peer)
    payload = struct.pack("=IIQQQQ", 1, 0, 0, 5000, peer.USER_BASE, 4096 * 3 + 16)
    assert bench.ask(peer, 5, payload, (peer.memfd,)) == u64(0)
    peer.ram[4096 * 3 + 16 :][:5] = b"there"
    view = bench.host.map(peer.memfd, 4096 * 3 + 16, 5000)
    assert bytes(view[:5]) == b"there"
    assert len(view) == 5000
    bench.host.unmap(view)
    peer.close()


def test_unmap_waits_for_the_last_view() -> None:
    """A chain that is still looked at when its region goes keeps the bytes, and only the bytes, alive."""
    host = LinuxHost()
    fd = os.memfd_create("fake-guest")
    os.ftruncate(fd, 8192)
    before = open_fds(), mappings()
    view = host.map(fd, 0, 8192)
    chain = view[100:200]
    host.unmap(view)
    chain[:] = b"x" * 100
    assert os.pread(fd, 100, 100) == b"x" * 100
    del chain
    assert (open_fds(), mappings()) == before
    os.close(fd)


def test_guest_memory_is_not_in_core_dumps() -> None:
    host = LinuxHost()
    fd = os.memfd_create("fake-guest")
    os.ftruncate(fd, 8192)
    view = host.map(fd, 0, 8192)
    smaps = Path("/proc/self/smaps").read_text()
    entry = smaps[smaps.index("memfd:fake-guest") :]
    flags = entry[entry.index("VmFlags:") :].splitlines()[0].split()
    assert "dd" in flags
    host.unmap(view)
    os.close(fd)


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 8193), (8192, 1), (1 << 63, 1), (0, 1 << 63), ((1 << 64) - 4096, 4096)]
)
def test_map_beyond_the_file(offset: int, size: int) -> None:
    fd = os.memfd_create("short")
    os.ftruncate(fd, 8192)
    with pytest.raises(ProtocolError):
        LinuxHost().map(fd, offset, size)
    os.close(fd)


def test_signal_never_blocks_or_fails() -> None:
    host = LinuxHost()
    fd = os.eventfd((1 << 32) - 1, 0)
    host.check_event(fd)
    os.eventfd_write(fd, (1 << 64) - 2 - ((1 << 32) - 1))
    host.signal(fd)
    os.close(fd)
    reader, writer = os.pipe()
    host.check_event(writer)
    os.close(reader)
    host.signal(writer)
    os.close(writer)


# -- where the socket comes from -----------------------------------------------------------------------------------


def test_inherited_connection_is_served_once() -> None:
    before = open_fds()
    ours, theirs = socket.socketpair()
    bench = Bench(from_fd(ours.detach()))
    peer = FakeFrontEnd(theirs)
    bench.negotiate(peer)
    assert not bench.frontend.finished
    peer.close()
    bench.settle()
    assert bench.frontend.finished
    bench.frontend.close()
    assert open_fds() == before


def test_inherited_listener(path: Path) -> None:
    """The file is its maker's: it stays."""
    before = open_fds()
    bench = Bench(from_fd(listen_at(path).detach()))
    serves(bench, path)
    serves(bench, path)
    bench.frontend.close()
    assert path.exists()
    assert open_fds() == before


def test_fd_that_is_no_socket() -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(ConfigError, match="not a socket"):
        from_fd(fd)
    os.close(fd)
    with pytest.raises(ConfigError, match="not a socket"):
        from_fd(fd)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with pytest.raises(ConfigError, match="unix"):
        from_fd(udp.fileno())
    udp.close()


def test_stale_socket_is_replaced(path: Path) -> None:
    listen_at(path).close()
    assert path.exists()
    bench = Bench(listen_at(path), path)
    serves(bench, path)
    bench.frontend.close()
    assert not path.exists()


def test_live_socket_is_not(path: Path) -> None:
    first = listen_at(path)
    with pytest.raises(ConfigError, match="in use"):
        listen_at(path)
    first.close()


def test_file_that_is_no_socket_is_not_touched(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        listen_at(path)
    assert path.read_text() == "precious"


def test_socket_of_somebody_else_is_not_removed(path: Path) -> None:
    """Replaced under us, by hand or by a newer process: leave it."""
    bench = Bench(listen_at(path), path)
    path.rename(path.with_suffix(".old"))
    other = listen_at(path)
    bench.frontend.close()
    assert path.exists()
    other.close()


@pytest.mark.parametrize("extra", [1, 100, 4000])
def test_path_too_long(path: Path, extra: int) -> None:
    longest = 107 - len(os.fsencode(path.parent)) - 1
    with pytest.raises(ConfigError, match="limit is 107"):
        listen_at(path.parent / ("x" * (longest + extra)))
    listen_at(path.parent / ("x" * longest)).close()


def test_path_that_cannot_be(path: Path) -> None:
    for impossible in (path / "below", Path("/proc/nic.sock")):
        with pytest.raises(ConfigError, match="No such file"):
            listen_at(impossible)
