"""What the groups that need a guest share: flows of whole records, watched from all sides, and the proof of offload."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.verdicts import Flow, Verdicts
from testbed.bed import Bed, running
from testbed.errors import BedError
from testbed.setup import Assets
from tests.guest.exchange import RECORD_OVERHEAD, Case, Running, Seen, exchange, traced

RECORD: Final = 16384
CUBIC: Final = {"options": {"TCP_CONGESTION": "cubic"}}  # of a peer that sends; guests do so by themselves
AGREEMENT: Final = (
    0.005  # the share of records by which kernel and device may differ: each keeps its own copy of a byte
)
SECONDS: Final = 300.0  # for one transfer
EVENT: Final = "tls:tls_device_decrypted"
_READ: Final = re.compile(r"tls_device_decrypted: sk=(\S+) .*rec_no=(\d+) .* decrypted=(\d)")


class Disagreement(BedError):
    """Two that look at the same thing count differently."""


def first_record(index: int) -> int:
    """The number of the first record of a group's flows: by it the kernel's trace tells them apart."""
    return (index + 1) << 16


@dataclass(frozen=True)
class WatchedBed:
    """A guest behind a NIC whose capture is read along."""

    bed: Bed
    verdicts: Verdicts


@contextmanager
def watched(assets: Assets) -> Iterator[WatchedBed]:
    """For Session.guest. Raises BedError."""
    with tempfile.TemporaryDirectory(prefix="tlsnic-bench-") as folder:
        verdicts = Verdicts(Path(folder) / "capture")
        with running(assets, name="bench", nic_arguments=["--capture", str(verdicts.path)]) as bed:
            yield WatchedBed(bed, verdicts)


def records_read(trace: Iterable[str]) -> dict[int, list[bool]]:
    """Of each flow, by its first record's number: of each record, whether the kernel found it wholly decrypted.

    Raises Disagreement if a flow's records are not there one after the other.
    """
    flows: dict[str, dict[int, bool]] = {}
    for line in trace:
        found = _READ.search(line)
        if found:
            number = int(found[2])
            records = flows.setdefault(found[1], {})
            if records and number - 1 not in records:
                raise Disagreement(f"the kernel's trace lacks what was before record {number}")
            records[number] = found[3] == "1"
    return {next(iter(records)): list(records.values()) for records in flows.values()}


@dataclass
class Watched:
    """What came of flows of whole records."""

    seen: Seen
    kernel: dict[int, list[bool]]  # records_read
    device: dict[tuple[str, int], Flow]

    def by_device(self, case: Case, direction: str) -> list[bool]:
        """Of each record, whether the device encrypted or decrypted all of it at its first passage."""
        wire = self.seen.wires[self.seen.cases.index(case)][direction]
        peer = wire.source if direction == "rx" else wire.destination
        ends = [(number + 1) * (RECORD + RECORD_OVERHEAD) for number in range(wire.records)]
        return self.device[direction, peer[1]].records_by_device(ends)

    def rx_records(self, case: Case) -> list[bool]:
        """What the kernel says, which the device's own account must confirm. Raises Disagreement."""
        kernel, device = self.kernel[case.rec_seq], self.by_device(case, "rx")
        different = sum(a != b for a, b in zip(kernel, device, strict=True))
        if different > max(1, AGREEMENT * len(kernel)):
            raise Disagreement(f"{case.seed}: kernel {sum(kernel)}, device {sum(device)} of {len(kernel)} records")
        return kernel


def transfer(
    guest: WatchedBed, cases: Sequence[Case], meanwhile: Callable[[Running], None] = lambda _: None
) -> Watched:
    """Run the flows to their end; every case has another `rec_seq`. AssertionError where offload is not proven."""

    def patiently(running: Running) -> None:
        meanwhile(running)
        for peer in running.peers:
            peer.result(SECONDS)

    with (
        tempfile.TemporaryDirectory(prefix="tlsnic-bench-") as folder,
        guest.verdicts.watching(guest.bed) as device,
        traced(guest.bed, EVENT) as trace,
    ):
        seen = exchange(guest.bed, cases, Path(folder) / "wire.pcap", patiently)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    return Watched(seen, records_read(trace), device)


def recovered_after(offloaded: Sequence[bool], window: int = 100) -> int:
    """After how many records no `window` of them in a row has more than one that was not offloaded."""
    after = 0
    for start in range(max(len(offloaded) - window, 0) + 1):
        if offloaded[start : start + window].count(False) > 1:
            after = start + 1
    return after
