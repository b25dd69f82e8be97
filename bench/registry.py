"""What can be measured: groups of arms, each in a file of its own, and what they share.

A group is a function that takes a `Session` and yields `Measured` values as it gets them; adding one is a file with a
`GROUP`, and its name in `groups`. Goals and anchors of its figures stand in goals.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final, TypeVar

from testbed.setup import Assets, prepare
from testbed.stages import say

STEADY: Final = 0.10  # a control arm may vary by that much
T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """One figure: a sample per round; `control` are the control arm's samples of the same rounds, if there is one."""

    name: str
    unit: str
    samples: Sequence[float]
    control: Sequence[float] = ()
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def value(self) -> float:
        """The median."""
        return median(self.samples)

    @property
    def spread(self) -> float:
        """Largest minus smallest sample, in the figure's unit."""
        return max(self.samples) - min(self.samples)

    @property
    def control_variation(self) -> float | None:
        """How much the control arm varied: largest minus smallest, over the median. None without one."""
        if not self.control:
            return None
        middle = median(self.control)
        width = max(self.control) - min(self.control)
        return width / middle if middle else float(width > 0)

    @property
    def unsteady(self) -> bool:
        """Whether the control arm varied too much for this figure to count."""
        return (self.control_variation or 0.0) > STEADY


def interleaved(arms: Mapping[str, Callable[[int], T]], rounds: int) -> dict[str, list[T]]:
    """Run A B C A B C ...: what every arm returned, by round. An arm is given the round's number, from 0."""
    results: dict[str, list[T]] = {name: [] for name in arms}
    for number in range(rounds):
        for name, arm in arms.items():
            results[name].append(arm(number))
    return results


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(over, under, strict=True)]


@dataclass
class Session:
    """One run of the benchmark."""

    smoke: bool = False  # seconds instead of minutes, and nothing claimed
    full: bool = False
    say: Callable[[str], None] = say
    assets: Assets | None = None  # the guest's parts, once one was wanted
    _stack: ExitStack = field(default_factory=ExitStack)
    _open: tuple[object, Any] | None = None

    def rounds(self, usual: int = 3) -> int:
        """How often to repeat each arm."""
        return 1 if self.smoke else max(7, usual) if self.full else usual

    def scaled(self, usual: int, smoke: int) -> int:
        """A size: the usual one or the smoke test's."""
        return smoke if self.smoke else usual

    def guest(self, opened: Callable[[Assets], AbstractContextManager[T]]) -> T:
        """The guest that `opened` makes. It stays until a group wants another one: never two at a time."""
        if self._open is None or self._open[0] != opened:
            self.close()
            self.assets = prepare()
            self.say(f"booting the guest: {self.assets.summary}")
            self._open = opened, self._stack.enter_context(opened(self.assets))
        guest: T = self._open[1]
        return guest

    def close(self) -> None:
        """End the guest, if there is one."""
        self._open = None
        self._stack.close()


@dataclass(frozen=True)
class Group:
    """`kind` says what stands behind its figures: "simulation", "device" (no guest) or "guest"."""

    name: str
    kind: str
    about: str
    measure: Callable[[Session], Iterator[Measured]]
    only_full: bool = False


def groups() -> tuple[Group, ...]:
    """All of them, in the order in which they run."""
    from bench import (
        device,
        guest_capacity,
        guest_recovery,
        guest_rx,
        guest_tx,
        simulated,
        speed_bulk,
        speed_loss,
        speed_many,
        speed_passt,
        speed_profile,
        speed_small,
    )

    return (
        simulated.GROUP,
        *device.GROUPS,
        *guest_rx.GROUPS,
        guest_recovery.GROUP,
        guest_tx.GROUP,
        guest_capacity.GROUP,
        speed_bulk.GROUP,
        speed_small.GROUP,
        speed_loss.GROUP,
        speed_many.GROUP,
        speed_profile.GROUP,
        speed_passt.GROUP,
    )
