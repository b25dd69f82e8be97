"""The device's own account of what it encrypted and decrypted, packet by packet: its capture, read along from a FIFO.

The kernel tells by tracepoints which records it found wholly decrypted. Here the same is counted a second time, from
the packets that passed between NIC and guest, each with the device's verdict. Of bytes that passed several times, that
copy counts which TCP takes.
"""

from __future__ import annotations

import os
import threading
import time
from bisect import insort
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

from pcapng import FileScanner, blocks

from nicdev.wire.frame import parse
from testbed.bed import Bed
from testbed.errors import BedError

SETTLE_SECONDS: Final = 60
DONE: Final = {"tx": " encrypted", "rx": " decrypted"}
OUTSIDE: Final = ("queue_down", "no_buffer", "port")  # why rings and ports drop; the engine gave its verdict
_JUDGED: Final = {"tx": "wire0", "rx": "host0"}  # the view of a packet that has the verdict: the second
_DIRECTIONS: Final = {"outbound": "tx", "inbound": "rx"}
_MARK: Final = (b"\0", b"\1")


Stretch = tuple[int, int, bool]  # from, to, whether the device did it


@dataclass
class Flow:
    """One direction of a connection: TCP sequence number and length of every packet with data, and who did it."""

    packets: list[tuple[int, int, bool]] = field(default_factory=list)

    def records_by_device(self, ends: Sequence[int]) -> list[bool]:
        """Of each record, whether the device did every byte; `ends` are the offsets behind them, the first is at 0."""
        base = self.packets[0][0]
        offsets = [(seq - base + (1 << 31)) % (1 << 32) - (1 << 31) for seq, _, _ in self.packets]
        first = min(offsets)
        stretches = (
            (offset - first, offset - first + length, by_device)
            for offset, (_, length, by_device) in zip(offsets, self.packets, strict=True)
        )
        marks = b"".join(_MARK[by_device] * (high - low) for low, high, by_device in taken(stretches))
        return [
            marks.count(_MARK[True], start, end) == end - start for start, end in zip((0, *ends), ends, strict=False)
        ]


def taken(packets: Iterable[Stretch]) -> list[Stretch]:
    """The stream, gapless from 0, in those copies of its bytes that Linux' TCP takes (net/ipv4/tcp_input.c).

    A packet in order is taken at once, also where parts of it are waiting already (tcp_data_queue); ahead of its turn
    it waits, unless it adds nothing to another that does, and replaces what adds nothing to it (tcp_data_queue_ofo).
    """
    at = 0
    found: list[Stretch] = []
    waiting: list[Stretch] = []
    for low, high, by_device in packets:
        if low <= at < high:
            found.append((at, high, by_device))
            at = high
        elif low > at and not any(first <= low and high <= last for first, last, _ in waiting):
            waiting = [other for other in waiting if other[0] < low or high < other[1]]
            insort(waiting, (low, high, by_device))
        while waiting and waiting[0][0] <= at:
            _, last, theirs = waiting.pop(0)
            if last > at:
                found.append((at, last, theirs))
                at = last
    return found


class _Stream:
    """A FIFO that knows how far it was read, as python-pcapng wants to hear."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._at = 0

    def read(self, size: int) -> bytes:
        """As of any file."""
        data = self._file.read(size)
        self._at += len(data)
        return data

    def tell(self) -> int:
        """Bytes read so far."""
        return self._at


class Verdicts:
    """Reads the capture that a NIC writes to `path`, a FIFO that is made here."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path, 0o600)
        self.path = path
        self._counts: Counter[str] = Counter()
        self._flows: dict[tuple[str, int], Flow] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with open(self.path, "rb") as file:
            for block in FileScanner(_Stream(file)):
                if isinstance(block, blocks.EnhancedPacket):
                    self._packet(block)

    def _packet(self, block: Any) -> None:
        options = block.options
        direction = _DIRECTIONS[options["epb_flags"].inout]
        frame = memoryview(bytearray(block.packet_data))
        parsed = parse(frame)
        judged = block.interface.options["if_name"] == _JUDGED[direction]
        with self._lock:
            self._counts[direction] += judged
            if not judged or parsed is None or parsed.payload == parsed.end:
                return
            port = parsed.dport if direction == "tx" else parsed.sport
            flow = self._flows.setdefault((direction, port), Flow())
            by_device = DONE[direction] in options.get("opt_comment", "")
            flow.packets.append((parsed.seq, parsed.end - parsed.payload, by_device))

    @contextmanager
    def watching(self, bed: Bed) -> Iterator[dict[tuple[str, int], Flow]]:
        """What passes during the block, by direction and the peer's port; the dictionary is filled when it ends."""
        self._catch_up(bed)
        with self._lock:
            self._flows.clear()
        found: dict[tuple[str, int], Flow] = {}
        yield found
        self._catch_up(bed)
        with self._lock:
            found |= self._flows
            self._flows = {}

    def _catch_up(self, bed: Bed) -> None:
        """Until all that the NIC has counted was read; what it dropped has no verdict."""
        stats = bed.nic.stats()
        want = {"tx": stats["tx_packets"], "rx": stats["rx_wire_packets"]}
        for name, count in stats.items():
            direction, _, reason = name.partition("_drop_")
            if direction in want and reason and reason not in OUTSIDE:
                want[direction] -= count
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            with self._lock:
                counts = Counter(self._counts)
            if all(counts[direction] >= want[direction] for direction in want):
                return
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise BedError(f"the NIC's capture shows {dict(counts)} packets, its counters {want}")
            time.sleep(0.05)
