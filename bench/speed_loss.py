"""Throughput under loss, of TLS by the NIC over plain TCP and over TLS by the guest's kernel.

The fault director loses segments of wire size (1448 bytes) between NIC and wire, in all arms: of packets of 64 KiB,
1 % would be forty-five times less. What it does not lose goes on in large packets, as a receiver would join it again
("joined"): if it cut all there is, the director would be what is measured. The seed of a round is the same for all.

Sixteen connections at once. The window of a single one is about a record at such loss, and then TLS into a Linux
socket, by whomever, waits for delayed acknowledgements: a record is read when all of it is there, and until something
is read the receiver does not acknowledge at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Final

from bench.registry import Group, Measured, Session, interleaved, ratios
from bench.speed_bed import SpeedBed, speed_bed
from bench.speed_bulk import absolute, timing, warm_up
from bench.speed_run import Arm, Outcome, Timing, transfer
from tests.guest.exchange import BOTH

RATES: Final = {"loss1": 0.01, "loss5": 0.05}
OVER: Final = ("plain", "software")  # what offload is compared with
CONNECTIONS: Final = 16
WRITE: Final = 1 << 18  # bytes
# the least share of bytes that the NIC must have done: what is repeated may be software's, and so are rx records whose
# header was lost
COVERED: Final = {"tx": 0.99, "rx": 0.75}


def longer(time: Timing) -> Timing:
    """Loss makes a rate that has to be averaged; ten seconds of sixteen connections do that."""
    return replace(time, seconds=min(2 * time.seconds, 10.0))


def arm(session: Session, bed: SpeedBed, name: str, what: Arm, number: int) -> Outcome:
    """One transfer under loss; `name` ends in the rate's."""
    rate = RATES[name.rpartition("_")[2]]
    scenario = f'seed = {number + 1}\n[{what.direction}]\nsegments = "joined"\ndrop = {rate}\n'
    with bed.bed.nic.faults(scenario):
        outcome = transfer(bed, what, longer(timing(session)), f"{name} {number}")
    session.say(f"  round {number + 1}, {name}: {1000 * outcome.gbit:.1f} Mbit/s")
    return outcome


def measure(session: Session) -> Iterator[Measured]:
    """The group."""
    bed = session.guest(speed_bed)
    arms = {
        f"{mode}_{direction}_{rate}": Arm(
            direction, mode, connections=CONNECTIONS, write=WRITE, covered=COVERED[direction]
        )
        for direction in BOTH
        for rate in RATES
        for mode in ("offload", *OVER)
    }
    warm_up(session, bed, arms)
    rounds = session.rounds()
    results = interleaved({name: partial(arm, session, bed, name, what) for name, what in arms.items()}, rounds)
    facts = bed.facts() | {"segments": "joined"}
    for direction in BOTH:
        for rate in RATES:
            gbit = {
                mode: [outcome.gbit for outcome in results[f"{mode}_{direction}_{rate}"]] for mode in ("offload", *OVER)
            }
            for mode in OVER:
                values = ratios(gbit["offload"], gbit[mode])
                yield Measured(f"{direction}_{rate}_offload_over_{mode}", "x", values, gbit["plain"], facts)
    yield from (absolute(name, outcomes, facts) for name, outcomes in results.items())


GROUP: Final = Group("speed-loss", "guest", "throughput at 1 % and 5 % loss: offload, plain TCP, software TLS", measure)
