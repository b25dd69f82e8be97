"""Many offloaded sockets at once, opening, moving data and closing while segments are lost."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed.bed import GUEST4, TOOLS, WIRE4, Bed, last_line
from testbed.peers.flowkeys import FlowKeys
from testbed.peers.stream import sample, sha256_of
from testbed.wire.decoder import Fixed, Keys, Report, decode, fixed_keys
from testbed.wire.wirecapture import WireCapture
from tests.guest.exchange import CIPHERS
from tests.soak.invariants import Baseline, nothing_left

NUMBER = 4  # clear bytes that a connection begins with
AHEAD = 64  # connections on their way to being open
SAMPLES = 32  # streams that are looked for in clear; all of them are decrypted
LARGEST = 96 << 10
TIMEOUT = 240
LOSS = """
seed = {seed}
[tx]
segments = "wire"
drop = 0.01
[rx]
segments = "wire"
drop = 0.01
"""


@dataclass(frozen=True)
class Outcome:
    """What it came to."""

    sockets: int
    records: int
    open_seconds: float
    data_seconds: float
    mib: int  # both ways
    rx_share: float
    lost: int  # segments


@dataclass(frozen=True)
class Flow:
    """One connection; sizes are the guest's view."""

    keys: FlowKeys
    seed: str
    send: int
    recv: int
    write: int
    records: tuple[int, int]

    def jobs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """For the guest's tool and for the peer."""
        common = {"keys": self.keys.as_job()["keys"], "seed": self.seed}
        return (
            {**common, "send": self.send, "recv": self.recv, "write": self.write},
            {**common, "send": self.recv, "recv": self.send, "records": self.records},
        )


def flows(count: int, seed: int, cipher: str) -> list[Flow]:
    """Random lengths, writes and records; keys and data of each are its own."""
    rng = random.Random(seed)
    return [
        Flow(
            FlowKeys.from_seed(cipher, f"crowd {seed} {number}"),
            f"crowd {seed} {number}",
            rng.randrange(2, LARGEST),
            rng.randrange(2, LARGEST),
            rng.choice((1000, 16384, 40_000)),
            (rng.choice((100, 1400, 16384)), 16384),
        )
        for number in range(count)
    ]


class Peers:
    """The process on the wire."""

    def __init__(self, bed: Bed, jobs: list[dict[str, Any]]) -> None:
        argv = [sys.executable, "-m", "testbed.peers.crowd"]
        pipe = subprocess.PIPE
        self.process = bed.wire.popen(argv, stdin=pipe, stdout=pipe)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(_job(listen=[WIRE4, 0], connections=jobs)).encode() + b"\n")
        self.process.stdin.flush()
        self.port = int(json.loads(self.process.stdout.readline())["port"])

    def results(self) -> list[dict[str, Any] | None]:
        """What each came to."""
        stdout, _ = self.process.communicate(timeout=TIMEOUT)
        results: list[dict[str, Any] | None] = json.loads(stdout.splitlines()[-1])
        return results

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def _job(**fields: Any) -> dict[str, Any]:
    return {"timeout": TIMEOUT, **fields}


def run(bed: Bed, count: int, seed: int, capture: Path, baseline: Baseline) -> Outcome:
    """Do it, and check everything. Raises AssertionError."""
    cipher = CIPHERS[seed % 2]
    crowd = flows(count, seed, cipher)
    guest_jobs, peer_jobs = zip(*(flow.jobs() for flow in crowd), strict=True)
    before, stat = bed.nic.stats(), bed.tls_stat()
    refused = bed.ethtool()["tls_add_failed"]
    with (
        WireCapture(bed.wire, capture, "tcp"),
        Peers(bed, list(peer_jobs)) as peers,
        bed.nic.faults(LOSS.format(seed=seed)),
    ):
        tool = bed.agent.spawn(["python3", f"{TOOLS}/ktls_many.py"])
        job = _job(connect=[WIRE4, peers.port], cipher=cipher, ahead=AHEAD, connections=guest_jobs)
        tool.write(json.dumps(job).encode() + b"\n")
        try:
            tool.wait_for_output(b'"open"', TIMEOUT)
            _all_at_once(bed, count, stat)
            assert bed.ethtool()["tls_add_failed"] == refused
            began = time.monotonic()
            tool.write(b"\n")
            tool.wait(TIMEOUT)
        finally:
            if tool.running:
                tool.kill()
        found = last_line(bytes(tool.stdout), bytes(tool.stderr))
        data_seconds = time.monotonic() - began
        _arrived(crowd, found["connections"], peers.results())
    nic = {name: value - before[name] for name, value in bed.nic.stats().items()}
    report = _wire(capture, crowd, found["connections"])
    assert bed.tls_stat()["TlsDecryptError"] == stat["TlsDecryptError"]
    assert nic["ctx_tx_added"] == nic["ctx_rx_added"] == count
    nothing_left(bed, baseline)
    return Outcome(
        sockets=count,
        records=report.records,
        open_seconds=round(found["open_seconds"], 1),
        data_seconds=round(data_seconds, 1),
        mib=sum(flow.send + flow.recv for flow in crowd) >> 20,
        rx_share=nic["rx_tls_records"] / sum(s.records for s in report.find(source=(WIRE4, None))),
        lost=nic["fault_dropped"],
    )


def _all_at_once(bed: Bed, count: int, before: dict[str, int]) -> None:
    """NL4: as many contexts in the kernel, the driver and the device as there are sockets; none left to software."""
    now, driver = bed.tls_stat(), bed.ethtool()
    assert (now["TlsCurrTxDevice"], now["TlsCurrRxDevice"]) == (count, count)
    assert (now["TlsTxSw"], now["TlsRxSw"]) == (before["TlsTxSw"], before["TlsRxSw"])
    for direction in ("tx", "rx"):
        assert driver[f"{direction}_tls_ctx"] - driver[f"{direction}_tls_del"] == count
    assert len(bed.nic.contexts()) == 2 * count


def _arrived(crowd: list[Flow], guest: list[dict[str, Any]], peers: list[dict[str, Any] | None]) -> None:
    """NL1: each stream whole, at both ends, to a clean end."""
    wrong = []
    for flow, here, there in zip(crowd, guest, peers, strict=True):
        received = sha256_of(flow.seed, flow.recv), sha256_of(flow.seed, flow.send)
        hashes = here["sha256_received"], there and there["sha256_received"]
        if here["error"] or there is None or there["error"] or hashes != received:
            wrong.append((flow.seed, here, there))
    assert not wrong, f"{len(wrong)} connections, such as {wrong[:3]}"


def _wire(capture: Path, crowd: list[Flow], guest: list[dict[str, Any]]) -> Report:
    """NL5, NL6: every record of every stream opens with its keys, and holds what it should."""
    fixed: list[Fixed] = []
    for flow, here in zip(crowd, guest, strict=True):
        fixed += fixed_keys(flow.keys, (WIRE4, None), (GUEST4, here["port"]), tx_start=NUMBER)
    report = decode(capture, Keys(fixed, samples=[sample(flow.seed) for flow in crowd[:SAMPLES]]))
    assert report.plaintext_hits == 0, report.plaintext_places
    assert report.ok, [stream for stream in report.streams if not stream.ok][:3]
    sent = {here["port"]: sha256_of(flow.seed, flow.send) for flow, here in zip(crowd, guest, strict=True)}
    back = {here["port"]: sha256_of(flow.seed, flow.recv) for flow, here in zip(crowd, guest, strict=True)}
    assert {s.source.port: s.sha256 for s in report.find((GUEST4, None))} == sent
    assert {s.destination.port: s.sha256 for s in report.find((WIRE4, None))} == back
    return report
