"""TCP streams out of frames: both directions of every connection, in order, each byte once.

A byte may be seen more than once (retransmission, overlapping segments, GSO cut elsewhere). It must be the same
byte each time: a NIC that encrypts a retransmission differently is broken even if the peer never saw the second
copy. So every byte of a stream is kept, and each repeated one is compared with the first. Segments that arrive damaged
are none: TCP discards them for their checksum, and here they are only counted.
"""

from __future__ import annotations

import struct
from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final, NamedTuple

ETHERTYPE_IPV4: Final = 0x0800
ETHERTYPE_IPV6: Final = 0x86DD
ETHERTYPES_VLAN: Final = (0x8100, 0x88A8)
IPPROTO_TCP: Final = 6
IPV6_EXTENSIONS: Final = (0, 43, 60)  # hop-by-hop, routing, destination options
FIN: Final = 0x01
SYN: Final = 0x02
TCP: Final = struct.Struct(">HHIIBB")
HALF: Final = 1 << 31
SPACE: Final = 1 << 32


class Endpoint(NamedTuple):
    """Address in its usual text form, and port."""

    address: str
    port: int


class Segment(NamedTuple):
    """One TCP segment as it stood in a frame, of any size."""

    source: bytes
    destination: bytes
    source_port: int
    destination_port: int
    sequence: int
    flags: int
    payload: memoryview
    damaged: bool


def _sum(data: bytes | memoryview) -> int:
    """Ones' complement sum of 16-bit words (RFC 1071), where 0 and 0xFFFF are the same."""
    return (int.from_bytes(data, "big") << 8 * (len(data) % 2)) % 0xFFFF


def parse(frame: memoryview) -> Segment | None:
    """The TCP segment in an Ethernet frame; None for anything else and for IP fragments."""
    if len(frame) < 14:
        return None
    start = 14
    ethertype = int.from_bytes(frame[12:14], "big")
    while ethertype in ETHERTYPES_VLAN and len(frame) >= start + 4:
        ethertype = int.from_bytes(frame[start + 2 : start + 4], "big")
        start += 4
    packet = frame[start:]
    if ethertype == ETHERTYPE_IPV4 and len(packet) >= 20 and packet[9] == IPPROTO_TCP:
        total = int.from_bytes(packet[2:4], "big")
        if int.from_bytes(packet[6:8], "big") & 0x3FFF:
            return None
        return _tcp(bytes(packet[12:16]), bytes(packet[16:20]), packet[(packet[0] & 15) * 4 : total])
    if ethertype == ETHERTYPE_IPV6 and len(packet) >= 40:
        end = 40 + int.from_bytes(packet[4:6], "big")
        protocol, here = packet[6], 40
        while protocol in IPV6_EXTENSIONS and here + 8 <= min(end, len(packet)):
            protocol, here = packet[here], here + 8 + packet[here + 1] * 8
        if protocol == IPPROTO_TCP:
            return _tcp(bytes(packet[8:24]), bytes(packet[24:40]), packet[here:end])
    return None


def _tcp(source: bytes, destination: bytes, packet: memoryview) -> Segment | None:
    if len(packet) < 20:
        return None
    source_port, destination_port, sequence, _, offset, flags = TCP.unpack_from(packet)
    payload = packet[(offset >> 4) * 4 :]
    # a checksum may be right, or not be made yet: then the field holds the sum of the pseudo-header
    pseudo = _sum(source + destination + bytes((0, IPPROTO_TCP)) + len(packet).to_bytes(4, "big"))
    damaged = bool((_sum(packet) + pseudo) % 0xFFFF) and _sum(packet[16:18]) != pseudo
    return Segment(source, destination, source_port, destination_port, sequence, flags, payload, damaged)


@dataclass
class Stream:
    """One direction. `data` is what is contiguous from `first`, the sequence number of its first byte."""

    source: Endpoint
    destination: Endpoint
    first: int | None = None
    data: bytearray = field(default_factory=bytearray)
    finished: bool = False
    segments: int = 0
    retransmitted_bytes: int = 0
    damaged: int = 0  # segments, not counted otherwise
    conflicts: list[str] = field(default_factory=list)
    later: list[tuple[int, bytes]] = field(default_factory=list)  # (offset, bytes) behind a gap, sorted

    def add(self, sequence: int, payload: memoryview) -> None:
        """Put a segment's payload in its place."""
        self.segments += 1
        if self.first is None:
            self.first = sequence
        # nearest offset to where the stream now ends that has this sequence number
        end = len(self.data)
        offset = end + (sequence - self.first - end + HALF) % SPACE - HALF
        if offset > end:
            insort(self.later, (offset, bytes(payload)))
            return
        self._append(offset, payload)
        while self.later and self.later[0][0] <= len(self.data):
            offset, kept = self.later.pop(0)
            self._append(offset, memoryview(kept))

    def _append(self, offset: int, payload: memoryview) -> None:
        if offset < 0:  # before the capture began, or a keep-alive probe
            payload = payload[-offset:]
            offset = 0
        known = min(len(self.data) - offset, len(payload))
        if known:
            self.retransmitted_bytes += known
            if self.data[offset : offset + known] != payload[:known]:
                self.conflicts.append(f"bytes {offset} to {offset + known} were sent again with other contents")
        self.data += payload[known:]

    @property
    def gap(self) -> int | None:
        """Offset of bytes that were never seen although later ones were; None when there is no gap."""
        return len(self.data) if self.later else None


@dataclass
class Connection:
    """Both directions. The first stream is that of the side that was seen first, normally the client."""

    streams: tuple[Stream, Stream]


def reassemble(all_frames: Iterable[memoryview]) -> list[Connection]:
    """Every TCP connection in the frames; a new SYN on known ports starts another one."""
    connections: list[Connection] = []
    current: dict[tuple[bytes, int, bytes, int], tuple[Connection, int]] = {}
    for frame in all_frames:
        segment = parse(frame)
        if segment is None:
            continue
        source, destination, source_port, destination_port, sequence, flags, payload, damaged = segment
        key = (source, source_port, destination, destination_port)
        found = current.get(key)
        if damaged:
            if found is not None:
                found[0].streams[found[1]].damaged += 1
            continue
        if flags & SYN:
            sequence = (sequence + 1) % SPACE  # SYN takes one number; the first byte has the next
        if found is None or (flags & SYN and found[0].streams[found[1]].first not in (None, sequence)):
            here = Endpoint(str(ip_address(source)), source_port)
            there = Endpoint(str(ip_address(destination)), destination_port)
            connection = Connection((Stream(here, there), Stream(there, here)))
            connections.append(connection)
            found = current[key] = (connection, 0)
            current[(destination, destination_port, source, source_port)] = (connection, 1)
        connection, direction = found
        stream = connection.streams[direction]
        if flags & SYN:
            stream.first = sequence
        if flags & FIN:
            stream.finished = True
        if payload:
            stream.add(sequence, payload)
    return connections
