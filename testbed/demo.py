"""The demonstration: real kTLS sockets in the guest, both directions, both ciphers, both families, watched from all
sides.

What it says is proven three ways: the kernel's tls_stat, the driver's and the device's counters, and a decoder that
reads the wire with keys it has from the peers. `ok` is the conjunction of everything.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Final

from testbed.bed import Bed
from testbed.flows import Flow, Outcome, count_wire_records, run_flow, wire_keys
from testbed.setup import Assets
from testbed.wire.decoder import Report, decode
from testbed.wire.wirecapture import WireCapture

SIZE: Final = 16 << 20
CLOSE_SECONDS: Final = 10
LEAST_SHARE: Final = 0.97
UNWANTED: Final = ("TlsDecryptError", "TlsCurrTxDevice", "TlsCurrRxDevice", "TlsTxSw", "TlsRxSw")
HARMLESS: Final = ("rx_drop_queue_down",)  # frames that come before the guest has booted
CIPHERS: Final = ("aes-128-gcm", "aes-256-gcm")


def demonstration_flows(size: int = SIZE) -> list[Flow]:
    """Every combination of peer, family, cipher and direction, and one IPv6 socket on IPv4."""
    flows = [Flow(d, c, f, p, size) for p, f, c, d in product(("openssl", "raw"), "46", CIPHERS, ("tx", "rx"))]
    return [*flows, Flow("tx", CIPHERS[0], "mapped", "raw", size), Flow("rx", CIPHERS[0], "mapped", "raw", size)]


@dataclass
class Result:
    """Everything the demonstration found out; `as_dict` is build/demo.json."""

    kernel: str
    qemu: str
    accel: str
    seconds_to_guest: float
    flows: list[Outcome] = field(default_factory=list)
    tls_stat: dict[str, int] = field(default_factory=dict)
    ethtool: dict[str, int] = field(default_factory=dict)
    nic: dict[str, int] = field(default_factory=dict)
    wire: dict[str, int] = field(default_factory=dict)
    kernel_complaints: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "ok": self.ok,
            "problems": self.problems,
            "kernel": self.kernel,
            "qemu": self.qemu,
            "accel": self.accel,
            "seconds_to_guest": round(self.seconds_to_guest, 2),
            "flows": [flow.as_dict() for flow in self.flows],
            "tls_stat": self.tls_stat,
            "ethtool": self.ethtool,
            "nic": self.nic,
            "wire": self.wire,
            "kernel_log_clean": not self.kernel_complaints,
        }

    def write(self, path: Path) -> None:
        """Replace `path` in one step."""
        temporary = path.with_name(f".tmp-{path.name}")
        temporary.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        temporary.replace(path)


def demonstrate(bed: Bed, assets: Assets, flows: list[Flow], show: Callable[[Outcome], None]) -> Result:
    """Run `flows` one after the other under a capture of the wire; `show` is told of each as it ends."""
    result = Result(assets.kernel.release, str(assets.qemu), assets.accel.name, bed.guest.boot_seconds)
    keylog = bed.folder / "keylog"
    done: list[tuple[Flow, Outcome]] = []
    with WireCapture(bed.wire, bed.folder / "wire.pcap") as capture:
        for flow in flows:
            outcome = run_flow(bed, flow, keylog)
            done.append((flow, outcome))
            show(outcome)
    report = decode(capture.path, wire_keys(done, keylog))
    capture.path.unlink()
    result.flows = [outcome for _, outcome in done]
    count_wire_records(result.flows, report)
    _await_no_contexts(bed)
    result.tls_stat, result.ethtool, result.nic = bed.tls_stat(), bed.ethtool(), bed.nic.stats()
    result.wire = {
        "records": report.records,
        "records_decrypted_ok": report.records_decrypted_ok,
        "plaintext_hits": report.plaintext_hits,
        "frames": report.frames,
    }
    result.kernel_complaints = bed.guest.kernel_complaints()
    result.problems = _problems(result, report, bed)
    return result


def _await_no_contexts(bed: Bed) -> None:
    """tx contexts end in a workqueue, some time after their socket."""
    deadline = time.monotonic() + CLOSE_SECONDS
    while bed.nic.contexts() and time.monotonic() < deadline:
        time.sleep(0.05)


def _problems(result: Result, report: Report, bed: Bed) -> list[str]:
    """One line for each thing that is not as it must be."""
    problems = []
    for flow in result.flows:
        name = f"{flow.dir} {flow.cipher} ipv{flow.family} {flow.peer}"
        if flow.problem:
            problems.append(f"{name}: {flow.problem}")
        if not flow.sha256_ok:
            problems.append(f"{name}: the data that arrived is not the data that was sent")
        if not flow.offloaded:
            problems.append(f"{name}: not offloaded")
        # By software: a packet that the stack sends again or on another queue, and its record with it; the peer's
        # Finished, which is there before the context.
        if flow.records_offloaded < flow.records * LEAST_SHARE:
            did = "encrypted" if flow.dir == "tx" else "decrypted"
            problems.append(f"{name}: the device {did} {flow.records_offloaded} of {flow.records} records")
    if report.plaintext_hits:
        problems.append(f"plaintext on the wire: {', '.join(report.plaintext_places)}")
    if not report.records or report.records_decrypted_ok != report.records:
        problems.append(f"the decoder could read {report.records_decrypted_ok} of {report.records} records on the wire")
    problems += [f"wire: {error}" for stream in report.streams for error in stream.errors]
    if contexts := bed.nic.contexts():
        problems.append(f"{len(contexts)} contexts are left in the device")
    faults = (name for name in result.nic if ("_drop_" in name or "_errors" in name) and name not in HARMLESS)
    problems += [f"{name} is {result.nic[name]}" for name in faults if result.nic[name]]
    problems += [f"{name} is {result.tls_stat[name]}" for name in UNWANTED if result.tls_stat[name]]
    return problems + [f"guest kernel: {line}" for line in result.kernel_complaints]
