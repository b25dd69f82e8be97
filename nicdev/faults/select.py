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

Stream = tuple[bytes, int, bytes, int]  # source, destination, each an address and a port
_FRESH_STREAMS: Final = 65536  # streams whose last byte is remembered
_HALF: Final = 1 << 31


def stream_of(frame: Frame) -> Stream:
    """The stream that a segment is of."""
    return frame.src, frame.sport, frame.dst, frame.dport


class Sight(NamedTuple):
    """A segment on its way, as far as it differs from others of its packet."""

    flow: Flow | None
    at: int  # position of its payload in the flow; 0 where that is not followed
    length: int  # bytes of TCP payload
    fresh: bool  # it has bytes that were not seen before


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

    def fits_packet(self, frame: Frame | None, flow: Flow | None, local: Endpoint, remote: Endpoint) -> bool:
        """Whether the rule is about such packets of this flow; the segments of one packet are all alike in that."""
        return self.is_kind(frame) and self.fits_flow(flow, local, remote)

    def fits(self, sight: Sight) -> bool:
        """Whether a segment of a packet that fits is one the rule is about."""
        return (sight.fresh or self.rule.repeats_too) and self.span(sight) is not None

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
    """Which segments of TCP streams bring new bytes."""

    def __init__(self) -> None:
        self._ends: dict[Stream, int] = {}

    def stale(self, frame: Frame, stream: Stream) -> int:
        """How much of a packet's payload its stream has shown before: a segment of it that ends behind that is fresh.

        Below 0 where the packet begins behind what was shown. The packet has then been shown.
        """
        if frame.tcp_flags & 0x02:  # SYN: another connection
            self._ends.pop(stream, None)
            return -1
        length = frame.end - frame.payload
        seen = self._ends.get(stream)
        stale = -1 if seen is None else ((seen - frame.seq + _HALF) & 0xFFFFFFFF) - _HALF
        if length and length > stale:
            if len(self._ends) >= _FRESH_STREAMS:
                self._ends.clear()
            self._ends[stream] = (frame.seq + length) & 0xFFFFFFFF
        return stale
