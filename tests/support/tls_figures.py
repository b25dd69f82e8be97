"""A stream of records through a path with disorder, an rx context and a kernel: how many records come out offloaded.

Segments of 1448 bytes, records of 16 KiB; a lost segment comes one window later. Shared by the unit tests, which hold
the figures that rx `ideal` promises, and the benchmark, which reports them.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from nicdev.abi import Direction, RxPersonality
from nicdev.tls.personality import rx_context
from tests.support.tls_oracle import Stream, Suite
from tests.support.tls_path import Kernel, Path, disorder

BASE = 0xFFFFF000


@dataclass
class Result:
    """What became of a stream."""

    offloaded: float  # share of records
    dropped: int
    seconds: float  # CPU, per segment
    state: object


def bulk(suite: Suite, count: int) -> Stream:
    """Records of 16 KiB."""
    records = Stream(suite)
    text = random.Random(1).randbytes(16384) + b"\x17" * (suite.version == 0x0304)
    parts = []
    for _ in range(count):
        records.add(text)
        parts.append((records.wire, records.clear))
        records.wire = records.clear = records.framed = b""
    records.wire = b"".join(wire for wire, _ in parts)
    return records


def run(records: Stream, path: Path, seed: int = 1, personality: RxPersonality = RxPersonality.IDEAL) -> Result:
    """Send the stream over the path; the kernel takes all of it, and all of it is right."""
    count = len(records.ends)
    rx = rx_context(records.suite.params(Direction.RX, BASE, records.first_number, rx_personality=personality))
    kernel = Kernel(records.suite, records.first_number, len(records.wire))
    segments = dropped = 0
    seconds = 0.0
    for low, high in disorder(random.Random(seed), len(records.wire), path):
        buffer = bytearray(records.wire[low:high])
        view = memoryview(buffer)
        began = time.process_time()
        result = rx.decrypt((BASE + low) % 2**32, view)
        seconds += time.process_time() - began
        segments += 1
        dropped += result.drop
        if not result.drop:
            kernel.take(low, buffer if result.text is None else bytes(result.text), result.decrypted)
        for place, number in kernel.headers[-1:]:
            if result.ask == (BASE + place) % 2**32:
                rx.resync(result.ask, number)
    assert not kernel.dead
    assert len({text for _, text in kernel.texts}) == 1
    assert len(kernel.texts) == count
    return Result(kernel.offloaded / count, dropped, seconds / segments, rx.describe()["state"])
