"""How many records the kernel finds wholly decrypted under loss and reordering: the figures that rx `ideal` promises.

Segments of 1448 bytes, records of 16 KiB; a lost segment comes one window later. Run as a program, it prints a table,
with the time per segment: python -m tests.unit.test_tls_ideal_figures
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import pytest

from nicdev.abi import Direction, RxPersonality
from nicdev.tls.personality import rx_context
from tests.support.tls_oracle import GCM_1_2, SUITES, Stream, Suite
from tests.support.tls_path import Kernel, Path, disorder

BASE = 0xFFFFF000
FIGURES = [  # path, share of records that must be offloaded, of TLS 1.2 AES-GCM
    (Path(), 0.99),
    *((Path(window, loss=0.01), 0.97) for window in (64, 256)),
    *((Path(window, loss=0.05), 0.90) for window in (64, 256)),
    (Path(reorder=0.02), 0.95),
    (Path(reorder=0.05), 0.90),
]


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
            kernel.take(low, buffer, result.decrypted)
        for place, number in kernel.headers[-1:]:
            if result.ask == (BASE + place) % 2**32:
                rx.resync(result.ask, number)
    assert not kernel.dead
    assert len({text for _, text in kernel.texts}) == 1
    assert len(kernel.texts) == count
    return Result(kernel.offloaded / count, dropped, seconds / segments, rx.describe()["state"])


@pytest.mark.parametrize(("path", "share"), FIGURES)
def test_share_of_records_offloaded(path: Path, share: float) -> None:
    result = run(bulk(GCM_1_2, 400), path)
    assert result.offloaded >= share
    assert result.dropped == 0
    assert result.state == "in_sync"


@pytest.mark.parametrize("suite", SUITES[1:], ids=str)
def test_other_suites_complete_under_loss(suite: Suite) -> None:
    """Without nonces that tell numbers, a hidden header costs a record more."""
    result = run(bulk(suite, 200), Path(loss=0.01, reorder=0.01))
    assert result.offloaded >= 0.93
    assert result.dropped == 0


def main() -> None:
    """Print the table."""
    for suite in SUITES:
        records = bulk(suite, 600)
        for path, _ in FIGURES:
            result = run(records, path)
            print(f"{suite!s:32} window {path.window:3} loss {path.loss:4.0%} reorder {path.reorder:4.0%}", end="")
            print(f"  offloaded {result.offloaded:7.2%}  {result.seconds * 1e6:6.2f} us/segment")


if __name__ == "__main__":
    main()
