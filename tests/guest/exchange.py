"""Raw kTLS connections between the guest and peers on the wire, all at once, watched from every side.

A test says what both ends of each `Case` do; `exchange` runs them under a capture and gives back what guest, peers,
kernel, driver, device and the decoder of the wire say, each on its own. `offloaded` is the common part of most tests:
everything arrived, the device did the work, and all sides agree on how much it was.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from testbed.bed import GUEST4, GUEST6, TOOLS, WIRE4, WIRE6, Bed, last_line
from testbed.errors import AgentTimeout
from testbed.peers.flowkeys import FlowKeys
from testbed.peers.peer import Peer
from testbed.peers.stream import sample, sha256_of
from testbed.vm.agent import Request
from testbed.wire.decoder import Fixed, Keys, Report, StreamReport, decode, fixed_keys
from testbed.wire.wirecapture import WireCapture
from tests.guest.conftest import wait_until

Step = dict[str, Any]
CIPHERS = ("aes-128-gcm", "aes-256-gcm")
BOTH = ("tx", "rx")
TIMEOUT = 60
WIRE_HOSTS = {"4": WIRE4, "6": WIRE6, "mapped": WIRE4}
GUEST_HOSTS = {"4": GUEST4, "6": GUEST6, "mapped": GUEST4}

# A receiver asks with one clear byte once its context is there: nothing arrives before.
ASK: Step = {"do": "send", "size": 1}
ASKED: Step = {"do": "recv", "size": 1}
SHUTDOWN: Step = {"do": "shutdown"}
EOF: Step = {"do": "eof"}
WAIT: Step = {"do": "wait"}
RECORD_OVERHEAD = 5 + 8 + 16


def send(size: int, **how: Any) -> Step:
    """Step: send `size` bytes of the stream."""
    return {"do": "send", "size": size, **how}


def recv(size: int, **how: Any) -> Step:
    """Step: receive `size` bytes of the stream."""
    return {"do": "recv", "size": size, **how}


@dataclass(frozen=True)
class Case:
    """One connection; `seed` names its data and keys. `sent` and `received` are the guest's bytes of the stream."""

    seed: str
    guest: Sequence[Step]
    peer: Sequence[Step]
    dirs: Sequence[str] = BOTH
    cipher: str = CIPHERS[0]
    family: str = "4"
    rec_seq: int = 0
    listen: int = 0  # the guest's port, if it is the guest that listens
    tx_start: int = 0  # clear bytes before the first record
    rx_start: int = 0
    guest_job: Mapping[str, Any] = field(default_factory=dict)
    peer_job: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> FlowKeys:
        """What both ends and the decoder use."""
        return FlowKeys.from_seed(self.cipher, self.seed, self.rec_seq)

    def common(self) -> dict[str, Any]:
        """What both jobs have."""
        return {**self.keys.as_job(*self.dirs), "seed": self.seed, "timeout": TIMEOUT}

    def size(self, *verbs: str) -> int:
        """Bytes of the guest's steps of these kinds."""
        return sum(int(step["size"]) for step in self.guest if step["do"] in verbs)


def tx_case(seed: str, *steps: Step, size: int, **options: Any) -> Case:
    """The guest sends `size` bytes by `steps`, encrypted; the peer's direction is clear."""
    return Case(seed, [*steps, SHUTDOWN], [recv(size), EOF], dirs=("tx",), **options)


def rx_case(seed: str, *steps: Step, size: int, **options: Any) -> Case:
    """The peer sends `size` bytes by `steps`, encrypted; the guest's direction is clear."""
    return Case(seed, [ASK, recv(size), EOF], [ASKED, *steps, SHUTDOWN], dirs=("rx",), **options)


@dataclass
class Running:
    """An exchange under way."""

    bed: Bed
    tool: Request
    peers: list[Peer] = field(default_factory=list)
    said: bytearray = field(default_factory=bytearray)

    def hear(self, event: str, count: int = 1) -> None:
        """Until the guest's tool has told of the event so many times more."""
        needle = f'"{event}"'.encode()
        for _ in range(count):
            while needle not in self.said:
                piece = self.tool.read(TIMEOUT)
                assert piece, f"the guest's tool ended: {bytes(self.tool.stderr or self.said)!r}"
                self.said += piece
            del self.said[: self.said.index(needle) + len(needle)]

    def guest_waits(self) -> None:
        """Until all of the guest's connections stand at a step "wait"."""
        self.hear("waiting")

    def go_on(self) -> None:
        """Let them go on."""
        self.tool.write(b"\n")

    def wait(self) -> list[dict[str, Any]]:
        """Until the tool ends; the NIC's contexts when they were last looked at, since they go with the sockets."""
        contexts: list[dict[str, Any]] = []
        for _ in range(2 * TIMEOUT):
            contexts = self.bed.nic.contexts() or contexts
            with suppress(AgentTimeout):
                self.tool.wait(1)
                return contexts
        raise AgentTimeout(f"the guest's tool does not end; contexts: {contexts}")


@dataclass
class Seen:
    """What every side says afterwards; counters are differences."""

    cases: Sequence[Case]
    guest: list[dict[str, Any]] = field(default_factory=list)
    peers: list[dict[str, Any]] = field(default_factory=list)
    tls_stat: Counter[str] = field(default_factory=Counter)
    driver: Counter[str] = field(default_factory=Counter)
    nic: Counter[str] = field(default_factory=Counter)
    tcp: Counter[str] = field(default_factory=Counter)  # of the guest's kernel
    contexts: list[dict[str, Any]] = field(default_factory=list)  # the last that were seen
    report: Report = field(default_factory=lambda: Report(0, [], 0, []))
    wires: list[dict[str, StreamReport]] = field(default_factory=list)  # per case: "tx", "rx"

    def streams(self, direction: str) -> list[StreamReport]:
        """The encrypted streams of a direction."""
        return [wire[direction] for case, wire in zip(self.cases, self.wires, strict=True) if direction in case.dirs]

    def arrived(self) -> None:
        """Both ends did all they had to, and every byte arrived."""
        for case, guest, peer in zip(self.cases, self.guest, self.peers, strict=True):
            assert guest["ok"], self.account(case.seed)
            assert peer["ok"], self.account(case.seed)
            sent, received = case.size("send", "sendfile"), case.size("recv", "recv_aside")
            assert peer["sha256_received"] == sha256_of(case.seed, sent), self.account(case.seed)
            assert guest["sha256_received"] == sha256_of(case.seed, received), self.account(case.seed)

    def account(self, about: str) -> str:
        """Everything that may explain a failure: what the ends said, what all sides counted, what was on the wire."""
        lines = [about]
        for case, guest, peer, wire in zip(self.cases, self.guest, self.peers, self.wires, strict=True):
            for end, said in (("guest", guest), ("peer", peer)):
                told = {name: value for name, value in said.items() if value and not name.startswith("sha256")}
                lines.append(f"{case.seed}, {end}: {told}")
            lines += [f"{case.seed}, wire {name}: {stream}" for name, stream in wire.items() if name in case.dirs]
        for name in ("tls_stat", "tcp", "driver", "nic"):
            lines.append(f"{name}: { {key: count for key, count in getattr(self, name).items() if count} }")
        return "\n".join([*lines, *(f"context: {context}" for context in self.contexts)])

    def wire_is_encrypted(self) -> None:
        """The independent decoder reads every record, and finds nothing in plaintext."""
        assert self.report.plaintext_hits == 0, self.report.plaintext_places
        problems = {
            f"{case.seed} {name}": (stream.errors, stream.failures)
            for case, wire in zip(self.cases, self.wires, strict=True)
            for name, stream in wire.items()
            if not stream.ok
        }
        assert not problems
        for case, wire in zip(self.cases, self.wires, strict=True):
            for name in case.dirs:
                assert wire[name].keys == "fixed"
                sent = case.size("send", "sendfile") if name == "tx" else case.size("recv", "recv_aside")
                assert wire[name].sha256 == sha256_of(case.seed, sent), case.seed
                assert wire[name].records > 0

    def kernel_offloads(self) -> None:
        """The kernel gave every context to the device, none to software, and complains about no record."""
        for direction in BOTH:
            name = direction.capitalize()
            assert self.tls_stat[f"Tls{name}Device"] == len(self.streams(direction))
            assert self.tls_stat[f"Tls{name}Sw"] == 0
            assert self.driver[f"{direction}_tls_ctx"] == len(self.streams(direction))
            assert self.nic[f"ctx_{direction}_added"] == len(self.streams(direction))
        for case, guest in zip(self.cases, self.guest, strict=True):
            if case.guest_job.get("ss", True):
                assert {name for name in BOTH if guest.get(f"{name}conf") == "hw"} == set(case.dirs), case.seed
        assert self.tls_stat["TlsDecryptError"] == 0

    def everything_by_the_device(self) -> None:
        """Driver and device count what the wire shows: not one record went through software.

        What TCP sent again on a busy machine was encrypted again, by the device too; or by software, if it came by
        another queue while the device had packets of the flow in the first.
        """
        tx = self.streams("tx")
        encrypted = sum(stream.bytes - stream.clear_bytes for stream in tx)
        again = sum(stream.retransmitted_bytes for stream in tx)
        assert self.driver["tx_tls_encrypted_bytes"] == self.nic["tx_tls_bytes"], self.account("tx")
        assert encrypted <= self.nic["tx_tls_bytes"] <= encrypted + again, self.account("tx")
        assert self.driver["tx_tls_fallback"] <= self.tcp["TcpRetransSegs"], self.account("tx")
        assert self.driver["tx_tls_encrypted_packets"] >= self.nic["tx_tls_packets"]
        assert self.nic["tx_tls_records"] >= sum(stream.records for stream in tx)
        rx = self.streams("rx")
        assert self.nic["rx_tls_records"] == sum(stream.records for stream in rx)
        assert self.nic["rx_tls_bytes"] == sum(stream.bytes - stream.clear_bytes for stream in rx)
        assert self.driver["rx_tls_decrypted_packets"] == self.nic["rx_tls_packets"]
        # TLS payload in the decrypted packets, of control records too
        overhead = sum(RECORD_OVERHEAD * stream.records for stream in rx)
        assert self.driver["rx_tls_decrypted_bytes"] == self.nic["rx_tls_bytes"] - overhead
        for name in ("rx_tls_auth_fail", "rx_tls_lost_sync", "rx_tls_bad_csum"):
            assert self.nic[name] == 0

    def offloaded(self) -> None:
        """All of the above."""
        self.arrived()
        self.wire_is_encrypted()
        self.kernel_offloads()
        self.everything_by_the_device()


# netem may lose and double packets. It may not delay them: the kernel takes the socket from a packet that waits in
# netem, and then rather drops than sends it, since who would encrypt it? Two queues, of which the one for every other
# 8 KiB of a stream is slow, change the order instead: slower than any guest sends.
REORDER = (
    "qdisc replace dev eth0 root handle 1: prio bands 2 priomap 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0",
    "qdisc add dev eth0 parent 1:2 tbf rate 10mbit burst 100k limit 10m",
    "filter add dev eth0 parent 1: protocol ip u32 match u8 6 0xff at 9 match u32 0x2000 0x2000 at 24 flowid 1:2",
)


def netem(disorder: str) -> tuple[str, ...]:
    """The command that makes `tc` disturb what the guest sends, in netem's own words."""
    return (f"qdisc replace dev eth0 root netem limit 20000 {disorder}",)


@contextmanager
def disturbed(bed: Bed, commands: Sequence[str]) -> Iterator[None]:
    """Disorder between the guest's TCP and the driver: to the driver these are gaps and jumps in a stream."""
    try:
        for command in commands:
            bed.agent.run(["tc", *command.split()])
        yield
    finally:
        bed.agent.run(["tc", "qdisc", "del", "dev", "eth0", "root"])


def _tell(bed: Bed, **names: str) -> None:
    hellos = bed.ethtool()["hello"]
    bed.nic.ask("personality", **names)
    wait_until(lambda: bed.ethtool()["hello"] > hellos, f"the driver hears of {names}")


@contextmanager
def tx_personality(bed: Bed, name: str) -> Iterator[None]:
    """The driver answers disorder in this way; "rebuild", the default, afterwards."""
    _tell(bed, tx=name)
    try:
        yield
    finally:
        _tell(bed, tx="rebuild")


@contextmanager
def rx_personality(bed: Bed, name: str) -> Iterator[None]:
    """The contexts that are made meanwhile find their place in this way; "ideal", the default, afterwards."""
    _tell(bed, rx=name)
    try:
        yield
    finally:
        _tell(bed, rx="ideal")


@contextmanager
def traced(bed: Bed, event: str) -> Iterator[list[str]]:
    """Record a tracepoint of the guest's kernel; its lines are in the list after the block."""
    folder = "/sys/kernel/tracing"
    lines: list[str] = []
    bed.agent.run(["sh", "-c", f"echo >{folder}/trace && echo {event} >{folder}/set_event"])
    try:
        yield lines
    finally:
        bed.agent.run(["sh", "-c", f"echo >{folder}/set_event"])
        found = bed.agent.run(["cat", f"{folder}/trace"]).text.splitlines()
        lines += [line for line in found if not line.startswith("#")]


def counters(bed: Bed) -> tuple[Counter[str], Counter[str], Counter[str], Counter[str]]:
    """Now, of the kernel's TLS, of the driver, of the device, of the kernel's TCP."""
    tcp = json.loads(bed.agent.run(["nstat", "-aszj", "Tcp*"]).text)["kernel"]
    return Counter(bed.tls_stat()), Counter(bed.ethtool()), Counter(bed.nic.stats()), Counter(tcp)


def difference(after: Counter[str], before: Counter[str]) -> Counter[str]:
    """What was counted between; `after` is overwritten."""
    after.subtract(before)
    return after


def guest_member(case: Case, peer_port: int) -> dict[str, Any]:
    """The job of the guest's end."""
    host = WIRE_HOSTS[case.family]
    if case.listen:
        place: dict[str, Any] = {"listen": ["::" if case.family != "4" else GUEST4, case.listen]}
    else:
        place = {"connect": [f"::ffff:{host}" if case.family == "mapped" else host, peer_port]}
    steps = list(case.guest)
    return {**case.common(), **place, "family": case.family, "steps": steps, **case.guest_job}


def _peer(bed: Bed, case: Case) -> Peer:
    if case.listen:
        place: dict[str, Any] = {"connect": [GUEST_HOSTS[case.family], case.listen]}
    else:
        place = {"listen": [WIRE_HOSTS[case.family], 0]}
    return Peer(bed.wire, "raw", {**case.common(), **place, "steps": list(case.peer), **case.peer_job})


def _ports(case: Case, peer: Peer) -> tuple[tuple[str | None, int | None], tuple[str | None, int | None]]:
    """(guest, peer) as the decoder is to find them."""
    if case.listen:
        return (GUEST_HOSTS[case.family], case.listen), (None, None)
    return (None, None), (WIRE_HOSTS[case.family], peer.port)


def _wire_keys(cases: Sequence[Case], peers: Sequence[Peer]) -> Keys:
    fixed: list[Fixed] = []
    for case, peer in zip(cases, peers, strict=True):
        guest_end, peer_end = _ports(case, peer)
        tx, rx = fixed_keys(case.keys, peer_end, guest_end, case.tx_start, case.rx_start)
        fixed += [tx] * ("tx" in case.dirs) + [rx] * ("rx" in case.dirs)
    return Keys(fixed, samples=[sample(case.seed) for case in cases])


@contextmanager
def exchanging(bed: Bed, cases: Sequence[Case]) -> Iterator[Running]:
    """Start all cases; what is still going on at the end of the block is ended."""
    with ExitStack() as stack:
        peers = {case.seed: stack.enter_context(_peer(bed, case)) for case in cases if not case.listen}
        members = [guest_member(case, 0 if case.listen else peers[case.seed].port) for case in cases]
        tool = bed.agent.spawn(["python3", f"{TOOLS}/ktls_raw.py"])
        stack.callback(lambda: tool.kill() if tool.running else None)
        tool.write(json.dumps({"connections": members}).encode() + b"\n")
        running = Running(bed, tool)
        listening = [case for case in cases if case.listen]
        running.hear("listening", len(listening))
        peers |= {case.seed: stack.enter_context(_peer(bed, case)) for case in listening}
        running.peers = [peers[case.seed] for case in cases]
        yield running


def exchange(
    bed: Bed, cases: Sequence[Case], capture_path: Path, meanwhile: Callable[[Running], None] = lambda _: None
) -> Seen:
    """Run all cases to their end; `meanwhile` is called when they have begun."""
    seen = Seen(cases)
    before = counters(bed)
    with WireCapture(bed.wire, capture_path) as capture, exchanging(bed, cases) as running:
        meanwhile(running)
        seen.contexts = running.wait()
        seen.guest = last_line(bytes(running.tool.stdout), bytes(running.tool.stderr))["connections"]
        seen.peers = [peer.result(TIMEOUT) for peer in running.peers]
    seen.tls_stat, seen.driver, seen.nic, seen.tcp = map(difference, counters(bed), before)
    seen.report = decode(capture.path, _wire_keys(cases, running.peers))
    for case, peer in zip(cases, running.peers, strict=True):
        guest_end, peer_end = _ports(case, peer)
        (tx,), (rx,) = seen.report.find(guest_end, peer_end), seen.report.find(peer_end, guest_end)
        seen.wires.append({"tx": tx, "rx": rx})
    return seen
