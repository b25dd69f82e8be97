"""The canary: does any frame on the wire hold bytes that should only ever be there encrypted?

Exact, for any 8 consecutive bytes of the samples at any place in a frame, and fast enough for gigabytes: wherever
such a window lies, one whole aligned 4-byte word of the frame is inside it. So a frame is clean if none of its
words is among the words of the samples; only where one is (about one word in 2^32/len(samples) by chance) the
windows around it are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

WINDOW: Final = 8
WORD: Final = 4
SHOWN: Final = 16


@dataclass
class Canary:
    """Looks for `samples` (8 bytes or more each; random content, or they occur by chance)."""

    samples: Iterable[bytes]
    frames: int = 0
    hits: int = 0  # frames that show plaintext
    places: list[str] = field(default_factory=list)  # the first few hits in words

    def __post_init__(self) -> None:
        self._windows = {sample[i : i + WINDOW] for sample in self.samples for i in range(len(sample) - WINDOW + 1)}
        # in host byte order, as memoryview.cast reads them
        self._words = {
            word
            for window in self._windows
            for i in range(WINDOW - WORD + 1)
            for word in memoryview(window)[i : i + WORD].cast("I")
        }

    def find(self, data: memoryview) -> int | None:
        """Where the first window of a sample begins in `data`; None when there is none."""
        words = data[: len(data) // WORD * WORD].cast("I")
        if self._words.isdisjoint(words):
            return None
        for index, word in enumerate(words):
            if word in self._words:
                place = index * WORD
                for start in range(max(0, place - WINDOW + WORD), place + 1):
                    if bytes(data[start : start + WINDOW]) in self._windows:
                        return start
        return None

    def watch(self, frames: Iterable[memoryview]) -> Iterator[memoryview]:
        """Pass frames on, counting those that show plaintext."""
        for frame in frames:
            self.frames += 1
            place = self.find(frame)
            if place is not None:
                self.hits += 1
                if len(self.places) < SHOWN:
                    self.places.append(f"frame {self.frames}, byte {place}")
            yield frame
