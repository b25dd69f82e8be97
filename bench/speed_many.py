"""What is left of the throughput when 2,048 connections share it, with TLS by the NIC, over the same of plain TCP.

The guest writes 64 KiB to one connection after the other, which is the hardest order for anything that is kept per
connection: nothing is there twice in a row. By itself a guest of 1 GiB lets TCP have 83 MB, less than so many
connections hold; beyond that Linux resets one that is closed with something left to send.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

from bench.registry import Group, Measured, Session, interleaved, ratios
from bench.speed_bed import NIC, SpeedBed, speed_bed
from bench.speed_bulk import timing
from bench.speed_run import CIPHER, MARGIN, Arm, Look, check_firsts, prove
from testbed.peers.flowkeys import FlowKeys
from testbed.peers.speed import RECORD, SEALED_RECORD
from tests.guest.conftest import wait_until

MANY: Final = 2048
MODES: Final = ("plain", "offload")
TCP_MEM: Final = "65536 98304 131072"  # pages of 4 KiB: where pressure ends and begins, and the most
CLOSED: Final = 60.0  # seconds for all connections to be gone


@contextmanager
def enough_memory(bed: SpeedBed) -> Iterator[None]:
    """The guest's TCP may have half of its memory."""
    path = "/proc/sys/net/ipv4/tcp_mem"
    before = bed.bed.agent.get(path)
    bed.bed.agent.run(["sh", "-c", f"echo {TCP_MEM} > {path}"])
    try:
        yield
    finally:
        bed.bed.agent.run(["sh", "-c", f"echo {before.decode().strip()} > {path}"])


def many(session: Session, bed: SpeedBed, mode: str, count: int, number: int) -> float:
    """Gbit/s of plaintext out of the guest by `count` connections. Raises BedError if the wrong one did the TLS."""
    bed.offload("tx", mode == "offload")
    keys = FlowKeys.from_seed(CIPHER, f"{count} {mode} {number}")
    time = timing(session)
    guest: dict[str, Any] = {"do": "send_many", "connect": [NIC.host, bed.wire.port], "count": count}
    guest["seconds"] = time.warm + time.seconds + MARGIN
    wire: dict[str, Any] = {"do": "receive_many", "count": count, "warm": time.warm, "seconds": time.seconds}
    share = 1.0
    if mode == "offload":
        guest |= keys.as_job("tx")
        wire |= {"records": str(bed.wire.samples)}
        share = RECORD / SEALED_RECORD
    before = Look.at(bed, NIC)
    sent, received = bed.run(guest, wire)
    wait_until(lambda: not bed.bed.nic.contexts(), "the device's contexts are gone", CLOSED)
    prove(Arm("tx", mode, connections=count), sent["total"], Look.at(bed, NIC).since(before))
    if mode == "offload":
        check_firsts(bed.wire.samples.read_bytes(), received["samples"], keys.tx)
    gbit = 8e-9 * share * float(received["bytes"] / received["seconds"])
    session.say(f"  round {number + 1}, {count} connections, {mode}: {gbit:.2f} Gbit/s")
    return gbit


def measure(session: Session) -> Iterator[Measured]:
    """The group."""
    bed = session.guest(speed_bed)
    counts = 1, session.scaled(MANY, 16)
    arms = {f"{mode}_{count}": partial(many, session, bed, mode, count) for count in counts for mode in MODES}
    with enough_memory(bed):
        found = interleaved(arms, session.rounds())
    kept = {mode: ratios(found[f"{mode}_{counts[1]}"], found[f"{mode}_1"]) for mode in MODES}
    details = {name: [round(value, 3) for value in values] for name, values in found.items()}
    yield Measured("flows_2048_over_1", "x", ratios(kept["offload"], kept["plain"]), found["plain_1"], details)
    for mode in MODES:
        yield Measured(f"flows_2048_{mode}_gbit", "Gbit/s", found[f"{mode}_{counts[1]}"])


GROUP: Final = Group(
    "speed-many", "guest", "2,048 connections against one: offload, plain TCP", measure, only_full=True
)
