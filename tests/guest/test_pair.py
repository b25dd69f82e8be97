"""Disorder on the way in: the packets of one kTLS socket are lost and mixed before they reach the other one's NIC.

Both ends are sockets of the same guest, each behind a NIC of its own. netem stands before the sender's NIC.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from testbed.agent import Request
from testbed.bed import last_line
from testbed.flowkeys import FlowKeys
from testbed.pairbed import PairBed, Side, running_pair
from testbed.setup import Assets
from testbed.stream import sha256_of
from tests.guest.conftest import wait_until
from tests.guest.exchange import CIPHERS, TIMEOUT, WAIT, Step, recv, send

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

PERSONALITIES = ("ideal", "core-next-hint")
DISTURBED, SETTLING, AFTERWARDS = 2 << 20, 6 << 20, 400_000
PORT = 7200
# netem in its own words; what a delay does to packets that a device is to encrypt, see exchange.py
LOSS = "loss 2%"
REORDER = "delay 2ms reorder 30% 50%"
MIXED = "delay 1ms reorder 20% 50% loss 1% duplicate 3%"


@pytest.fixture(scope="module", params=PERSONALITIES)
def pair(request: pytest.FixtureRequest, assets: Assets) -> Iterator[PairBed]:
    with running_pair(assets, nic_arguments=["--rx-personality", request.param], name="test-pair") as bed:
        yield bed


@pytest.fixture(autouse=True)
def settled(pair: PairBed) -> Iterator[None]:
    """As the fixture `bed`: after a test nothing of it is left and nothing has broken."""
    yield
    for side in (pair.near, pair.far):
        wait_until(lambda side=side: not side.contexts(), "the device's contexts are gone")  # type: ignore[misc]
        stat = side.tls_stat()
        assert stat["TlsCurrTxDevice"] == stat["TlsCurrRxDevice"] == 0
        stats = side.stats()
        drops = {name for name, n in stats.items() if n and ("_drop_" in name or name.endswith("_ring_errors"))}
        assert drops <= {"rx_drop_queue_down"}
    assert pair.guest.kernel_complaints() == []
    assert pair.nic.alive()


@dataclass
class Stretch:
    """What was counted while one of the three stretches of data moved."""

    near: Counter[str]
    far: Counter[str]


@dataclass
class Outcome:
    """What both ends say, and what was counted on the receiving side."""

    near: dict[str, object]
    far: dict[str, object]
    tls_stat: Counter[str]
    driver: Counter[str]
    stretches: list[Counter[str]] = field(default_factory=list)  # the receiving NIC: disturbed, settling, afterwards
    sync: str = ""


def _jobs(pair: PairBed, cipher: str, write: int) -> tuple[dict[str, object], dict[str, object]]:
    keys = FlowKeys.from_seed(cipher, f"pair {write}").as_job("tx")
    common = {"cipher": cipher, "seed": f"pair {write}", "timeout": TIMEOUT}
    near: list[Step] = [recv(1)]
    far: list[Step] = [send(1)]
    for size in (DISTURBED, SETTLING, AFTERWARDS):
        near += [WAIT, send(size, write=write), recv(1)]
        far += [recv(size), send(1)]
    sender = {**common, "keys": keys["keys"], "connect": [pair.far.address, PORT], "steps": near}
    receiver = {**common, "keys": {"rx": keys["keys"]["tx"]}, "listen": [pair.far.address, PORT], "steps": far}
    return sender, receiver


def _await(request: Request, event: str, seen: int) -> None:
    wait_until(lambda: request.stdout.count(f'"{event}"'.encode()) > seen or not request.running, event, TIMEOUT)
    assert request.running, bytes(request.stdout[-2000:] + request.stderr)


def transfer(pair: PairBed, disorder: str, cipher: str, write: int) -> Outcome:
    """Move the three stretches, the first one in disorder."""
    sender, receiver = _jobs(pair, cipher, write)
    before = Counter(pair.far.tls_stat()), Counter(pair.far.ethtool())
    listening = pair.far.spawn("ktls_raw.py", receiver)
    _await(listening, "listening", 0)
    sending = pair.near.spawn("ktls_raw.py", sender)
    counts = []
    for stretch in range(3):
        _await(sending, "waiting", stretch)
        counts.append(Counter(pair.far.stats()))
        if stretch == 0:
            pair.near.run("tc", "qdisc", "replace", "dev", "eth0", "root", "netem", "limit", "20000", *disorder.split())
        elif stretch == 1:
            pair.near.run("tc", "qdisc", "del", "dev", "eth0", "root")
        else:
            (context,) = pair.far.contexts()
        sending.write(b"\n")
    sending.wait(TIMEOUT)
    listening.wait(TIMEOUT)
    counts.append(Counter(pair.far.stats()))
    ends = [last_line(bytes(each.stdout), bytes(each.stderr))["connections"][0] for each in (sending, listening)]
    after = Counter(pair.far.tls_stat()), Counter(pair.far.ethtool())
    for now, then in zip(after, before, strict=True):
        now.subtract(then)
    stretches = []
    for then, now in zip(counts, counts[1:], strict=False):
        now = Counter(now)
        now.subtract(then)
        stretches.append(now)
    return Outcome(ends[0], ends[1], *after, stretches, str(context["state"]))


@pytest.fixture
def software_sender(pair: PairBed) -> Iterator[Side]:
    """The sender's kernel encrypts."""
    pair.near.run("ethtool", "-K", "eth0", "tls-hw-tx-offload", "off")
    yield pair.near
    pair.near.run("ethtool", "-K", "eth0", "tls-hw-tx-offload", "on")


def came_through(outcome: Outcome, write: int) -> None:
    """Every byte arrived, no record was called bad, and afterwards the device decrypts every record."""
    assert outcome.near["ok"], outcome.near
    assert outcome.far["ok"], outcome.far
    assert outcome.far["sha256_received"] == sha256_of(f"pair {write}", DISTURBED + SETTLING + AFTERWARDS)
    assert outcome.far["rxconf"] == "hw"
    assert outcome.tls_stat["TlsRxDevice"] == 1
    assert outcome.tls_stat["TlsDecryptError"] == 0
    disturbed, settling, afterwards = outcome.stretches
    assert sum((disturbed + settling + afterwards)[name] for name in ("rx_tls_auth_fail", "rx_tls_bad_csum")) == 0
    assert outcome.sync == "in_sync"
    assert afterwards["rx_tls_records"] == -(-AFTERWARDS // write)
    assert afterwards["rx_tls_passed"] == 0


@pytest.mark.parametrize("tso", ["off", "on"])
@pytest.mark.parametrize("disorder", [LOSS, REORDER, MIXED], ids=["loss", "reorder", "mixed"])
@pytest.mark.parametrize("write", [700, 4000, 16384])
def test_disorder_from_a_software_sender(
    pair: PairBed, software_sender: Side, disorder: str, write: int, tso: str
) -> None:
    software_sender.run("ethtool", "-K", "eth0", "tso", tso, "gso", tso)
    try:
        outcome = transfer(pair, disorder, CIPHERS[0], write)
    finally:
        software_sender.run("ethtool", "-K", "eth0", "tso", "on", "gso", "on")
    print(
        disorder,
        write,
        tso,
        outcome.tls_stat,
        [{k: v for k, v in c.items() if v and "rx_tls" in k} for c in outcome.stretches],
    )
    assert outcome.near["txconf"] == "sw"
    came_through(outcome, write)


@pytest.mark.parametrize("tso", ["off", "on"])
def test_loss_between_two_devices(pair: PairBed, tso: str) -> None:
    pair.near.run("ethtool", "-K", "eth0", "tso", tso)
    try:
        outcome = transfer(pair, LOSS, CIPHERS[1], 4000)
    finally:
        pair.near.run("ethtool", "-K", "eth0", "tso", "on")
    print(tso, outcome.tls_stat, [{k: v for k, v in c.items() if v and "rx_tls" in k} for c in outcome.stretches])
    assert outcome.near["txconf"] == "hw"
    came_through(outcome, 4000)
