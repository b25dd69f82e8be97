"""One measured transfer of the throughput figures, and the proof of who did its TLS.

Modes: "plain" TCP, "offload" (TLS by the NIC), "software" (kTLS of the guest's kernel). What must hold, else it fails:

* the kernel gave the socket's context to the device, or none to it, as the mode says (tls_stat), and saw no bad record;
* driver and device count all bytes in an offloaded arm, and no byte of TLS in any other;
* what arrived is what was sent, in samples: compared, or first opened by an independent decoder with its own keys.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bench.speed_bed import NIC, PATTERN, Link, SpeedBed, used
from testbed.errors import BedError
from testbed.peers.flowkeys import DirectionKeys, FlowKeys
from testbed.peers.speed import PERIOD, RECORD, SEALED_RECORD
from testbed.peers.speed_many import SEALED_WRITE, WRITE
from testbed.wire import tls12
from tests.guest.conftest import wait_until
from tests.guest.exchange import counters, difference

CIPHER: Final = "aes-128-gcm"
MARGIN: Final = 0.25  # seconds that a sender goes on after the receiver's window
_INTERRUPTS: Final = re.compile(r"^ *\S+: +((?:\d+ +)+).*virtio(\d+)-(?!config)", re.MULTILINE)


@dataclass(frozen=True)
class Timing:
    """Seconds: before the measured window, and of it."""

    warm: float = 0.4
    seconds: float = 2.5


@dataclass(frozen=True)
class Arm:
    """What is transferred: tx is guest to wire."""

    direction: str
    mode: str = "plain"
    link: Link = NIC
    sendfile: bool = False
    connections: int = 1
    write: int = PERIOD  # bytes at once
    covered: float = 0.99  # of all bytes: what TCP repeats, or finds out of order, may take another way

    @property
    def tls(self) -> bool:
        """Whether there are records on the wire."""
        return self.mode != "plain"


@dataclass(frozen=True)
class Outcome:
    """What one transfer gave; `cpu` in seconds by process, `counts` as the counters' differences."""

    gbit: float  # Gbit/s of plaintext
    gigabytes: float  # of plaintext in all, which `cpu` and `counts` belong to
    cpu: Mapping[str, float]
    counts: Mapping[str, float] = field(default_factory=dict)

    @property
    def cpu_per_gb(self) -> float:
        """Processor seconds of all that took part for 10^9 bytes."""
        return sum(seconds for name, seconds in self.cpu.items() if name != "machine") / self.gigabytes


def open_sample(data: bytes, keys: DirectionKeys, number: int) -> bytes:
    """The plaintext of whole records, of which the first has this number. Raises BedError at the first bad one."""
    aead, stream, found = AESGCM(keys.key), bytearray(data), bytearray()
    end = 0
    try:
        for record in tls12.records(stream, 0):
            explicit = stream[record.body : record.body + tls12.NONCE]
            sealed = stream[record.body + tls12.NONCE : record.end]
            aad = tls12.additional_data(keys.rec_seq + number, stream, record)
            found += aead.decrypt(keys.salt + explicit, bytes(sealed), aad)
            number, end = number + 1, record.end
    except (InvalidTag, tls12.NotTls) as error:
        raise BedError(f"record {number} on the wire is wrong: {error!r}") from None
    if end != len(data):
        raise BedError(f"record {number} on the wire is cut")
    return bytes(found)


def check_samples(data: bytes, samples: Sequence[tuple[int, int]], keys: DirectionKeys) -> None:
    """Samples, of which place in the stream and size (bytes) are given, must open to the pattern. Raises BedError."""
    if len(data) != sum(size for _, size in samples) or not data:
        raise BedError(f"{len(data)} bytes of {len(samples)} samples")
    at = 0
    for place, size in samples:
        found = open_sample(data[at : at + size], keys, place // SEALED_RECORD)
        at += size
        if found != PATTERN[: len(found)]:
            raise BedError(f"other bytes on the wire than were sent, behind byte {place}")


def check_firsts(data: bytes, numbers: Sequence[int], keys: DirectionKeys) -> None:
    """The same of the first SEALED_WRITE bytes of connections that have these numbers."""
    if len(data) != len(numbers) * SEALED_WRITE or not numbers:
        raise BedError(f"{len(data)} bytes of {len(numbers)} connections")
    for index, number in enumerate(numbers):
        if open_sample(data[index * SEALED_WRITE : (index + 1) * SEALED_WRITE], keys, 0) != PATTERN[:WRITE]:
            raise BedError(f"other bytes on the wire than were sent, in connection {number}")


def interrupts(text: str, device: str) -> int:
    """How many of the queues of a virtio device ("virtio3") /proc/interrupts tells of."""
    return sum(sum(map(int, found[1].split())) for found in _INTERRUPTS.finditer(text) if f"virtio{found[2]}" == device)


def jobs(bed: SpeedBed, arm: Arm, timing: Timing, keys: FlowKeys) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the program in the guest and of the one on the wire."""
    guest: dict[str, Any] = {"connect": [arm.link.host, bed.wire.port], "connections": arm.connections}
    wire: dict[str, Any] = {"connections": arm.connections}
    seconds = timing.warm + timing.seconds + MARGIN
    sender = {"do": "sendfile" if arm.sendfile else "send", "seconds": seconds, "write": arm.write}
    receiver = {"do": "receive", "warm": timing.warm, "seconds": timing.seconds}
    if arm.direction == "tx":
        guest |= sender
        wire |= receiver
    else:
        guest |= receiver | {"ask": True}
        wire |= sender | {"asked": True}
    if arm.tls:
        guest |= keys.as_job(arm.direction) | {"zerocopy": arm.sendfile}
        wire |= {"records": str(bed.wire.samples)} if arm.direction == "tx" else {"seal": keys.rx.as_json()}
    return guest, wire


@dataclass
class Look:
    """All that is counted at one time; after `since`, what was counted between."""

    tls: Counter[str]
    driver: Counter[str]
    nic: Counter[str]
    tcp: Counter[str]
    interrupts: int

    @classmethod
    def at(cls, bed: SpeedBed, link: Link) -> Look:
        """Now."""
        device = bed.bed.agent.run(["readlink", "-f", f"/sys/class/net/{link.interface}/device"]).text
        text = bed.bed.agent.get("/proc/interrupts").decode()
        return cls(*counters(bed.bed), interrupts(text, device.rpartition("/")[2].strip()))

    def since(self, before: Look) -> Look:
        """The differences."""
        return Look(
            difference(self.tls, before.tls),
            difference(self.driver, before.driver),
            difference(self.nic, before.nic),
            difference(self.tcp, before.tcp),
            self.interrupts - before.interrupts,
        )

    def per_megabyte(self, megabytes: float, link: Link) -> dict[str, float]:
        """What the way's efficiency shows in; packets and bytes are those between device and guest."""
        found = {"interrupts_per_mb": self.interrupts / megabytes}
        if link == NIC:
            for name in ("tx", "rx"):
                packets = self.nic[f"{name}_packets"]
                found[f"{name}_packets_per_mb"] = packets / megabytes
                found[f"{name}_packet_bytes"] = self.nic[f"{name}_bytes"] / max(packets, 1)
        return {**found, "retransmitted": float(self.tcp["TcpRetransSegs"])}


def transfer(bed: SpeedBed, arm: Arm, timing: Timing, seed: str) -> Outcome:
    """Send as much as goes, and see that the right one did the TLS. Raises BedError if not."""
    bed.offload(arm.direction, arm.mode == "offload")
    keys = FlowKeys.from_seed(CIPHER, seed)
    guest, wire = jobs(bed, arm, timing, keys)
    before, cpu = Look.at(bed, arm.link), used(bed)
    received = dict(zip(("rx", "tx"), bed.run(guest, wire), strict=True))[arm.direction]
    cpu = {name: now - cpu[name] for name, now in used(bed).items()}
    wait_until(lambda: not bed.bed.nic.contexts(), "the device's contexts are gone")
    counted = Look.at(bed, arm.link).since(before)
    share = 1.0  # of what was counted, plaintext
    if arm.tls and arm.direction == "tx":
        share = RECORD / SEALED_RECORD
        check_samples(bed.wire.samples.read_bytes(), received["samples"], keys.tx)
    plaintext = round(received["total"] * share)
    prove(arm, plaintext, counted)
    gbit = 8e-9 * share * received["bytes"] / received["seconds"]
    return Outcome(gbit, plaintext / 1e9, cpu, counted.per_megabyte(plaintext / 1e6, arm.link))


def contradictions(arm: Arm, plaintext: int, seen: Look) -> Iterator[str]:
    """What does not fit an arm in which so many bytes of plaintext were sent; names of counters with their values."""
    offloaded = arm.mode == "offload"
    for direction in ("tx", "rx"):
        name, tls = direction.capitalize(), arm.tls and direction == arm.direction
        for counter, wanted in ((f"Tls{name}Device", tls and offloaded), (f"Tls{name}Sw", tls and not offloaded)):
            if seen.tls[counter] != wanted * arm.connections:
                yield f"{counter} {seen.tls[counter]}"
        least = arm.covered * plaintext if tls and offloaded else 0
        by_driver = {"tx": "tx_tls_encrypted_bytes", "rx": "rx_tls_decrypted_bytes"}[direction]
        found = {
            f"device's {direction}_tls_bytes": seen.nic[f"{direction}_tls_bytes"],
            f"device's {direction}_tls_records": seen.nic[f"{direction}_tls_records"] * RECORD,
            by_driver: seen.driver[by_driver],
        }
        yield from (
            f"{counter} {value}" for counter, value in found.items() if value < least or bool(value) > bool(least)
        )
    if seen.driver["tx_tls_fallback"] > seen.tcp["TcpRetransSegs"]:
        yield f"tx_tls_fallback {seen.driver['tx_tls_fallback']}"
    yield from (f"{name} {seen.nic[name]}" for name in ("rx_tls_auth_fail",) if seen.nic[name])
    yield from (f"{name} {seen.tls[name]}" for name in ("TlsDecryptError",) if seen.tls[name])


def prove(arm: Arm, plaintext: int, seen: Look) -> None:
    """Raises BedError if the counters do not say that the TLS was done as the arm says."""
    if wrong := list(contradictions(arm, plaintext, seen)):
        raise BedError(f"{arm}, {plaintext} bytes: not what it seems: {', '.join(wrong)}")
