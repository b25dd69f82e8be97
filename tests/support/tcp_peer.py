"""A TCP peer without a mind of its own: which segment is sent, where it lies, what it says is the script's choice.

It answers ARP, accepts one connection and, while `acking`, acknowledges what comes in order; nothing is ever sent again
or held back by itself. Places in either stream are offsets from its first byte, so scripts do not see sequence numbers.
Frames go through a `Link`; packet_link.py has one on the NIC's wire.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.l2 import ARP, Ether

MASK: Final = 0xFFFFFFFF
HALF: Final = 1 << 31
WAIT_SECONDS: Final = 20.0
POLL: Final = 0.05  # seconds; what is waited for need not be a frame
ECN_CE: Final = 3  # in the IP header's TOS (RFC 3168)


class Link(Protocol):
    """Where frames go and come from."""

    def send(self, frame: bytes) -> None:
        """Put a frame on the wire."""

    def receive(self, seconds: float) -> bytes | None:
        """The next frame, or None when none came in time."""


@dataclass(frozen=True)
class Heard:
    """A segment from the other side; `at` and `ack` are offsets in the two streams, SYN and FIN not counted."""

    at: int
    ack: int
    flags: str
    data: bytes
    window: int
    tos: int
    options: dict[str, Any]


class TcpPeer:
    """One IPv4 connection at `address`:`port`. `options` are scapy's, of the SYN ACK; ECN is agreed on if `ecn`."""

    def __init__(
        self,
        link: Link,
        address: str,
        port: int,
        *,
        mac: str = "02:00:00:00:00:77",
        first: int = 0x10000000,
        options: tuple[tuple[str, Any], ...] = (("MSS", 1460), ("SAckOK", b"")),
        window: int = 65535,
        ecn: bool = False,
    ) -> None:
        self.address, self.port, self.mac = address, port, mac
        self.window = window
        self.acking = True
        self.heard: list[Heard] = []
        self.stream = bytearray()  # what came, in order
        self.sent = 0  # offset behind what was sent with `write`
        self.acked = 0  # offset that the other side has acknowledged
        self.allowed = 0  # offset up to which the other side's window has ever reached
        self.ended = False  # our FIN is sent
        self.finished = False  # the other side's FIN is reached
        self.was_reset = False
        self.connected = False
        self._link = link
        self._first, self._their_first = first, 0
        self._options, self._ecn = options, ecn
        self._stamps = any(name == "Timestamp" for name, _ in options)
        self._stamp = self._their_stamp = 1
        self._ahead: dict[int, bytes] = {}
        self._fin: int | None = None
        self._guest: tuple[str, str, int] | None = None  # MAC, address, port

    # -- sending ------------------------------------------------------------------------------------------------------

    def segment(self, at: int, data: bytes = b"", flags: str = "A", *, ack: int | None = None, **fields: Any) -> None:
        """Send a segment: `at` and `ack` (default: all that came) are offsets; `fields` are as in scapy, and `tos`."""
        options = list(fields.pop("options", []))
        if self._stamps and "S" not in flags:
            self._stamp += 1
            options.append(("Timestamp", (self._stamp, self._their_stamp)))
        acknowledged = (len(self.stream) if ack is None else ack) + 1 + (self.finished and ack is None)
        self._send(
            fields.pop("tos", 0),
            seq=(self._first + 1 + at) & MASK,
            ack=(self._their_first + acknowledged) & MASK if "A" in flags else 0,
            flags=flags,
            window=fields.pop("window", self.window),
            options=options,
            data=data,
            **fields,
        )

    def _send(self, tos: int, *, data: bytes = b"", **fields: Any) -> None:
        assert self._guest is not None
        mac, address, port = self._guest
        frame = (
            Ether(src=self.mac, dst=mac)
            / IP(src=self.address, dst=address, tos=tos, flags="DF")
            / TCP(sport=self.port, dport=port, **fields)
        )
        self._link.send(bytes(frame / data if data else frame))

    def write(self, data: bytes, size: int = 1448, **fields: Any) -> None:
        """Send the next bytes of the stream in segments of `size`."""
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            self.segment(self.sent, piece, "PA", **fields)
            self.sent += len(piece)

    def acknowledge(self, upto: int | None = None, blocks: tuple[tuple[int, int], ...] = (), **fields: Any) -> None:
        """A pure ACK; `blocks` are offsets for SACK."""
        edges = tuple((self._their_first + 1 + edge) & MASK for block in blocks for edge in block)
        at = self.sent + self.ended
        self.segment(at, ack=upto, options=[("SAck", edges)] if edges else [], **fields)

    def finish(self, data: bytes = b"") -> None:
        """The last bytes of the stream, and FIN with them."""
        self.segment(self.sent, data, "FPA" if data else "FA")
        self.sent += len(data)
        self.ended = True

    def fragmentation_needed(self, mtu: int) -> None:
        """ICMP about the longest segment that came: a router behind this one has a smaller MTU (RFC 1191)."""
        assert self._guest is not None
        mac, address, port = self._guest
        at = max(self.heard, key=lambda each: len(each.data)).at
        about = IP(src=address, dst=self.address, len=1500, flags="DF") / TCP(
            sport=port, dport=self.port, seq=(self._their_first + 1 + at) & MASK
        )
        error = ICMP(type=3, code=4, nexthopmtu=mtu)
        quoted = bytes(about)[:28]
        self._link.send(bytes(Ether(src=self.mac, dst=mac) / IP(src=self.address, dst=address) / error / quoted))

    # -- receiving ----------------------------------------------------------------------------------------------------

    def until(self, condition: Callable[[], bool], what: str, seconds: float = WAIT_SECONDS) -> None:
        """Take frames until `condition` holds. Raises TimeoutError with `what`."""
        deadline = time.monotonic() + seconds
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"not within {seconds} s: {what}")
            self.take(min(left, POLL))

    def take(self, seconds: float) -> bool:
        """Handle the next frame, if one comes in time; whether one did."""
        frame = self._link.receive(seconds)
        if frame is None:
            return False
        packet = Ether(frame)
        if ARP in packet and packet[ARP].op == 1 and packet[ARP].pdst == self.address:
            asked = packet[ARP]
            answer = ARP(op=2, hwsrc=self.mac, psrc=self.address, hwdst=asked.hwsrc, pdst=asked.psrc)
            self._link.send(bytes(Ether(src=self.mac, dst=asked.hwsrc) / answer))
        elif TCP in packet and packet[IP].dst == self.address and packet[TCP].dport == self.port:
            self._segment(packet)
        return True

    def hear(self, fits: Callable[[Heard], bool], what: str) -> None:
        """Until a segment comes that fits; those that came before do not count."""
        known = len(self.heard)
        self.until(lambda: any(map(fits, self.heard[known:])), what)

    def accept(self) -> None:
        """Until the other side has connected."""
        self.until(lambda: self.connected, "a connection")

    def receive(self, size: int) -> None:
        """Until `size` bytes of the other side's stream have come."""
        self.until(lambda: len(self.stream) >= size, f"{size} bytes")

    def all_acknowledged(self) -> None:
        """Until everything written is acknowledged."""
        self.until(lambda: self.acked >= self.sent, f"an acknowledgement of {self.sent}")

    def room(self, size: int) -> None:
        """Until the other side's window, unscaled, has room for the next `size` bytes; it throws away what has none."""
        self.until(lambda: self.allowed - self.sent >= size, f"room for {size} bytes behind {self.sent}")

    def _segment(self, packet: Any) -> None:
        tcp = packet[TCP]
        if "S" in tcp.flags:
            self._guest = (packet.src, packet[IP].src, tcp.sport)
            self._their_first = tcp.seq
            flags = "SAE" if self._ecn and "E" in tcp.flags else "SA"
            acknowledged = (tcp.seq + 1) & MASK
            self._send(0, seq=self._first, ack=acknowledged, flags=flags, window=65535, options=list(self._options))
            return
        if self._guest is None or tcp.sport != self._guest[2]:
            return
        self.connected = True
        size = packet[IP].len - 4 * packet[IP].ihl - 4 * tcp.dataofs
        data = bytes(tcp.payload)[:size]
        at = self._offset(tcp.seq, self._their_first)
        acked = self._offset(tcp.ack, self._first)
        options = dict(tcp.options)
        if "Timestamp" in options:
            self._their_stamp = options["Timestamp"][0]
        self.heard.append(Heard(at, acked, str(tcp.flags), data, tcp.window, packet[IP].tos, options))
        self.acked = max(self.acked, min(acked, self.sent))
        if "A" in tcp.flags:
            self.allowed = max(self.allowed, acked + tcp.window)
        self.was_reset |= "R" in tcp.flags
        if "F" in tcp.flags:
            self._fin = at + len(data)
        in_order = at == len(self.stream) and not data and "F" not in tcp.flags
        self._put(at, data)
        if self.acking and not self.was_reset and not in_order:
            self.acknowledge()

    def _put(self, at: int, data: bytes) -> None:
        if data:
            self._ahead[at] = max(data, self._ahead.get(at, b""), key=len)
        for start in sorted(self._ahead):
            if start > len(self.stream):
                break
            self.stream += self._ahead.pop(start)[len(self.stream) - start :]
        self.finished |= self._fin is not None and len(self.stream) >= self._fin

    def _offset(self, number: int, first: int) -> int:
        """Of a sequence number, near what there is of the stream."""
        near = len(self.stream) if first == self._their_first else self.sent
        return near + ((number - first - 1 - near + HALF) & MASK) - HALF
