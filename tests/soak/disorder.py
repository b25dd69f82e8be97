"""One run of the matrix: real kTLS sockets of a guest under one setting, and what must hold afterwards."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed.bed import GUEST6, Bed
from tests.guest.conftest import wait_until
from tests.guest.exchange import EOF, SHUTDOWN, Case, Seen, exchange, recv, send
from tests.soak.invariants import Baseline, nothing_left, stream_intact, wire_protected
from tests.soak.plan import Setting

CHUNK = 64 << 10
CHUNKS = 12
ALONE = 512 << 10
ROOMY = {"options": {"SO_RCVBUF": 1 << 20, "SO_SNDBUF": 1 << 20}}
DEFAULTS = {"rx": "ideal", "tx": "rebuild"}


@dataclass(frozen=True)
class Outcome:
    """What a run came to; shares are of all records (rx) and of all encrypted bytes (tx) on the wire."""

    seconds: float
    records: int
    rx_share: float
    tx_share: float
    retransmitted: int  # segments, by the guest's TCP
    struck: int  # faults


def scenario(setting: Setting, seed: int) -> str:
    """The fault director's orders (docs/faults.md)."""
    lines = [f"seed = {seed}"]
    for direction in ("tx", "rx"):
        lines += [f"[{direction}]", f'segments = "{setting.segments}"']
        if setting.faulty in (direction, "both"):
            rates = {"drop": setting.loss, "reorder": setting.reorder, "duplicate": setting.duplicate}
            lines += [f"{action} = {percent / 100}" for action, percent in rates.items() if percent]
            if setting.corrupt:
                lines += [f"corrupt = {setting.corrupt / 100}", 'checksum = "wrong"']
    return "\n".join(lines)


def cases(setting: Setting, seed: int) -> list[Case]:
    """An echo in long records, and a stream each way in short and long ones: many to a packet, many packets long."""
    common: dict[str, Any] = {"cipher": setting.cipher, "family": setting.family}
    common |= {"guest_job": ROOMY, "peer_job": ROOMY}
    echo = [send(CHUNK), recv(CHUNK)] * CHUNKS
    out = [*(send(ALONE // 2, write=write) for write in (700, 9000)), recv(1)]
    back = [send(ALONE // 2, records=[size, 16384]) for size in (300, 5000)]
    return [
        Case(f"echo {seed}", [*echo, SHUTDOWN, EOF], [{"do": "echo", "size": CHUNK * CHUNKS}, EOF, SHUTDOWN], **common),
        Case(f"out {seed}", [*out, SHUTDOWN, EOF], [recv(ALONE), send(1), EOF, SHUTDOWN], **common),
        Case(f"in {seed}", [send(1), recv(ALONE), SHUTDOWN, EOF], [recv(1), *back, EOF, SHUTDOWN], **common),
    ]


@contextmanager
def prepared(bed: Bed, setting: Setting) -> Iterator[None]:
    """The guest's interface with the setting's MTU, the NIC with its personalities; as before afterwards."""
    before = bed.agent.run(["cat", "/sys/class/net/eth0/mtu"]).text.strip()
    _personalities(bed, {"rx": setting.rx, "tx": setting.tx})
    try:
        bed.agent.run(["ip", "link", "set", "eth0", "mtu", str(setting.link_mtu)])
        yield
    finally:
        # a link below 1280 bytes takes IPv6 addresses away
        restore = f"ip link set eth0 mtu {before} && ip -6 addr replace {GUEST6}/64 dev eth0 nodad"
        bed.agent.run(["sh", "-c", restore])
        _personalities(bed, DEFAULTS)


def _personalities(bed: Bed, names: dict[str, str]) -> None:
    hellos = bed.ethtool()["hello"]
    bed.nic.ask("personality", **names)
    wait_until(lambda: bed.ethtool()["hello"] > hellos, f"the driver hears of {names}")


def run(bed: Bed, setting: Setting, seed: int, capture: Path, baseline: Baseline) -> Outcome:
    """Do it, and check everything. Raises AssertionError."""
    began = time.monotonic()
    with prepared(bed, setting), bed.nic.faults(scenario(setting, seed)):
        seen = exchange(bed, cases(setting, seed), capture)
    stream_intact(seen)
    wire_protected(seen)
    seen.kernel_offloads()
    _offloaded(seen, setting)
    nothing_left(bed, baseline)
    rx, tx = seen.streams("rx"), seen.streams("tx")
    encrypted = sum(stream.bytes - stream.clear_bytes for stream in tx)
    return Outcome(
        seconds=round(time.monotonic() - began, 1),
        records=seen.report.records,
        rx_share=seen.nic["rx_tls_records"] / sum(stream.records for stream in rx),
        tx_share=min(1.0, seen.nic["tx_tls_bytes"] / encrypted),
        retransmitted=seen.tcp["TcpRetransSegs"],
        struck=sum(seen.nic[f"fault_{what}"] for what in ("dropped", "duplicated", "corrupted", "reordered")),
    )


def _offloaded(seen: Seen, setting: Setting) -> None:
    """The device did it: all of it in order, and of disorder what its personality promises."""
    driver, nic = seen.driver, seen.nic
    if setting.orderly:
        _all_of_it(seen)
    assert nic["rx_tls_records"] > 0, seen.account("no record was decrypted by the device")
    assert nic["tx_tls_records"] > 0, seen.account("no record was encrypted by the device")
    assert driver["rx_tls_decrypted_packets"] == nic["rx_tls_packets"], seen.account("verdicts")
    assert driver["tx_tls_encrypted_bytes"] == nic["tx_tls_bytes"], seen.account("tx bytes")
    for name in ("tx_tls_device_drop", "tx_tls_drop_bypass_req"):
        assert driver[name] == 0, seen.account(name)
    # an acknowledgement that was late may overtake what TCP sends again: there is nothing left to encrypt
    assert driver["tx_tls_drop_no_sync_data"] <= seen.tcp["TcpRetransSegs"], seen.account("tx_tls_drop_no_sync_data")
    if setting.tx == "rebuild":
        assert driver["tx_tls_fallback"] == driver["tx_tls_resync_req"] == 0, seen.account("software encrypted")
    assert nic["rx_tls_auth_fail"] == 0, seen.account("tags")


def _all_of_it(seen: Seen) -> None:
    """No record went through software; but a busy machine makes TCP repeat segments, and that is disorder, too."""
    tx, rx = seen.streams("tx"), seen.streams("rx")
    first = sum(stream.bytes - stream.clear_bytes - stream.retransmitted_bytes for stream in tx)
    assert seen.nic["tx_tls_bytes"] >= first, seen.account("tx")
    assert seen.driver["tx_tls_fallback"] <= seen.tcp["TcpRetransSegs"], seen.account("tx")
    if not any(stream.retransmitted_bytes for stream in rx):
        assert seen.nic["rx_tls_records"] == sum(stream.records for stream in rx), seen.account("rx")
