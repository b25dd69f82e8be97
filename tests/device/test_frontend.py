"""The vhost-user socket on a real unix socket with memfds and eventfds: no QEMU, no guest, the same code.

Steps: a fake front end negotiates and starts queues, a driver in the same memory posts buffers; then every way in
which a connection can go wrong. Verify: after each, open fds and mappings are back at the baseline and a lawful
front end is served.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from nicdev.stats import Counter
from tests.support.fake_driver import FakeFrontEnd
from tests.support.frontend_bench import (
    ALL_PROTOCOL,
    NEED_REPLY,
    Bench,
    connect,
    hung_up,
    mappings,
    open_fds,
    serves,
    u64,
)


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
