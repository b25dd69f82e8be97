"""A fault director with nothing around it, and frames for it: scapy's, with records made by hand."""

from __future__ import annotations

import struct
from typing import Any, cast

from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from nicdev.abi import Cipher, Direction, TlsVersion
from nicdev.faults.director import Director
from nicdev.faults.parse import parse
from nicdev.faults.scenario import Scenario
from nicdev.stats import Stats
from nicdev.tls.context import ContextParams
from nicdev.tls.table import ContextTable
from tests.support.ether import ETH

GUEST, PEER = bytes([198, 51, 100, 2]), bytes([198, 51, 100, 1])
START = 0xFFFF_F000  # wraps after 4 KiB
PLAIN = bytes(12)
GSO = struct.pack("<BBHHHHH", 1, 1, 54, 1000, 34, 16, 0)  # NEEDS_CSUM, TCPV4, gso_size 1000
PARTIAL = struct.pack("<BBHHHHH", 1, 0, 54, 0, 34, 16, 0)
RECORD = 529  # bytes in all: 500 of text
TX, RX = Direction.TX, Direction.RX


class World:
    """A director for a table without contexts, and what its counters say."""

    def __init__(self, scenario: Scenario | str) -> None:
        self.stats = Stats()
        self.table = ContextTable(16)
        wanted = parse(scenario, "test") if isinstance(scenario, str) else scenario
        self.director = Director(wanted, self.table, self.stats, lambda: 0.0)
        self.table.observer = self.director.flows
        self.contexts = 0

    def context(self, direction: Direction = TX, port: int = 4000, rec_seq: int = 0, start: int = START) -> None:
        """The next context: a guest's port to the peer's 443."""
        self.table.add(self.contexts, 1, params(direction, port, rec_seq, start))
        self.contexts += 1

    def pass_(self, frame: bytes, header: bytes = PLAIN, now: float = 0, direction: Direction = TX) -> list[bytes]:
        """The frames that leave when this one comes."""
        out = self.director.feed(direction, header, memoryview(bytearray(frame)), now)
        return [bytes(parcel.frame) for parcel in out]

    def rules(self) -> list[dict[str, Any]]:
        """What the director tells of each."""
        return cast(list[dict[str, Any]], self.director.describe()["rules"])

    def struck(self) -> list[int]:
        return [rule["struck"] for rule in self.rules()]

    def later(self, now: float) -> list[bytes]:
        return [bytes(parcel.frame) for _, parcel in self.director.poll(now)]


def params(direction: Direction, port: int = 4000, rec_seq: int = 0, start: int = START) -> ContextParams:
    return ContextParams(
        direction, 4, TlsVersion.TLS_1_2, Cipher.AES_GCM_128, start, rec_seq,
        bytearray(4), bytearray(8), bytearray(16), (GUEST, port), (PEER, 443),
    )  # fmt: skip


def segment(at: int = 0, payload: bytes = b"x", port: int = 4000, outgoing: bool = True, flags: str = "PA") -> bytes:
    """A segment of a guest's connection that starts at byte `at` of the flow."""
    guest, peer = (".".join(map(str, end)) for end in (GUEST, PEER))
    ip = IP(src=guest, dst=peer) if outgoing else IP(src=peer, dst=guest)
    ports = (port, 443) if outgoing else (443, port)
    tcp = TCP(sport=ports[0], dport=ports[1], seq=(START + at) & 0xFFFFFFFF, flags=flags)
    return bytes(ETH / ip / tcp / payload)


def valid(frame: bytes) -> bool:
    """Whether scapy finds the TCP checksum right."""
    packet = Ether(frame)
    written = packet[TCP].chksum
    del packet[TCP].chksum
    return bool(Ether(bytes(packet))[TCP].chksum == written)


STREAM = b"".join(b"\x17\x03\x03" + (RECORD - 5).to_bytes(2, "big") + bytes([n]) * (RECORD - 5) for n in range(20))
CUT = 200
PIECES = [(at, segment(at, STREAM[at : at + CUT])) for at in range(0, len(STREAM), CUT)]


def rule(action: str, *lines: str, direction: str = "tx") -> str:
    return "\n".join(("[[rule]]", f'action = "{action}"', f'direction = "{direction}"', *lines, ""))


def run(world: World, pieces: list[tuple[int, bytes]] = PIECES) -> list[int]:
    """Where the segments that were dropped started."""
    return [at for at, frame in pieces if not world.pass_(frame)]


def holding(low: int, high: int) -> list[int]:
    """Where the segments that hold some of these bytes start."""
    return [at for at, _ in PIECES if at < high and at + CUT > low]
