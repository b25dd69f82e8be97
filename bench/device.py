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
from bench.rig import Rig, Shape
from bench.work import SEALED, TEXT, TSO, stream_lap

HOT: Final = {"tso": (32, TSO), "record": (128, SEALED)}  # packets to a lap of 2 MB, TCP payload of each
STREAMING: Final = 4096  # packets of a lap of 267 MB
SAMPLE: Final = 32  # frames that are opened after each run
ROUNDS: Final = 5


def gbit(packets_per_second: float, payload: int) -> float:
    """Text encrypted per second, in Gbit."""
    return packets_per_second * payload / SEALED * TEXT * 8 / 1e9


def measured(
    name: str, unit: str, runs: Sequence[Sequence[float]], scale: Callable[[float], float], **details: object
) -> Measured:
    """A figure from the rates of the pieces of each round."""
    means = [round(scale(harmonic_mean(run)), 4) for run in runs]
    return Measured(name, unit, [scale(max(run)) for run in runs], details={**details, "mean_of_each_round": means})


def descriptors(session: Session) -> Iterator[Measured]:
    """64-byte frames."""
    count = session.scaled(400_000, 10_000)
    with Rig(Shape(256, {"plain": {}})) as rig:
        runs = [rig.run("plain", count, count // 40) for _ in range(session.rounds(ROUNDS))]
    yield measured("descriptors_mpps", "M/s", runs, lambda rate: rate / 1e6, frame_bytes=64, ring=256)


class StreamArm:
    """Records of one flow through a rig of its own; what left is opened after every run."""

    def __init__(self, stack: ExitStack, packets: int, payload: int) -> None:
        self.packets, self.payload = packets, payload
        self.records, size = stream_lap(packets, payload)
        shape = Shape(packets, {"commands": {}, "stream": {"payload": payload}}, memory=size + (32 << 20))
        self.rig = stack.enter_context(Rig(shape))
        self.rig.run("add_tx", 1, 1)
        self._laps = 0

    def run(self, laps: int, pieces: int) -> list[float]:
        """So many laps, in so many pieces; packets per second of each piece."""
        count = laps * self.packets
        rates = self.rig.run("stream", count, count // pieces, min(self.packets, 256))
        frames = self.rig.record("stream", self.packets, SAMPLE)
        check_stream(frames, self._laps + laps, self.records)
        self._laps += laps + 1
        return rates


def openssl_speed(seconds: int) -> float | None:
    """Bytes per second that the distribution's `openssl speed` tells for 16 KiB; None without that program."""
    if shutil.which("openssl") is None:
        return None
    command = ["openssl", "speed", "-seconds", str(seconds), "-evp", "aes-128-gcm", "-bytes", str(TEXT)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"AES-128-GCM\s+([\d.]+)k", said, re.IGNORECASE)
    return float(found[1]) * 1000 if found else None


def crypto(session: Session) -> Iterator[Measured]:
    """TLS records, hot: in packets as TSO makes them, and one to a packet; beside the same libcrypto by itself."""
    evp, tries, calls = Evp(TEXT), session.scaled(50, 3), session.scaled(400, 20)
    laps, pieces = session.scaled(128, 8), session.scaled(32, 4)
    with ExitStack() as stack:
        streams = {name: StreamArm(stack, *shape) for name, shape in HOT.items()}
        arms: dict[str, Callable[[int], list[float]]] = {
            "evp": lambda _: [evp.rate(calls) for _ in range(tries)],
            "bulk": lambda _: [evp.rate(calls, records=False) for _ in range(tries)],
            "call": lambda _: [call_rate(TEXT, calls) for _ in range(tries)],
            **{name: lambda _, arm=arm: arm.run(laps, pieces) for name, arm in streams.items()},  # type: ignore[misc]
        }
        found = interleaved(arms, session.rounds(ROUNDS))
    best = {name: [max(rates) for rates in runs] for name, runs in found.items()}
    yield from _crypto_figures(best, found, openssl_speed(session.scaled(3, 1)))


def _crypto_figures(
    best: Mapping[str, Sequence[float]], found: Mapping[str, Sequence[Sequence[float]]], openssl: float | None
) -> Iterator[Measured]:
    bits = {name: [gbit(rate, HOT[name][1]) for rate in best[name]] for name in HOT}
    by_itself = {name: [rate * 8 / 1e9 for rate in best[name]] for name in ("evp", "bulk", "call")}
    details = {"cipher": "AES-128-GCM", "record_bytes": TEXT, "evp_gbit": max(by_itself["evp"])}
    yield Measured("device_crypto_over_evp", "ratio", ratios(bits["tso"], by_itself["evp"]), details=details)
    yield Measured("device_crypto_one_record_over_evp", "ratio", ratios(bits["record"], by_itself["evp"]))
    yield Measured("device_crypto_over_evp_bulk", "ratio", ratios(bits["tso"], by_itself["bulk"]))
    yield Measured("device_crypto_over_call", "ratio", ratios(bits["tso"], by_itself["call"]))
    if openssl is not None:
        yield Measured("device_crypto_over_openssl_speed", "ratio", [rate * 1e9 / 8 / openssl for rate in bits["tso"]])
    for name, payload in (("tso", TSO), ("record", SEALED)):
        figure = "device_crypto_hot_gbit" if name == "tso" else "device_crypto_one_record_gbit"
        yield measured(figure, "Gbit/s", found[name], lambda rate, payload=payload: gbit(rate, payload))  # type: ignore[misc]
    for name in ("evp", "bulk", "call"):
        yield Measured(f"libcrypto_{name}_gbit", "Gbit/s", by_itself[name])


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
    shape = Shape(128, {"commands": {}, "flows": {"flows": contexts}}, max_contexts=1 << 17)
    with Rig(shape) as rig:
        rig.run("add_tx", contexts, contexts)

        def arm(order: str) -> Callable[[int], list[float]]:
            def run(_: int) -> list[float]:
                rates = rig.run(order, count, count // 10)
                check_flows(rig.record(order, SAMPLE, SAMPLE))
                return rates

            return run

        found = interleaved({order: arm(order) for order in ("one", "random", "bursts")}, session.rounds(ROUNDS))
    best = {order: [max(rates) for rates in runs] for order, runs in found.items()}
    details = {"contexts": contexts}
    yield Measured("cost_100k_flows_over_1", "ratio", ratios(best["one"], best["random"]), details=details)
    yield Measured("cost_100k_flows_burst8_over_1", "ratio", ratios(best["one"], best["bursts"]), details=details)


GROUPS: Final = (
    Group("device-plain", "device", "frames of 64 bytes out of a tx ring", descriptors),
    Group("device-crypto", "device", "TLS records out of a tx ring, and libcrypto by itself", crypto),
    Group("device-streaming", "device", "TLS records out of 256 MB of guest memory", streaming),
    Group("device-flows", "device", "TLS records of 100,000 flows", flows),
)
