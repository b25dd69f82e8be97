"""What bulk does not show: small packets, round trips, short connections, and how long it takes to begin with TLS.

`..._guest_bound` is the guest's own processor time for a connection with TLS in software over that with offload: what
would be left of the ratio if all outside the guest took no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Final

from bench.guest_capacity import installs
from bench.registry import Group, Measured, Session, interleaved, ratios
from bench.speed_bed import NIC, QEMU, Link, SpeedBed, speed_bed, used
from bench.speed_bulk import timing
from bench.speed_run import CIPHER, MARGIN, Look
from testbed.errors import BedError
from testbed.peers.flowkeys import FlowKeys
from tests.guest.conftest import wait_until
from tests.guest.exchange import BOTH

DATAGRAM: Final = 18  # bytes: an Ethernet frame of the least size
SMALL: Final = 100  # bytes, against
LARGE: Final = 10_000
SIZES: Final = {"tx": (LARGE, SMALL), "rx": (SMALL, LARGE)}  # bytes from the guest, and to it
LINKS: Final = {"nic": NIC, "qemu": QEMU}
MODES: Final = {"offload": True, "software": False}


def datagrams(session: Session, bed: SpeedBed, link: Link, number: int) -> float:
    """Datagrams of the guest per second that get to the wire."""
    time = timing(session)
    wire = {"do": "count_packets", "interface": link.tap, "warm": time.warm, "seconds": time.seconds}
    seconds = time.warm + time.seconds + MARGIN
    guest = {"do": "send_packets", "connect": [link.host, bed.wire.port], "size": DATAGRAM, "seconds": seconds}
    _, seen = bed.run(guest, wire)
    rate = float(seen["count"] / seen["seconds"])
    session.say(f"  round {number + 1}, datagrams by {link.interface}: {rate:,.0f}/s")
    return rate


def round_trip(session: Session, bed: SpeedBed, link: Link, number: int) -> float:
    """Microseconds, median, from the guest for one byte and back."""
    guest = {"do": "ask", "connect": [link.host, bed.wire.port], "seconds": timing(session).seconds}
    times, _ = bed.run(guest, {"do": "answer"})
    session.say(f"  round {number + 1}, round trip by {link.interface}: {1e6 * times['median']:.0f} us")
    return 1e6 * float(times["median"])


@dataclass(frozen=True)
class Connections:
    """Short ones, one after the other: how many `per_second`, and by process the microseconds that one takes of it."""

    per_second: float
    cpu: Mapping[str, float]


def small_transfers(bed: SpeedBed, direction: str, mode: str, seconds: float, number: int) -> Connections:
    """Connections with LARGE bytes in a direction, SMALL in the other, and TLS both ways."""
    for name in BOTH:
        bed.offload(name, MODES[mode])
    keys = FlowKeys.from_seed(CIPHER, f"small {direction} {mode} {number}").as_job(*BOTH)
    up, down = SIZES[direction]
    guest = {"do": "small", "connect": [NIC.host, bed.wire.port], "seconds": seconds, **keys}
    before, cpu = Look.at(bed, NIC), used(bed)
    found, served = bed.run(
        guest | {"up": up, "down": down}, {"do": "serve_small", "up": up, "down": down, "peer_keys": keys["keys"]}
    )
    cpu = {name: 1e6 * (now - cpu[name]) / found["count"] for name, now in used(bed).items()}
    wait_until(lambda: not bed.bed.nic.contexts(), "the device's contexts are gone")
    counted = Look.at(bed, NIC).since(before)
    where, other = ("Device", "Sw") if MODES[mode] else ("Sw", "Device")
    for name in ("Tx", "Rx"):
        if counted.tls[f"Tls{name}{where}"] != found["count"] or counted.tls[f"Tls{name}{other}"]:
            raise BedError(f"{mode}: {found['count']} connections, and the kernel says {dict(counted.tls)}")
    if found["count"] != served["count"] or counted.tls["TlsDecryptError"]:
        raise BedError(f"{mode}: {found['count']} connections, the wire has {served['count']}; {dict(counted.tls)}")
    return Connections(float(found["rate"]), cpu)


def short_connections(session: Session, bed: SpeedBed, direction: str, mode: str, number: int) -> Connections:
    """An arm: small_transfers, and a line about it."""
    found = small_transfers(bed, direction, mode, timing(session).seconds, number)
    session.say(f"  round {number + 1}, {LARGE} bytes {direction} per connection, {mode}: {found.per_second:.0f}/s")
    return found


def processes(outcomes: Sequence[Connections]) -> dict[str, float]:
    """Microseconds that a connection takes of each process, medians."""
    return {name: round(median(one.cpu[name] for one in outcomes), 1) for name in outcomes[0].cpu}


def install_times(session: Session, bed: SpeedBed, mode: str, number: int) -> float:
    """Microseconds that a socket needs for its two contexts; medians of both added."""
    for name in BOTH:
        bed.offload(name, MODES[mode])
    found = installs(bed.bed, session.scaled(200, 4), number, offloaded=MODES[mode])
    wait_until(lambda: not bed.bed.nic.contexts(), "the device's contexts are gone")
    latency = sum(found[f"{name}_install_latency"] for name in BOTH)
    session.say(f"  round {number + 1}, TLS_TX and TLS_RX, {mode}: {latency:.0f} us")
    return latency


def compared(
    figure: str, arms: tuple[str, str], unit: str, found: dict[str, list[float]], facts: Any
) -> list[Measured]:
    """The ratio of two arms, of which the second is the control, and both arms by themselves."""
    over, under = (found[name] for name in arms)
    result = [Measured(figure, "x", ratios(over, under), under, facts)]
    return result + [Measured(name, unit, found[name], details=facts) for name in arms]


def measure(session: Session) -> Iterator[Measured]:
    """The group."""
    bed = session.guest(speed_bed)
    facts = bed.facts()
    rounds = session.rounds()
    kinds: Sequence[tuple[str, str, Callable[..., float]]] = (
        ("udp_pps", "1/s", datagrams),
        ("rr_latency", "us", round_trip),
    )
    for name, unit, call in kinds:
        arms = {f"{name}_{link}": partial(call, session, bed, LINKS[link]) for link in LINKS}
        found = interleaved(arms, rounds)
        yield from compared(f"{name}_over_qemu", (f"{name}_nic", f"{name}_qemu"), unit, found, facts)
    for direction, name in (("tx", "small_transfer"), ("rx", "small_transfer_rx")):
        shorts = {f"{name}_{mode}": partial(short_connections, session, bed, direction, mode) for mode in MODES}
        results = interleaved(shorts, rounds)
        found = {arm: [one.per_second for one in outcomes] for arm, outcomes in results.items()}
        cpu = {arm: processes(outcomes) for arm, outcomes in results.items()}
        figure, pair = f"{name}_over_software", (f"{name}_offload", f"{name}_software")
        yield from compared(figure, pair, "1/s", found, {**facts, "cpu_us_per_connection": cpu})
        busy = {arm: [one.cpu["vcpus"] for one in outcomes] for arm, outcomes in results.items()}
        yield Measured(f"{figure}_guest_bound", "x", ratios(busy[pair[1]], busy[pair[0]]), found[pair[1]], facts)
    arms = {f"install_time_{mode}": partial(install_times, session, bed, mode) for mode in MODES}
    found = interleaved(arms, rounds)
    names = "install_time_offload", "install_time_software"
    yield from compared("install_time_offload_over_software", names, "us", found, facts)


GROUP: Final = Group("speed-small", "guest", "datagrams, round trips, short connections, installation", measure)
