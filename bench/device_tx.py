"""What the NIC does by itself: plain frames and TLS records out of a tx ring, at the hands of a synthetic driver.

A round of an arm is a run of some tenths of a second in pieces of some milliseconds. Its sample is the fastest piece:
what others do on the machine only ever makes a piece slower. The mean over all pieces stands beside it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from statistics import harmonic_mean
from typing import Final

from bench.evp import Evp, call_rate
from bench.proof import check_flows, check_stream
from bench.registry import Group, Measured, Session, interleaved, ratios
from bench.rig import Processors, Rig, Run, Shape
from bench.work import SEALED, TEXT, TSO, stream_lap

# packets to a lap of 2 MB, TCP payload of each: as TSO cuts, whole records, one record
HOT: Final = {"tso": (32, TSO), "whole": (32, 3 * SEALED), "record": (128, SEALED)}
RING: Final = 256
STREAMING: Final = 4096  # packets of a lap of 267 MB
SAMPLE: Final = 32  # frames that are opened after each run
ROUNDS: Final = 5


def gbit(packets_per_second: float, payload: int) -> float:
    """Text encrypted per second, in Gbit."""
    return packets_per_second * payload / SEALED * TEXT * 8 / 1e9


def measured(name: str, unit: str, runs: Sequence[Run], scale: Callable[[float], float], **details: object) -> Measured:
    """A figure from a run per round; `scale` makes it of packets per second."""
    means = [round(scale(harmonic_mean(run.pieces)), 4) for run in runs]
    processor = [round(scale(run.by_processor), 4) for run in runs]
    kicks = [run.kicks for run in runs]
    details |= {"mean_of_each_round": means, "by_processor_time": processor, "kicks": kicks}
    return Measured(name, unit, [scale(max(run.pieces)) for run in runs], details=details)


def descriptors(session: Session) -> Iterator[Measured]:
    """64-byte frames."""
    count = session.scaled(400_000, 10_000)
    with Rig(Shape(RING, {"plain": {}})) as rig:
        runs = [rig.run("plain", count, count // 100) for _ in range(session.rounds(ROUNDS))]
    yield measured("descriptors_mpps", "M/s", runs, lambda rate: rate / 1e6, frame_bytes=64, ring=RING)


class StreamArm:
    """Records of one flow through a rig of its own; what left is opened after every run."""

    def __init__(self, stack: ExitStack, packets: int, payload: int, where: Processors | None = None) -> None:
        self.packets, self.payload = packets, payload
        self.records, size = stream_lap(packets, payload)
        works: dict[str, dict[str, int]] = {"commands": {}, "stream": {"payload": payload, "packets": packets}}
        shape = Shape(max(RING, packets), works, memory=size + (32 << 20))
        self.rig = stack.enter_context(Rig(shape, where))
        self.rig.run("add_tx", 1)
        self._laps = 0

    def run(self, laps: int, pieces: int) -> Run:
        """So many laps, in so many pieces."""
        count = laps * self.packets
        found = self.rig.run("stream", count, count // pieces, RING)
        frames = self.rig.record("stream", self.packets, SAMPLE)
        check_stream(frames, self._laps + laps, self.records)
        self._laps += laps + 1
        return found


def openssl_speed(seconds: int) -> float | None:
    """Bytes per second that the distribution's `openssl speed` tells for 16 KiB; None without that program."""
    if shutil.which("openssl") is None:
        return None
    command = ["openssl", "speed", "-seconds", str(seconds), "-evp", "aes-128-gcm", "-bytes", str(TEXT)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"AES-128-GCM\s+([\d.]+)k", said, re.IGNORECASE)
    return float(found[1]) * 1000 if found else None


def crypto(session: Session) -> Iterator[Measured]:
    """TLS records, hot, in packets of several sizes; beside the same libcrypto by itself."""
    evp, tries, calls = Evp(TEXT), session.scaled(50, 3), session.scaled(400, 20)
    alone: dict[str, Callable[[], float]] = {
        "evp": lambda: evp.rate(calls),
        "bulk": lambda: evp.rate(calls, records=False),
        "call": lambda: call_rate(TEXT, calls),
    }
    rates: dict[str, list[float]] = {name: [] for name in alone}
    runs: dict[str, list[Run]] = {name: [] for name in HOT}
    with ExitStack() as stack:
        arms = {name: StreamArm(stack, *shape) for name, shape in HOT.items()}
        for _ in range(session.rounds(ROUNDS)):
            for name, rate in alone.items():
                rates[name].append(8e-9 * max(rate() for _ in range(tries)))
            for name, arm in arms.items():
                runs[name].append(arm.run(session.scaled(128, 8), session.scaled(32, 4)))
    yield from _crypto_figures(rates, runs)
    if (openssl := openssl_speed(session.scaled(3, 1))) is not None:
        yield Measured("libcrypto_openssl_speed_gbit", "Gbit/s", [8e-9 * openssl])


def _crypto_figures(rates: Mapping[str, Sequence[float]], runs: Mapping[str, Sequence[Run]]) -> Iterator[Measured]:
    bits = {name: [gbit(max(run.pieces), HOT[name][1]) for run in runs[name]] for name in HOT}
    details = {"cipher": "AES-128-GCM", "record_bytes": TEXT}
    ours = ratios(bits["tso"], rates["evp"])
    yield Measured("device_crypto_over_evp", "ratio", ours, control=rates["evp"], details=details)
    yield Measured("device_crypto_over_evp_bulk", "ratio", ratios(bits["tso"], rates["bulk"]), details=details)
    yield Measured("device_crypto_over_call", "ratio", ratios(bits["tso"], rates["call"]), details=details)
    for name, called in (("whole", "whole_records"), ("record", "one_record")):
        figure = f"device_crypto_{called}_over_evp"
        yield Measured(figure, "ratio", ratios(bits[name], rates["evp"]), control=rates["evp"], details=details)
    yield measured("device_crypto_hot_gbit", "Gbit/s", runs["tso"], lambda rate: gbit(rate, TSO))
    for name, samples in rates.items():
        yield Measured(f"libcrypto_{name}_gbit", "Gbit/s", samples)


def streaming(session: Session) -> Iterator[Measured]:
    """Through more guest memory than any cache holds."""
    packets = session.scaled(STREAMING, 256)
    with ExitStack() as stack:
        arm = StreamArm(stack, packets, TSO)
        runs = [arm.run(session.scaled(3, 2), 16) for _ in range(session.rounds(ROUNDS))]
    memory = stream_lap(packets, TSO)[1]
    yield measured("device_crypto_gbit", "Gbit/s", runs, lambda rate: gbit(rate, TSO), memory_bytes=memory)


def flows(session: Session) -> Iterator[Measured]:
    """A record of 16 KiB to a packet: of one flow, of a random flow each, of random flows 8 packets in a row."""
    contexts, count = session.scaled(100_000, 500), session.scaled(20_000, 600)
    shape = Shape(RING, {"commands": {}, "flows": {"flows": contexts}}, max_contexts=1 << 17)
    with Rig(shape) as rig:
        rig.run("add_tx", contexts)
        first = rig.run("each", contexts, contexts // 20)  # a context's first packet makes what the others use

        def arm(order: str) -> Callable[[int], Run]:
            def run(_: int) -> Run:
                found = rig.run(order, count, count // 40)
                check_flows(rig.record(order, SAMPLE, SAMPLE))
                return found

            return run

        found = interleaved({order: arm(order) for order in ("one", "random", "bursts")}, session.rounds(ROUNDS))
    best = {order: [max(run.pieces) for run in runs] for order, runs in found.items()}
    details = {"contexts": contexts}
    for figure, order in (("cost_100k_flows_over_1", "random"), ("cost_100k_flows_burst8_over_1", "bursts")):
        yield Measured(figure, "ratio", ratios(best["one"], best[order]), control=best["one"], details=details)
    yield Measured("cost_first_record_over_later", "ratio", [max(best["one"]) / max(first.pieces)], details=details)


GROUPS: Final = (
    Group("device-plain", "device", "frames of 64 bytes out of a tx ring", descriptors),
    Group("device-crypto", "device", "TLS records out of a tx ring, and libcrypto by itself", crypto),
    Group("device-streaming", "device", "TLS records out of 256 MB of guest memory", streaming),
    Group("device-flows", "device", "TLS records of 100,000 flows", flows),
)
