"""Does a rule fit, and does it strike? The part of a rule that remembers.

Theory of operation: `fits` compares an address, `strikes` is asked once for everything that fits, in order. The draw
for the i-th is the i-th number of the rule's own generator, seeded from the scenario's seed, direction and name of the
rule; so decisions depend on the packets alone, never on time or on other rules.
"""

from __future__ import annotations

from random import Random
from typing import Final, NamedTuple

from nicdev.faults.flows import Flow
from nicdev.faults.scenario import Only, Rule, Scenario
from nicdev.tls.context import Endpoint
from nicdev.wire.frame import Frame

_FRESH_STREAMS: Final = 65536  # streams whose last byte is remembered


class Sight(NamedTuple):
    """A packet on its way, as rules see it."""

    frame: Frame | None  # None: no TCP
    local: Endpoint
    remote: Endpoint
    flow: Flow | None
    at: int  # position of its payload in the flow; 0 where that is not followed
    fresh: bool  # it has bytes that were not seen before

    @property
    def length(self) -> int:
        """Bytes of TCP payload."""
        return self.frame.end - self.frame.payload if self.frame is not None else 0


class Selector:
    """One rule at work."""

    def __init__(self, rule: Rule, scenario: Scenario) -> None:
        self.rule = rule
        self.fitted = 0
        self.struck = 0
        name = f"{scenario.seed}/{rule.direction.name}/{rule.name}"
        self._draws = Random(name)
        self.choices = Random(f"{name}/choice")  # what a strike decides beyond itself

    def strikes(self) -> bool:
        """Something fits: does the rule act on it?"""
        rule = self.rule
        self.fitted += 1
        drawn = rule.rate is None or self._draws.random() < rule.rate
        if not drawn or self.fitted < rule.nth or (rule.limit is not None and self.struck >= rule.limit):
            return False
        self.struck += 1
        return True

    def is_kind(self, frame: Frame | None) -> bool:
        """Whether the rule looks at such packets at all."""
        only = self.rule.only
        if frame is None:
            return only is Only.ANY
        return only is not Only.DATA or frame.end > frame.payload

    def fits_flow(self, flow: Flow | None, local: Endpoint, remote: Endpoint) -> bool:
        """Whether the rule is about this flow."""
        rule = self.rule
        if rule.flow is not None and (flow is None or flow.number != rule.flow):
            return False
        return rule.local.fits(*local) and rule.remote.fits(*remote)

    def fits(self, sight: Sight) -> bool:
        """Whether the packet is one the rule is about."""
        if not self.is_kind(sight.frame) or not (sight.fresh or self.rule.repeats_too):
            return False
        return self.fits_flow(sight.flow, sight.local, sight.remote) and self.span(sight) is not None

    def span(self, sight: Sight) -> tuple[int, int] | None:
        """The bytes of the TCP payload [from, to) that the rule is about; None where it is about others."""
        rule = self.rule
        if rule.record is None and rule.seq is None:
            return 0, sight.length
        follower = sight.flow.follower if sight.flow is not None else None
        if follower is None:
            return None
        span = rule.seq or follower.span(rule.record or 0, rule.part, rule.byte)
        if span is None:
            return None
        low, high = max(span[0] - sight.at, 0), min(span[1] - sight.at, sight.length)
        return (low, high) if low < high else None

    def describe(self) -> dict[str, object]:
        """For control output."""
        rule = self.rule
        return {
            "name": rule.name,
            "action": str(rule.action),
            "direction": rule.direction.name.lower(),
            "fitted": self.fitted,
            "struck": self.struck,
        }


class Freshness:
    """Which packets of TCP streams bring new bytes."""

    def __init__(self) -> None:
        self._ends: dict[tuple[bytes, int, bytes, int], int] = {}

    def fresh(self, frame: Frame) -> bool:
        """Whether the segment goes beyond what its stream has shown."""
        key = (frame.src, frame.sport, frame.dst, frame.dport)
        end = (frame.seq + frame.end - frame.payload) & 0xFFFFFFFF
        if frame.tcp_flags & 0x02:  # SYN: another connection
            self._ends.pop(key, None)
            return True
        seen = self._ends.get(key)
        if seen is not None and (end - seen - 1) & 0xFFFFFFFF >= 1 << 31:
            return False
        if frame.end > frame.payload:
            if len(self._ends) >= _FRESH_STREAMS:
                self._ends.clear()
            self._ends[key] = end
        return True
