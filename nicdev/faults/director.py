"""The fault director: a scenario at work on one NIC.

Theory of operation: it stands between engine and port, so what it does to packets the engine never sees done; on tx
packets are encrypted before they come here. It follows the contexts of the NIC's table, has a `Line` per direction and
puts `DeviceFaults` into the NIC's command handling. Bytes and `now` come in, packets go out; the port around it
(edge/port_faulty.py) holds no rule. The same scenario with the same packets gives the same packets.
"""

from __future__ import annotations

from collections.abc import Callable

from nicdev.abi import Direction
from nicdev.faults.device import DeviceFaults, Faults
from nicdev.faults.flows import Flows
from nicdev.faults.line import Line
from nicdev.faults.parcel import Parcel
from nicdev.faults.scenario import WIRE_ACTIONS, Scenario, Segments
from nicdev.faults.select import Selector
from nicdev.stats import Stats
from nicdev.tls.table import ContextTable

DIRECTIONS = (Direction.TX, Direction.RX)


class Director:
    """Carries out `scenario`; the caller makes `flows` the observer of `table`, and gives `device` to the NIC."""

    def __init__(self, scenario: Scenario, table: ContextTable, stats: Stats, clock: Callable[[], float]) -> None:
        """`clock`: seconds, the same as `now` everywhere."""
        self.scenario = scenario
        self.flows = Flows(table)
        self._selectors = [Selector(rule, scenario) for rule in scenario.rules]
        at_work = [selector for selector in self._selectors if selector.rule.action not in WIRE_ACTIONS]
        self.device = DeviceFaults(at_work, self.flows, stats, clock) if at_work else Faults()
        # Where nothing is to be cut, judged or followed, packets need no look.
        cut = [d for d in DIRECTIONS if scenario.segments[d] is Segments.WIRE]
        self._looks = frozenset(d for d in DIRECTIONS if d in cut or self._wire_rules(d) or at_work)
        self._lines = {d: Line(d, self._wire_rules(d), scenario.segments[d], self.flows, stats) for d in DIRECTIONS}

    def _wire_rules(self, direction: Direction) -> list[Selector]:
        rules = [selector for selector in self._selectors if selector.rule.direction is direction]
        return [selector for selector in rules if selector.rule.action in WIRE_ACTIONS]

    def feed(self, direction: Direction, header: bytes | memoryview, frame: memoryview, now: float) -> list[Parcel]:
        """One packet comes (`header`: 12 bytes); what leaves now in its direction, in order."""
        if direction not in self._looks:
            return [Parcel(header, frame)]
        return self._lines[direction].feed(header, frame, now)

    def poll(self, now: float) -> list[tuple[Direction, Parcel]]:
        """What has waited long enough."""
        return [(direction, parcel) for direction in DIRECTIONS for parcel in self._lines[direction].poll(now)]

    def flush(self) -> list[tuple[Direction, Parcel]]:
        """Everything that is held."""
        return [(direction, parcel) for direction in DIRECTIONS for parcel in self._lines[direction].flush()]

    def deadline(self) -> float | None:
        """When `poll` has something to do, if nothing comes."""
        return min((due for line in self._lines.values() if (due := line.deadline()) is not None), default=None)

    def describe(self) -> dict[str, object]:
        """For control output."""
        return {
            "scenario": self.scenario.name,
            "seed": self.scenario.seed,
            "segments": {d.name.lower(): str(self.scenario.segments[d]) for d in DIRECTIONS},
            "held": {d.name.lower(): self._lines[d].held for d in DIRECTIONS},
            "rules": [selector.describe() for selector in self._selectors],
        }
