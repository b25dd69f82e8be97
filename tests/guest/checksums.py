"""TCP checksums as a capture shows them."""

from __future__ import annotations

from array import array
from collections import Counter
from pathlib import Path

from testbed.wire.pcapfile import frames


def folded(data: bytes) -> int:
    """Ones' complement sum of 16-bit words, in host byte order; 0 and 0xFFFF are the same."""
    return sum(array("H", data + b"\0" * (len(data) % 2))) % 0xFFFF


def checksums(path: Path, source: bytes) -> Counter[str]:
    """The TCP checksums of data from the IPv4 address `source`: right, partial (for the next stage), wrong."""
    found: Counter[str] = Counter()
    for frame in frames(path):
        if bytes(frame[12:14]) != b"\x08\x00" or bytes(frame[26:30]) != source or frame[23] != 6:
            continue
        start, end = 14 + 4 * (frame[14] & 15), 14 + int.from_bytes(frame[16:18], "big")
        segment = bytes(frame[start:end])
        if len(segment) == 4 * (segment[12] >> 4):
            continue
        pseudo = bytes(frame[26:34]) + b"\0\6" + len(segment).to_bytes(2, "big")
        if folded(pseudo + segment) == 0:
            found["right"] += 1
        else:
            found["partial" if folded(segment[16:18]) == folded(pseudo) else "wrong"] += 1
    return found
