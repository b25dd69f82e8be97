"""The demonstration's flows: one TLS connection each between the guest and a user-space peer outside, and what came
of it.

A flow moves `size` bytes in one direction. With peer "openssl" both sides run OpenSSL, a real handshake first, and
the guest's hands its socket to kTLS; with "raw" both use fixed keys and no handshake.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from testbed.bed import WIRE4, WIRE6, Bed
from testbed.peers.flowkeys import FlowKeys
from testbed.peers.peer import Peer
from testbed.peers.stream import sample, sha256_of
from testbed.wire.decoder import Keys, Report, fixed_keys
from testbed.wire.tls12 import read_keylog

OPENSSL_NAMES: Final = {
    "aes-128-gcm": "ECDHE-RSA-AES128-GCM-SHA256",
    "aes-256-gcm": "ECDHE-RSA-AES256-GCM-SHA384",
}
HOSTS: Final = {"4": WIRE4, "6": WIRE6, "mapped": WIRE4}


@dataclass(frozen=True)
class Flow:
    """What to do. `dir` is tx or rx, `family` 4, 6 or mapped (an IPv6 socket on IPv4)."""

    dir: str
    cipher: str
    family: str
    peer: str
    size: int

    @property
    def seed(self) -> str:
        """Names the flow's data and keys."""
        return f"{self.dir} {self.cipher} {self.family} {self.peer}"


@dataclass
class Outcome:
    """What came of a flow. Records are those of its direction; offloaded ones the device encrypted or decrypted."""

    dir: str
    cipher: str
    family: str
    peer: str
    bytes: int
    sha256_ok: bool = False
    offloaded: bool = False
    records: int = 0
    records_offloaded: int = 0
    bytes_per_s: int = 0
    problem: str = ""
    guest_port: int = field(default=0, repr=False)
    peer_port: int = field(default=0, repr=False)  # another flow may have the guest's

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def _raw_jobs(flow: Flow) -> tuple[dict[str, Any], dict[str, Any]]:
    """Guest's and peer's job. A receiver asks with one clear byte, so that its context is there before the data."""
    common = {**FlowKeys.from_seed(flow.cipher, flow.seed).as_job(flow.dir), "seed": flow.seed}
    send = [{"do": "send", "size": flow.size}, {"do": "shutdown"}]
    receive = [{"do": "recv", "size": flow.size}, {"do": "eof"}]
    if flow.dir == "tx":
        return {**common, "steps": send}, {**common, "steps": receive}
    ask, asked = {"do": "send", "size": 1}, {"do": "recv", "size": 1}
    return {**common, "steps": [ask, *receive]}, {**common, "steps": [asked, *send]}


def _openssl_jobs(flow: Flow, keylog: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Likewise. A receiver asks with one byte; its context was added with the peer's Finished already received."""
    common = {"cipher": OPENSSL_NAMES[flow.cipher], "seed": flow.seed}
    end = {"do": "shutdown"}
    if flow.dir == "tx":
        guest, steps = {"send": flow.size}, [{"do": "recv", "size": flow.size}, end]
    else:
        guest = {"send": 1, "recv": flow.size}
        steps = [{"do": "recv", "size": 1}, {"do": "send", "size": flow.size}, end]
    return {**common, **guest}, {**common, "steps": steps, "keylog": str(keylog)}


def run_flow(bed: Bed, flow: Flow, keylog: Path) -> Outcome:
    """Run one flow to its end."""
    outcome = Outcome(flow.dir, flow.cipher, flow.family, flow.peer, flow.size)
    guest_job, peer_job = _raw_jobs(flow) if flow.peer == "raw" else _openssl_jobs(flow, keylog)
    host = HOSTS[flow.family]
    before = bed.nic.stats()
    with Peer(bed.wire, flow.peer, {**peer_job, "listen": [host, 0]}) as peer:
        outcome.peer_port = peer.port
        target = f"::ffff:{host}" if flow.family == "mapped" else host
        job = {**guest_job, "connect": [target, peer.port], "family": flow.family}
        guest = bed.tool(f"ktls_{flow.peer}.py", job)
        told = peer.result()
    after = bed.nic.stats()
    outcome.problem = " ".join(
        f"{side}: {result.get('error') or result}"
        for side, result in (("guest", guest), ("peer", told))
        if not result["ok"]
    )
    mine = guest["connections"][0] if "connections" in guest else guest
    receiver = told if flow.dir == "tx" else mine
    # A receiver of raw bytes in the clear direction counted the one byte of the question on the other side only.
    outcome.sha256_ok = receiver.get("sha256_received") == sha256_of(flow.seed, flow.size)
    outcome.bytes_per_s = int(flow.size / max(receiver.get("seconds", 0), 1e-6))
    outcome.records_offloaded = after[f"{flow.dir}_tls_records"] - before[f"{flow.dir}_tls_records"]
    kernel = guest["tls_stat"]["delta"].get(f"Tls{flow.dir.capitalize()}Device", 0)
    added = after[f"ctx_{flow.dir}_added"] - before[f"ctx_{flow.dir}_added"]
    outcome.offloaded = bool(kernel == added == 1 and outcome.records_offloaded)
    outcome.guest_port = int(told["remote"][1]) if "remote" in told else 0
    return outcome


def wire_keys(flows: list[tuple[Flow, Outcome]], keylog: Path) -> Keys:
    """Everything the independent decoder needs to know of these flows."""
    keys = Keys(samples=[sample(flow.seed) for flow, _ in flows])
    if keylog.exists():
        keys.keylog = read_keylog(keylog.read_text())
    for flow, outcome in flows:
        if flow.peer == "raw":
            fixed = FlowKeys.from_seed(flow.cipher, flow.seed)
            asked = 1 if flow.dir == "rx" else 0  # the clear byte
            keys.fixed += fixed_keys(fixed, (None, outcome.peer_port), (None, outcome.guest_port), tx_start=asked)
    return keys


def count_wire_records(outcomes: list[Outcome], report: Report) -> None:
    """Fill in `records` from what the decoder saw of each flow's direction."""
    for outcome in outcomes:
        guest, peer = (None, outcome.guest_port), (None, outcome.peer_port)
        streams = report.find(guest, peer) if outcome.dir == "tx" else report.find(peer, guest)
        outcome.records = sum(stream.records for stream in streams if stream.keys != "none")
