"""One direction of the wire, with faults: packets in, packets out, `now` in seconds.

Theory of operation. A packet is cut to wire size if the scenario says so, and shown to every rule in the scenario's
order. What they want is joined: a dropped packet is dropped and nothing else; else bits are flipped, copies made, and
all of it goes out or is held. Held packets wait for a time (delay), or until others of the same stream have gone out
past them and no longer than a timeout (reorder). What is held for a time leaves before anything that comes later, so
the order of what leaves depends on `now` only where time was asked for.

Nothing is lost without a count: a packet that cannot be held, since too many are, goes out at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import count
from typing import Final, NamedTuple

from nicdev.abi import Direction
from nicdev.faults.flows import Flows
from nicdev.faults.scenario import Action
from nicdev.faults.select import Freshness, Selector, Sight
from nicdev.stats import Counter, Stats
from nicdev.wire import checksum, segment, vnet
from nicdev.wire.frame import ETH_HLEN, TCP_CSUM_OFFSET, Frame, parse

MAX_HELD: Final = 4096  # packets per direction
MAX_PIECES: Final = 2048  # that a packet is cut into; one that would make more stays whole
_PLAIN: Final = bytes(vnet.VNET_HDR.size)
_NOBODY: Final = (b"", 0)
_Stream = tuple[bytes, int, bytes, int] | None


def _partial(parsed: Frame) -> bytes:
    """The header of a piece whose TCP checksum is as that of the whole was: left to whoever takes the packet."""
    flags = vnet.VIRTIO_NET_HDR_F_NEEDS_CSUM
    return vnet.VnetHdr(flags=flags, csum_start=parsed.l4, csum_offset=TCP_CSUM_OFFSET).pack()


class Parcel(NamedTuple):
    """A packet: 12-byte virtio_net_hdr and frame; the frame is writable."""

    header: bytes | memoryview
    frame: memoryview


class _Held:
    """A packet and its copies that wait; `left`: packets still to overtake, None where only time counts."""

    __slots__ = ("left", "parcels", "released", "selector", "stream")

    def __init__(self, parcels: list[Parcel], selector: Selector, stream: _Stream) -> None:
        self.parcels = [Parcel(bytes(header), memoryview(bytearray(frame))) for header, frame in parcels]
        self.selector = selector
        self.stream = stream
        self.left = selector.rule.distance if selector.rule.action is Action.REORDER else None
        self.released = False


class Line:
    """One direction."""

    def __init__(self, direction: Direction, rules: Sequence[Selector], wire: bool, flows: Flows, stats: Stats) -> None:
        self._direction = direction
        self._rules = rules
        self._wire = wire
        self._flows = flows
        self._stats = stats
        self._freshness = Freshness()
        self._due: list[tuple[float, int, _Held]] = []  # heap
        self._serials = count()
        self._overtaken: dict[_Stream, list[_Held]] = {}
        self.held = 0  # packets, without copies

    def feed(self, header: bytes | memoryview, frame: memoryview, now: float) -> list[Parcel]:
        """One packet comes; what leaves now, in order. Parcels may lie in `frame`, and may be written to."""
        out = self.poll(now)
        parsed = parse(frame)
        gso_size = vnet.VNET_HDR.unpack_from(header)[3] if header[1] else 0
        if self._wire and gso_size and parsed is not None and parsed.end - parsed.payload <= MAX_PIECES * gso_size:
            # To the wire a checksum may stay open, as it was; what comes from a wire has complete ones.
            partial = self._direction is Direction.TX and header[0] & vnet.VIRTIO_NET_HDR_F_NEEDS_CSUM
            pieces = segment.segment(frame, parsed, gso_size, bool(partial))
            self._stats.add(Counter.FAULT_CUT, len(pieces) - 1)
            plain = _partial(parsed) if partial else _PLAIN
            for piece in pieces:
                view = memoryview(piece)
                self._one(Parcel(plain, view), parse(view), now, out)
        else:
            self._one(Parcel(header, frame), parsed, now, out)
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

    def _sight(self, parcel: Parcel, parsed: Frame | None) -> Sight:
        """Look at a packet; whoever follows its stream is told."""
        if parsed is None:
            return Sight(None, _NOBODY, _NOBODY, None, 0, True)
        source, destination = (parsed.src, parsed.sport), (parsed.dst, parsed.dport)
        local, remote = (source, destination) if self._direction is Direction.TX else (destination, source)
        flow = self._flows.by_ends(self._direction, local, remote)
        at = 0
        if flow is not None and flow.follower is not None and parsed.payload < parsed.end:
            at = flow.follower.position(parsed.seq)
            flow.follower.feed(at, parcel.frame[parsed.payload : parsed.end])
        return Sight(parsed, local, remote, flow, at, self._freshness.fresh(parsed))

    def _one(self, parcel: Parcel, parsed: Frame | None, now: float, out: list[Parcel]) -> None:
        """Let all rules judge one packet, and do what they want."""
        sight = self._sight(parcel, parsed)
        striking = [selector for selector in self._rules if selector.fits(sight) and selector.strikes()]
        if not striking and not self._overtaken:
            out.append(parcel)
            return
        wanted = {selector.rule.action for selector in striking}
        if Action.DROP in wanted:
            self._stats.add(Counter.FAULT_DROPPED)
            return
        parcels = [parcel]
        keeper = None
        for selector in striking:
            action = selector.rule.action
            if action is Action.CORRUPT:
                parcels[0] = corrupt(selector, sight, parcels[0])
                self._stats.add(Counter.FAULT_CORRUPTED)
            elif action is Action.DUPLICATE:
                parcels.append(parcels[0])
                self._stats.add(Counter.FAULT_DUPLICATED)
            else:
                keeper = keeper or selector
        copies = [Parcel(header, memoryview(bytearray(frame))) for header, frame in [parcels[0]] * (len(parcels) - 1)]
        parcels = [parcels[0], *copies]
        stream = (parsed.src, parsed.sport, parsed.dst, parsed.dport) if parsed is not None else None
        if keeper is not None and self._hold(keeper, parcels, stream, now):
            return
        out += parcels
        self._overtake(stream, parsed, out)

    def _hold(self, selector: Selector, parcels: list[Parcel], stream: _Stream, now: float) -> bool:
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

    def _overtake(self, stream: _Stream, parsed: Frame | None, out: list[Parcel]) -> None:
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


def corrupt(selector: Selector, sight: Sight, parcel: Parcel) -> Parcel:
    """A copy with one bit flipped in what the rule is about; the TCP checksum then right, or wrong, as it says.

    A packet without TCP payload is hit anywhere behind its IP header, one without TCP behind its Ethernet header.
    """
    rule, choices = selector.rule, selector.choices
    header = parcel.header
    frame = bytearray(parcel.frame)
    parsed = sight.frame
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
        header = _PLAIN
    elif parsed is not None and not partial:
        checksum.fill_tcp(frame, parsed)
    return Parcel(header, memoryview(frame))
