"""Bulk throughput of one connection: plain TCP, TLS by the NIC, TLS by the guest's kernel, QEMU's own virtio-net.

Every figure is a ratio of two arms of the same round; each arm's absolute throughput is a figure too, with the
processor time it took and the packets it came in. The control arm is plain TCP through our NIC, in that
direction. Every arm has run once, shortly, before the first round.

The guest's processors take more time for a GB of kTLS than for one of plain TCP, whoever encrypts: `..._guest_bound` is
what that leaves of the ratio if everything outside the guest took no time at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, Final

from bench.registry import Group, Measured, Session, interleaved, ratios
from bench.speed_bed import QEMU, SpeedBed, speed_bed
from bench.speed_run import Arm, Outcome, Timing, transfer

ARMS: Final = {
    "plain_tx": Arm("tx"),
    "offload_tx": Arm("tx", "offload"),
    "qemu_tx": Arm("tx", link=QEMU),
    "software_tx": Arm("tx", "software"),
    "plain_rx": Arm("rx"),
    "offload_rx": Arm("rx", "offload"),
    "qemu_rx": Arm("rx", link=QEMU),
    "software_rx": Arm("rx", "software"),
    "plain_sendfile": Arm("tx", sendfile=True),
    "offload_sendfile": Arm("tx", "offload", sendfile=True),
}
SHORT: Final = Timing(0.05, 0.3)
# figure: the arm above and the arm below the line
RATIOS: Final = {
    "tx_offload_over_plain": ("offload_tx", "plain_tx"),
    "rx_offload_over_plain": ("offload_rx", "plain_rx"),
    "sendfile_offload_over_plain": ("offload_sendfile", "plain_sendfile"),
    "tx_offload_over_software": ("offload_tx", "software_tx"),
    "rx_offload_over_software": ("offload_rx", "software_rx"),
    "plain_tx_over_qemu": ("plain_tx", "qemu_tx"),
    "plain_rx_over_qemu": ("plain_rx", "qemu_rx"),
}


def control(name: str) -> str:
    """The control arm of an arm: plain TCP by our NIC, of the same kind of transfer."""
    return f"plain_{name.partition('_')[2]}"


def timing(session: Session) -> Timing:
    """How long an arm takes."""
    if session.smoke:
        return SHORT
    return Timing(1.0, 10.0) if session.full else Timing()


def warm_up(session: Session, bed: SpeedBed, arms: Mapping[str, Arm]) -> None:
    """Let everything be loaded, translated and connected once."""
    for name, what in () if session.smoke else arms.items():
        transfer(bed, what, SHORT, f"{name} warming up")


def arm(session: Session, bed: SpeedBed, name: str, what: Arm, number: int) -> Outcome:
    """One transfer, and a line about it."""
    outcome = transfer(bed, what, timing(session), f"{name} {number}")
    session.say(f"  round {number + 1}, {name}: {outcome.gbit:.2f} Gbit/s, {outcome.cpu_per_gb:.2f} s/GB")
    return outcome


def absolute(name: str, outcomes: Sequence[Outcome], facts: Mapping[str, Any]) -> Measured:
    """An arm's own throughput; beside it the medians of what it took."""
    details: dict[str, Any] = dict(facts)
    for process in outcomes[0].cpu:
        per_gb = median(outcome.cpu[process] / outcome.gigabytes for outcome in outcomes)
        details[f"cpu_seconds_per_gb_{process}"] = round(per_gb, 3)
    for counter in outcomes[0].counts:
        details[counter] = round(median(outcome.counts[counter] for outcome in outcomes), 2)
    return Measured(f"{name}_gbit", "Gbit/s", [outcome.gbit for outcome in outcomes], details=details)


def _vcpu_seconds(outcomes: Sequence[Outcome]) -> list[float]:
    """What a GB took of the guest's own processors."""
    return [outcome.cpu["vcpus"] / outcome.gigabytes for outcome in outcomes]


def figures(results: Mapping[str, Sequence[Outcome]], facts: Mapping[str, Any]) -> Iterator[Measured]:
    """All figures of the arms' outcomes by round."""
    gbit = {name: [outcome.gbit for outcome in outcomes] for name, outcomes in results.items()}
    for figure, (over, under) in RATIOS.items():
        details = {f"{name}_gbit": [round(value, 3) for value in gbit[name]] for name in (over, under)}
        yield Measured(figure, "x", ratios(gbit[over], gbit[under]), gbit[control(over)], {**facts, **details})
    cpu = {
        mode: [a.cpu_per_gb + b.cpu_per_gb for a, b in zip(results[f"{mode}_tx"], results[f"{mode}_rx"], strict=True)]
        for mode in ("offload", "plain", "software")
    }
    for under in ("plain", "software"):
        values = ratios(cpu["offload"], cpu[under])
        yield Measured(f"cpu_per_gb_offload_over_{under}", "x", values, gbit["plain_tx"], facts)
    for figure, (over, under) in RATIOS.items():
        if figure.endswith("offload_over_plain"):
            bound = ratios(_vcpu_seconds(results[under]), _vcpu_seconds(results[over]))
            yield Measured(f"{figure}_guest_bound", "x", bound, gbit[control(over)], facts)
    for name, outcomes in results.items():
        yield absolute(name, outcomes, facts)


def measure(session: Session) -> Iterator[Measured]:
    """The group."""
    bed = session.guest(speed_bed)
    facts = bed.facts()
    warm_up(session, bed, ARMS)
    arms = {name: partial(arm, session, bed, name, what) for name, what in ARMS.items()}
    yield from figures(interleaved(arms, session.rounds()), facts)


GROUP: Final = Group("speed", "guest", "throughput: offload, plain TCP, software TLS, QEMU's own NIC", measure)
