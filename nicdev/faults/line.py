"""One direction of the wire, with faults: packets in, packets out, `now` in seconds.

Theory of operation. A packet is taken for segments of wire size if the scenario says so, and each is shown to every
rule in the scenario's order. What they want is put together: a dropped packet is dropped and nothing else; else bits
are flipped, copies made, and all of it goes out or is held. Held packets wait for a time (delay), or until others of
the same stream have gone out past them and no longer than a timeout (reorder). What is held for a time leaves before
anything that comes later, so the order of what leaves depends on `now` only where time was asked for.

To judge a segment nobody needs its bytes, so it is made only where it has to leave by itself: always ("wire"), or where
a rule struck it or others overtake ("joined"). What is left between those leaves as it lies in the packet.

Nothing is lost without a count: a packet that cannot be held, since too many are, goes out at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import count
from typing import Final, NamedTuple

from nicdev.abi import Direction
from nicdev.faults.flows import Flow, Flows, Follower
from nicdev.faults.parcel import PLAIN, Parcel, Whole
from nicdev.faults.scenario import Action, Segments
from nicdev.faults.select import Freshness, Selector, Sight, Stream, stream_of
from nicdev.stats import Counter, Stats
from nicdev.wire import checksum, vnet
from nicdev.wire.frame import ETH_HLEN, Frame, parse

MAX_HELD: Final = 4096  # packets per direction
_NOBODY: Final = (b"", 0)
_new = tuple.__new__  # a NamedTuple from all its fields, at a third of the price of calling the class


class _Look(NamedTuple):
    """What is the same for all segments of a packet."""

    stream: Stream | None  # None: no TCP
    flow: Flow | None
    at: int  # position of its payload in the flow; 0 where that is not followed
    stale: int  # see Freshness
    rules: list[Selector]  # that such packets fit
    follower: Follower | None  # that is to be told of each segment before these rules judge it


class _Held:
    """A packet and its copies that wait; `left`: packets still to overtake, None where only time counts."""

    __slots__ = ("left", "parcels", "released", "selector", "stream")

    def __init__(self, parcels: list[Parcel], selector: Selector, stream: Stream | None) -> None:
        self.parcels = [Parcel(bytes(header), memoryview(bytearray(frame))) for header, frame in parcels]
        self.selector = selector
        self.stream = stream
        self.left = selector.rule.distance if selector.rule.action is Action.REORDER else None
        self.released = False


class Line:
    """One direction."""

    def __init__(
        self, direction: Direction, rules: Sequence[Selector], segments: Segments, flows: Flows, stats: Stats
    ) -> None:
        self._direction = direction
        self._rules = rules
        self._cuts = segments is not Segments.WHOLE
        self._joins = segments is Segments.JOINED
        # To the wire a checksum may stay open, as it was; what comes from a wire in segments has complete ones.
        self._partial = direction is Direction.TX or self._joins
        self._flows = flows
        self._stats = stats
        self._freshness = Freshness()
        self._due: list[tuple[float, int, _Held]] = []  # heap
        self._serials = count()
        self._overtaken: dict[Stream | None, list[_Held]] = {}
        self.held = 0  # packets, without copies

    def feed(self, header: bytes | memoryview, frame: memoryview, now: float) -> list[Parcel]:
        """One packet comes; what leaves now, in order. Parcels may lie in `frame`, and may be written to."""
        out = self.poll(now) if self._due else []
        whole = Whole(_new(Parcel, (header, frame)), parse(frame), self._cuts, self._partial)
        stream, flow, at, stale, rules, follower = self._look(whole)
        length, step = whole.length, whole.step
        joins = self._joins and whole.cut
        size = length or 1  # what has no payload is a segment too
        begin = pieces = 0  # where those that no rule touched begin; what became of the packet
        for low in range(0, size, step):
            high = min(low + step, length)
            if follower is not None:
                follower.feed(at + low, whole.payload(low, high))
            sight = _new(Sight, (flow, at + low, high - low, high > stale))
            striking = [selector for selector in rules if selector.fits(sight) and selector.strikes()]
            if joins and not striking and stream not in self._overtaken:
                continue
            if begin < low:
                out.append(whole.piece(begin, low))
                pieces += 1
            begin = low + step
            pieces += 1
            # The engine's verdict is about whole packets: behind a hole that may hide a record header it gets segments,
            # else it would leave more encrypted than on a wire.
            joins = joins and self._direction is Direction.TX
            if not striking and not self._overtaken:
                out.append(whole.piece(low, high))
            elif any(selector.rule.action is Action.DROP for selector in striking):
                self._stats.add(Counter.FAULT_DROPPED)
            else:
                self._act(whole.piece(low, high), sight, striking, now, out)
        if begin < size:
            out.append(whole.piece(begin, length) if begin else whole.parcel)
            pieces += 1
        if pieces > 1:
            self._stats.add(Counter.FAULT_CUT, pieces - 1)
        return out

    def poll(self, now: float) -> list[Parcel]:
        """What has waited long enough."""
        out: list[Parcel] = []
        while self._due and (self._due[0][2].released or self._due[0][0] <= now):
            held = heapq.heappop(self._due)[2]
            if not held.released:
                self._stats.add(Counter.FAULT_TIMED_OUT, held.left is not None)
                self._release(held, out)
        return out

    def deadline(self) -> float | None:
        """When to poll next, if nothing comes."""
        while self._due and self._due[0][2].released:
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None

    def flush(self) -> list[Parcel]:
        """Everything held, in the order in which it would have left; nothing is held any more."""
        out: list[Parcel] = []
        while self._due:
            held = heapq.heappop(self._due)[2]
            if not held.released:
                self._release(held, out)
        return out

    def _look(self, whole: Whole) -> _Look:
        """Look at a packet; whoever follows its stream is told, unless rules ask of single segments what they hold."""
        parsed, at, follower = whole.parsed, 0, None
        if parsed is None:
            rules = [selector for selector in self._rules if selector.fits_packet(None, None, _NOBODY, _NOBODY)]
            return _new(_Look, (None, None, 0, -1, rules, None))
        stream = stream_of(parsed)
        source, destination = (parsed.src, parsed.sport), (parsed.dst, parsed.dport)
        local, remote = (source, destination) if self._direction is Direction.TX else (destination, source)
        flow = self._flows.by_ends(self._direction, local, remote)
        rules = [selector for selector in self._rules if selector.fits_packet(parsed, flow, local, remote)]
        if flow is not None and flow.follower is not None and whole.length:
            follower = flow.follower
            at = follower.position(parsed.seq)
            if all(selector.rule.record is None for selector in rules):
                follower.feed(at, whole.payload(0, whole.length))
                follower = None
        return _new(_Look, (stream, flow, at, self._freshness.stale(parsed, stream), rules, follower))

    def _act(self, parcel: Parcel, sight: Sight, striking: Sequence[Selector], now: float, out: list[Parcel]) -> None:
        """A segment goes on: do to it what rules want, and let go what it overtakes."""
        parsed = parse(parcel.frame)
        stream = stream_of(parsed) if parsed is not None else None
        parcels = [parcel]
        keeper = None
        for selector in striking:
            action = selector.rule.action
            if action is Action.CORRUPT:
                parcels[0] = corrupt(selector, sight, parcels[0], parsed)
                self._stats.add(Counter.FAULT_CORRUPTED)
            elif action is Action.DUPLICATE:
                parcels.append(parcels[0])
                self._stats.add(Counter.FAULT_DUPLICATED)
            else:
                keeper = keeper or selector
        copies = [Parcel(header, memoryview(bytearray(frame))) for header, frame in [parcels[0]] * (len(parcels) - 1)]
        parcels = [parcels[0], *copies]
        if keeper is not None and self._hold(keeper, parcels, stream, now):
            return
        out += parcels
        self._overtake(stream, parsed, out)

    def _hold(self, selector: Selector, parcels: list[Parcel], stream: Stream | None, now: float) -> bool:
        """Keep a packet back; False where too many are."""
        if self.held >= MAX_HELD:
            self._stats.add(Counter.FAULT_HOLD_FULL)
            return False
        rule = selector.rule
        held = _Held(parcels, selector, stream)
        wait = rule.timeout_ms if held.left is not None else rule.ms or 0
        heapq.heappush(self._due, (now + wait / 1000, next(self._serials), held))
        if held.left is not None:
            self._overtaken.setdefault(stream, []).append(held)
        self._stats.add(Counter.FAULT_DELAYED if held.left is None else Counter.FAULT_REORDERED)
        self.held += 1
        return True

    def _overtake(self, stream: Stream | None, parsed: Frame | None, out: list[Parcel]) -> None:
        """A packet went out: those of its stream that it overtook may be next."""
        for held in list(self._overtaken.get(stream, ())):
            if held.left is not None and held.selector.is_kind(parsed):
                held.left -= 1
                if held.left <= 0:
                    self._release(held, out)

    def _release(self, held: _Held, out: list[Parcel]) -> None:
        held.released = True
        self.held -= 1
        if held.left is not None:
            waiting = self._overtaken[held.stream]
            waiting.remove(held)
            if not waiting:
                del self._overtaken[held.stream]
        out += held.parcels


def corrupt(selector: Selector, sight: Sight, parcel: Parcel, parsed: Frame | None) -> Parcel:
    """A copy with one bit flipped in what the rule is about; the TCP checksum then right, or wrong, as it says.

    A packet without TCP payload is hit anywhere behind its IP header, one without TCP behind its Ethernet header.
    """
    rule, choices = selector.rule, selector.choices
    header = parcel.header
    frame = bytearray(parcel.frame)
    if parsed is None:
        low, high = min(ETH_HLEN, len(frame) - 1), len(frame)
    elif not sight.length:
        low, high = parsed.l4, parsed.end
    else:
        first, last = selector.span(sight) or (0, sight.length)
        low, high = parsed.payload + first, parsed.payload + last
    partial = header[0] & vnet.VIRTIO_NET_HDR_F_NEEDS_CSUM
    if partial and not rule.fix_checksum:
        _, _, _, _, start, offset, _ = vnet.VNET_HDR.unpack_from(header)
        checksum.finish_partial(frame, start, offset)
    place = choices.randrange(low, high)
    bit = choices.randrange(8)
    frame[place] ^= 1 << (bit if rule.bit is None else rule.bit)
    if not rule.fix_checksum:
        header = PLAIN
    elif parsed is not None and not partial:
        checksum.fill_tcp(frame, parsed)
    return Parcel(header, memoryview(frame))
