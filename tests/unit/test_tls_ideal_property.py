"""rx `ideal` under any disorder and any attacker: the kernel never takes a byte that the peer did not send there.

The attacker is on the path and knows everything but the keys. What the device sees, the kernel may refuse (a stale
timestamp is enough), and it may use either of two copies of a byte.
"""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nicdev.abi import Direction
from nicdev.tls.ideal import IdealContext
from nicdev.tls.rx import RxResult
from nicdev.tls.store import Pool
from tests.support.tls_link import decrypt
from tests.support.tls_oracle import SUITES, Stream, Suite, stream
from tests.support.tls_path import Kernel

BASE = 0xFFFFFF00


class Flow:
    """A stream, a context, and the kernel behind it."""

    def __init__(self, records: Stream, rx: IdealContext, rng: random.Random) -> None:
        self.records = records
        self.rx = rx
        self.rng = rng
        self.kernel = Kernel(records.suite, records.first_number, len(records.wire))
        self.asked: set[int] = set()
        self.answers: list[tuple[int, int]] = []
        self.drops = 0

    def packet(self, at: int, data: bytes, *, refuse: bool = False, later: bool = False) -> RxResult:
        """A packet arrives at the device and, unless refused, at the kernel."""
        buffer = bytearray(data)
        result = decrypt(self.rx, BASE + at, buffer)
        assert result.decrypted or buffer == data
        self.drops += result.drop
        if result.ask is not None:
            self.asked.add((result.ask - BASE) % 2**32)
        if not refuse and not result.drop:
            self.kernel.take(at, buffer, result.decrypted, later)
        self.answers += [header for header in self.kernel.headers if header[0] in self.asked]
        self.asked -= {place for place, _ in self.answers}
        return result

    def answer(self) -> None:
        """The driver posts what the kernel has answered."""
        for place, number in self.answers:
            self.rx.resync((BASE + place) % 2**32, number)
        self.answers.clear()

    def check(self) -> None:
        """All that was accepted is the truth."""
        truth = dict(zip(self.records.starts(), self.records.texts, strict=True))
        for place, text in self.kernel.texts:
            low, high = truth[place]
            clear = self.records.clear[low:high]
            assert text == clear, f"a wrong record at {place}"


def make(rng: random.Random, suite: Suite, sizes: list[int], *, no_sync: bool = False) -> Flow:
    records = stream(suite, sizes, seed=rng.randrange(1, 99))
    params = suite.params(Direction.RX, BASE, records.first_number, no_sync=no_sync)
    return Flow(records, IdealContext(params, pool=Pool()), rng)


def cuts(rng: random.Random, low: int, high: int) -> list[tuple[int, int]]:
    """low..high in up to 6 packets."""
    edges = sorted({low, high, *(rng.randrange(low, high) for _ in range(rng.randrange(6)))})
    return list(pairwise(edges))


def honest(flow: Flow) -> list[tuple[int, bytes]]:
    """A span of the stream, in packets."""
    wire = flow.records.wire
    low = flow.rng.randrange(len(wire))
    if flow.rng.random() < 0.5:
        low = flow.rng.choice(flow.records.starts())
    high = min(len(wire), low + flow.rng.choice((1, 5, 13, 40, 100, 300)))
    return [(a, wire[a:b]) for a, b in cuts(flow.rng, low, high)]


def moved(flow: Flow) -> list[tuple[int, bytes]]:
    """Records at another place than their own, where a record seems to end."""
    rng, records = flow.rng, flow.records
    starts = records.starts()
    first = rng.randrange(len(starts))
    last = min(len(starts) - 1, first + rng.randrange(3))
    part = records.wire[starts[first] : records.ends[last]]
    place = rng.choice(starts)
    if rng.random() < 0.3:
        place = rng.choice(starts) + records.ends[first] - starts[first]
    return [(place + a, part[a:b]) for a, b in cuts(rng, 0, len(part))]


def forged(flow: Flow) -> list[tuple[int, bytes]]:
    """A header with another length, true otherwise; or flipped bits."""
    rng, records = flow.rng, flow.records
    starts = records.starts()
    if rng.random() < 0.6:
        index = rng.randrange(len(starts))
        place = starts[index]
        end = rng.choice(records.ends)
        head = bytearray(records.wire[place : min(place + rng.choice((5, 13, 40)), len(records.wire))])
        if len(head) >= 5 and place + 5 < end:
            head[3:5] = (min(end - place - 5, 16000)).to_bytes(2, "big")
        return [(place, bytes(head))]
    return [(at, bytes(b ^ (rng.random() < 0.1) for b in data)) for at, data in honest(flow)]


def finish(flow: Flow, rounds: int = 40) -> None:
    """TCP gets everything through in the end."""
    wire = flow.records.wire
    for _ in range(rounds):
        flow.answer()
        at = flow.kernel.have.find(0, 0, len(wire))
        if at < 0:
            return
        step = flow.rng.choice((7, 64, 200))
        while at < len(wire):
            flow.packet(at, wire[at : at + step])
            flow.answer()
            at += step


def disorder(rng: random.Random, flow: Flow, rounds: int, actions: list[object]) -> None:
    for _ in range(rounds):
        packets = rng.choice(actions)(flow)  # type: ignore[operator]
        if rng.random() < 0.5:
            rng.shuffle(packets)
        for at, data in packets:
            if rng.random() > 0.15:
                flow.packet(at, data, refuse=rng.random() < 0.2, later=rng.random() < 0.3)
        if rng.random() < 0.3:
            flow.answer()


def in_sequence(flow: Flow) -> list[tuple[int, bytes]]:
    """What comes next, mostly."""
    at = flow.kernel.have.find(0, 0, len(flow.records.wire)) if flow.rng.random() < 0.7 else flow.kernel.at
    at = max(at, 0) + flow.rng.choice((0, 0, 0, 13, 40))
    wire = flow.records.wire[at : at + flow.rng.choice((20, 60, 200))]
    return [(at + a, wire[a:b]) for a, b in cuts(flow.rng, 0, len(wire))] if wire else []


def sizes(rng: random.Random) -> list[int]:
    same = rng.choice((0, 11, 40))
    odd = rng.choice((0, 0.3))
    return [same if rng.random() >= odd else rng.randrange(80) for _ in range(rng.randrange(3, 14))]


def run_attack(seed: int, suite: Suite) -> Flow:
    rng = random.Random(seed)
    flow = make(rng, suite, sizes(rng), no_sync=rng.random() < 0.15)
    disorder(rng, flow, rng.randrange(2, 25), [honest, in_sequence, in_sequence, moved, forged])
    flow.check()
    finish(flow, 3)
    flow.check()
    return flow


def run_honest(seed: int, suite: Suite) -> Flow:
    rng = random.Random(seed)
    flow = make(rng, suite, sizes(rng), no_sync=rng.random() < 0.15)
    disorder(rng, flow, rng.randrange(2, 25), [honest, in_sequence, in_sequence])
    finish(flow)
    flow.check()
    assert not flow.kernel.dead
    assert len(flow.kernel.texts) == len(flow.records.ends)
    assert not flow.drops
    return flow


@settings(max_examples=400, deadline=None)
@given(seed=st.integers(0, 2**32), suite=st.sampled_from(SUITES))
@pytest.mark.conformance(4)
def test_no_attacker_gets_a_wrong_byte_accepted(seed: int, suite: Suite) -> None:
    run_attack(seed, suite)


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), suite=st.sampled_from(SUITES))
@pytest.mark.conformance(23)
@pytest.mark.conformance(86)
def test_disorder_alone_never_harms(seed: int, suite: Suite) -> None:
    """Every stream completes, and no packet is dropped."""
    run_honest(seed, suite)
