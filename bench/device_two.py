"""Two NIC processes on two processors, a queue pair and a driver each: what one host can encrypt.

The drivers have no processor to themselves here: they sleep until half of what is posted was used.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import Final

from bench.child import Child, Talk
from bench.device_tx import ROUNDS, StreamArm, gbit
from bench.registry import Group, Measured, Session
from bench.rig import Processors
from bench.work import TSO

PACKETS: Final = 32
WINDOWS: Final = 10
Mark = tuple[int, int]  # packets so far, time in ns


def stream(talk: Talk, processor: int, laps: int, rounds: int) -> None:
    """One of the two: in each round, the marks of so many laps."""
    with ExitStack() as stack:
        arm = StreamArm(stack, PACKETS, TSO, Processors(processor, None))
        for _ in range(rounds):
            talk.tell("ready")
            talk.wait()
            talk.tell(arm.run(laps, laps).marks)


def together(marks: Sequence[Sequence[Mark]], windows: int = WINDOWS) -> list[float]:
    """Packets per second of all processes in each of `windows` equal parts of the time in which all were at work."""
    began, ended = max(run[0][1] for run in marks), min(run[-1][1] for run in marks)
    edges = [began + (ended - began) * n // windows for n in range(windows + 1)]
    return [
        1e9 * sum(_packets(run, after) - _packets(run, before) for run in marks) / (after - before)
        for before, after in pairwise(edges)
    ]


def _packets(marks: Sequence[Mark], at: int) -> float:
    """How many packets a process had done at a time between its first and its last mark."""
    index = min(bisect_right(marks, at, key=lambda mark: mark[1]), len(marks) - 1)
    (done, since), (later, until) = marks[index - 1], marks[index]
    return done + (later - done) * (at - since) / (until - since)


def measure(session: Session) -> Iterator[Measured]:
    """The sum of what both encrypt, hot."""
    usable = sorted(os.sched_getaffinity(0))
    rounds, laps = session.rounds(ROUNDS), session.scaled(400, 16)
    samples, means = [], []
    with ExitStack() as stack:
        children = [
            stack.enter_context(
                Child("bench.device_two:stream", processor=processor, laps=laps, rounds=rounds),
            )
            for processor in (usable[0], usable[-1])
        ]
        for _ in range(rounds):
            for child in children:
                child.hear()
            for child in children:
                child.go_on()
            rates = together([child.hear() for child in children])
            samples.append(gbit(max(rates), TSO))
            means.append(round(gbit(sum(rates) / len(rates), TSO), 4))
    details = {"processes": 2, "processors": len(set(usable)), "mean_of_each_round": means}
    yield Measured("device_crypto_gbit_two", "Gbit/s", samples, details=details)


GROUP: Final = Group("device-two", "device", "TLS records out of two tx rings, a process each", measure)
