"""Which settings the matrix runs: a covering array, so that a few dozen runs meet what thousands of combinations would.

Theory of operation: faults come from few circumstances together. An array *covers strength t* if, whichever t factors
are chosen, every allowed combination of their values is in some row. `cover` builds one greedily: a row begins with a
combination that is still missing, and each further factor takes the value that adds most; of several such rows the best
is kept. Strength 2 takes about 20 rows here, strength 3 about 90.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import combinations, product
from typing import Any, Final

Values = Mapping[str, Sequence[Any]]
Row = dict[str, Any]
TRIES: Final = 12  # rows of which the best is kept


@dataclass(frozen=True)
class Setting:
    """One run. Rates are in percent; `faulty` says which way packets go astray, tx being guest to wire."""

    kernel: str
    rx: str
    tx: str
    loss: float
    reorder: float
    duplicate: float
    corrupt: float
    faulty: str
    cipher: str
    family: str
    mtu: int
    segments: str

    def __str__(self) -> str:
        return " ".join(map(str, astuple(self)))

    @property
    def orderly(self) -> bool:
        """Whether nothing goes astray."""
        return not (self.loss or self.reorder or self.duplicate or self.corrupt)

    @property
    def link_mtu(self) -> int:
        """What the guest's interface is set to: IPv6 knows no link below 1280 bytes (RFC 8200, 5)."""
        return max(self.mtu, 1280) if self.family == "6" else self.mtu


FACTORS: Final[Values] = {
    "kernel": ("6.1", "6.12", "7.2"),
    "rx": ("ideal", "driver-req", "driver-req-async", "core-next-hint"),
    "tx": ("rebuild", "next-record"),
    "loss": (0, 1, 5, 10),
    "reorder": (0, 1, 5, 25),
    "duplicate": (0, 1),
    "corrupt": (0, 0.1),
    "faulty": ("tx", "rx", "both"),
    "cipher": ("aes-128-gcm", "aes-256-gcm"),
    "family": ("4", "6"),
    "mtu": (576, 1500, 9000),
    "segments": ("wire", "joined", "whole"),
}
assert tuple(FACTORS) == tuple(field.name for field in fields(Setting))


def possible(row: Row) -> bool:
    """A bit of a large packet cannot be flipped so that only TCP notices: the packet has no checksum yet."""
    return not (row.get("corrupt") and row.get("segments") == "whole")


def wanted(factors: Values, strength: int, allowed: Callable[[Row], bool]) -> Iterator[tuple[tuple[str, Any], ...]]:
    """All combinations that an array must have."""
    for names in combinations(factors, strength):
        for values in product(*(factors[name] for name in names)):
            if allowed(dict(zip(names, values, strict=True))):
                yield tuple(zip(names, values, strict=True))


def cover(factors: Values, strength: int, seed: int, allowed: Callable[[Row], bool]) -> list[Row]:
    """Rows that cover `factors`; the same for the same seed. `allowed` judges rows that may still lack factors."""
    rng = random.Random(seed)
    missing = dict.fromkeys(wanted(factors, strength, allowed))
    order = {name: place for place, name in enumerate(factors)}

    def gained(row: Row, name: str) -> int:
        """What the value of `name` adds to those before it."""
        others = combinations((other for other in row if other != name), strength - 1)
        keys = (sorted((*chosen, name), key=order.__getitem__) for chosen in others)
        return sum(tuple((each, row[each]) for each in key) in missing for key in keys)

    def attempt(start: tuple[tuple[str, Any], ...]) -> tuple[int, Row]:
        row, score = dict(start), 1
        rest = [name for name in factors if name not in row]
        rng.shuffle(rest)
        for name in rest:
            values = [value for value in factors[name] if allowed({**row, name: value})]
            gains = {value: gained({**row, name: value}, name) for value in values}
            best = max(gains.values())
            row[name] = rng.choice([value for value in values if gains[value] == best])
            score += best
        return score, row

    rows = []
    while missing:
        start = next(iter(missing))
        _, row = max((attempt(start) for _ in range(TRIES)), key=lambda found: found[0])
        row = {name: row[name] for name in factors}
        rows.append(row)
        for key in combinations(row.items(), strength):
            missing.pop(key, None)
    return rows


def settings(seed: int, strength: int = 3) -> list[Setting]:
    """The matrix, kernel by kernel: disorder of every kind, and (pairwise) none at all."""
    orderly = {name: values[:1] if values[0] == 0 else values for name, values in FACTORS.items()}
    rows = [Setting(**row) for row in (*cover(orderly, 2, seed, possible), *cover(FACTORS, strength, seed, possible))]
    return sorted(rows, key=lambda setting: FACTORS["kernel"].index(setting.kernel))
