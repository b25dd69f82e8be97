"""The scripted TCP peer against a model in memory: a guest of one page, and the reassembly that judges captures."""

from __future__ import annotations

import struct
from collections import deque

import pytest

from testbed.wire.reassembly import Stream, parse, reassemble
from tests.support.tcp_peer import TcpPeer

PEER, GUEST = "198.51.100.77", bytes((198, 51, 100, 2))
MAC = bytes.fromhex("525400123456")
PORT, GUEST_PORT = 4433, 50000
FIN, SYN, RST, ACK = 1, 2, 4, 16


class Guest:
    """The other end as a Link: queues frames for the peer, keeps what the peer sends."""

    def __init__(self, first: int = 0xFFFFFFF0) -> None:
        self.first = first
        self.frames: deque[bytes] = deque()
        self.sent: list[bytes] = []

    def send(self, frame: bytes) -> None:
        self.sent.append(frame)

    def receive(self, seconds: float) -> bytes | None:
        return self.frames.popleft() if self.frames else None

    def say(self, seq: int, flags: int, data: bytes = b"", ack: int = 0, window: int = 500) -> None:
        """A segment without options, `seq` counted from the SYN."""
        ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 40 + len(data), 0, 0, 64, 6, 0, GUEST, bytes((198, 51, 100, 77)))
        tcp = struct.pack(">HHIIBBHHH", GUEST_PORT, PORT, (self.first + seq) % 2**32, ack, 0x50, flags, window, 0, 0)
        self.frames.append(bytes(6) + MAC + b"\x08\x00" + ip + tcp + data)


def connected(guest: Guest, **options: object) -> TcpPeer:
    peer = TcpPeer(guest, PEER, PORT, first=0xFFFFFF00, **options)  # type: ignore[arg-type]
    guest.say(0, SYN)
    guest.say(1, ACK, ack=0xFFFFFF01)
    peer.accept()
    return peer


def streams(guest: Guest) -> tuple[Stream, Stream]:
    (connection,) = reassemble(map(memoryview, guest.sent))
    return connection.streams


def acknowledged(guest: Guest) -> int:
    """What the peer's last segment acknowledges, counted from the SYN."""
    return (int.from_bytes(guest.sent[-1][42:46], "big") - guest.first) % 2**32


def test_it_says_where_it_is() -> None:
    guest = Guest()
    asks = b"\0\1\x08\0\6\4\0\1" + MAC + GUEST + bytes(6)
    guest.frames += [b"\xff" * 6 + MAC + b"\x08\x06" + asks + bytes((198, 51, 100, last)) for last in (1, 77)]
    peer = TcpPeer(guest, PEER, PORT)
    peer.take(0)
    assert guest.sent == []
    peer.take(0)
    answer = guest.sent[0]
    assert answer[:6] == answer[32:38] == MAC
    assert answer[20:32] == b"\0\2" + bytes.fromhex(peer.mac.replace(":", "")) + bytes((198, 51, 100, 77))


def test_what_it_writes_lies_where_it_belongs() -> None:
    """Past the end of the sequence numbers, in segments of the wanted size, repeated where the script says so."""
    guest = Guest()
    peer = connected(guest)
    data = bytes(range(256)) * 3
    peer.write(data, 100)
    peer.segment(50, data[50:250])
    stream, _ = streams(guest)
    assert stream.data == data
    assert stream.segments == 9
    assert stream.retransmitted_bytes == 200
    assert stream.conflicts == []
    peer.segment(10, b"other")
    assert streams(guest)[0].conflicts != []


def test_what_comes_is_put_in_order_and_acknowledged() -> None:
    guest = Guest()
    peer = connected(guest)
    for at, data in ((30, b"tail"), (0, b"x" * 20), (10, b"x" * 20)):
        guest.say(1 + at, ACK, data)
        peer.take(0)
    assert peer.stream == b"x" * 30 + b"tail"
    assert [segment.at for segment in peer.heard if segment.data] == [30, 0, 10]
    assert acknowledged(guest) == 1 + 34
    guest.say(1 + 34, FIN | ACK, b"end")
    peer.until(lambda: peer.finished, "FIN")
    assert peer.stream.endswith(b"tailend")
    assert acknowledged(guest) == 1 + 37 + 1


def test_room_is_what_the_other_side_has_offered() -> None:
    """Not what it has acknowledged: data that it has not read fills its window."""
    guest = Guest()
    peer = connected(guest)
    peer.write(bytes(400))
    for window in (100, 100, 599, 600, 700):
        guest.say(1, ACK, ack=(0xFFFFFF01 + 400) % 2**32, window=window)
    guest.say(1, RST, window=65535)  # without ACK: its numbers mean nothing
    peer.room(100)
    assert len(guest.frames) == 6, "there was room from the start"
    peer.room(600)
    assert peer.acked == 400
    assert len(guest.frames) == 2
    peer.room(700)
    while peer.take(0):
        pass
    assert peer.allowed == 1100


def test_silence_and_reset() -> None:
    guest = Guest()
    peer = connected(guest)
    peer.acking = False
    said = len(guest.sent)
    guest.say(1, ACK, b"data")
    peer.receive(4)
    assert len(guest.sent) == said
    peer.acknowledge(2, blocks=((3, 4),))
    assert acknowledged(guest) == 1 + 2
    assert struct.pack(">II", (guest.first + 4) % 2**32, (guest.first + 5) % 2**32) in guest.sent[-1]
    guest.say(5, RST)
    peer.until(lambda: peer.was_reset, "RST")
    with pytest.raises(TimeoutError, match="never"):
        peer.until(lambda: False, "never", 0)


def test_acknowledgements_options_and_checksums() -> None:
    guest = Guest()
    peer = connected(guest, options=(("MSS", 900), ("Timestamp", (7, 0))), ecn=True)
    peer.write(b"abc", tos=3)
    segment = parse(memoryview(guest.sent[-1]))
    assert segment is not None
    assert bytes(segment.payload) == b"abc"
    assert guest.sent[-1][15] == 3
    assert guest.sent[-1][14 + 20 + 12] >> 4 == 8, "12 bytes of options"
    words = struct.unpack(">10H", guest.sent[-1][14:34])
    assert sum(words) % 0xFFFF == 0
    guest.say(1, ACK, ack=(0xFFFFFF01 + 2) % 2**32)
    peer.until(lambda: peer.acked == 2, "an acknowledgement")
    with pytest.raises(TimeoutError, match="acknowledgement"):
        peer.until(lambda: peer.acked == 3, "an acknowledgement of 3", 0)


def test_a_router_complains() -> None:
    guest = Guest()
    peer = connected(guest)
    guest.say(1, ACK, b"x" * 1400)
    peer.receive(1400)
    peer.fragmentation_needed(576)
    icmp = guest.sent[-1][34:]
    assert icmp[:2] == b"\3\4"
    assert struct.unpack(">H", icmp[6:8])[0] == 576
    quoted = icmp[8:]
    assert quoted[12:16] == GUEST
    assert struct.unpack(">HHI", quoted[20:28]) == (GUEST_PORT, PORT, (guest.first + 1) % 2**32)
