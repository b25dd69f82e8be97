"""Packets of an offloaded socket that reach the NIC by way of another device, where the kernel encrypted them already.

Encrypting AES-GCM a second time is decrypting it: the driver gives such packets their plaintext back before the device
encrypts them. Each connection has three stretches: straight, by the detour, and straight again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from testbed.bed import WIRE4, Bed
from tests.guest.bpf import SCHED_CLS, load, op
from tests.guest.conftest import wait_until
from tests.guest.exchange import CIPHERS, WAIT, Running, exchange, send, tx_case, tx_personality
from tests.guest.twonics import shell

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

SIZE = 300_000
MACVLAN = ("ip link add mv0 link eth0 type macvlan mode bridge", "ip link set mv0 up")
NO_MACVLAN = "ip link del mv0"
MARK = 8  # in struct __sk_buff


def load_redirect(bed: Bed) -> str:
    """A tc program: what is not marked yet is marked, and leaves by mv0; returns its path.

    Unlike act_mirred, which hands on a copy without socket (the kernel drops it), the packet keeps its socket.
    """
    index = int(bed.agent.run(["cat", "/sys/class/net/mv0/ifindex"]).text)
    return load(
        bed,
        SCHED_CLS,
        op(0x61, 0x12, MARK, 0),  # r2 = skb->mark
        op(0x55, 0x02, 5, 0),  # marked: to the end, r0 = TC_ACT_OK
        op(0xB7, 0x02, 0, 1),  # r2 = 1
        op(0x63, 0x21, MARK, 0),  # skb->mark = 1
        op(0xB7, 0x01, 0, index),
        op(0xB7, 0x02, 0, 0),
        op(0x05, 0x00, 2, 0),
        op(0xB7, 0x00, 0, 0),
        op(0x95, 0x00, 0, 0),
        op(0x85, 0x00, 0, 23),  # bpf_redirect(r1, r2)
        op(0x95, 0x00, 0, 0),
        name="detour",
    )


@contextmanager
def by_route(bed: Bed) -> Iterator[None]:
    shell(bed, *MACVLAN, f"ip route add {WIRE4}/32 dev mv0")
    try:
        yield
    finally:
        shell(bed, NO_MACVLAN)


@contextmanager
def by_redirect(bed: Bed) -> Iterator[None]:
    shell(bed, *MACVLAN)
    path = load_redirect(bed)
    try:
        shell(bed, "tc qdisc add dev eth0 clsact")
        shell(bed, f"tc filter add dev eth0 egress bpf direct-action object-pinned {path}")
        yield
    finally:
        shell(bed, "tc qdisc del dev eth0 clsact", f"rm {path}", NO_MACVLAN)


DETOURS = {"route": by_route, "redirect": by_redirect}


@pytest.mark.conformance(83)
@pytest.mark.parametrize("personality", ["rebuild", "next-record"])
@pytest.mark.parametrize("begins", [True, False], ids=["from the start of a record", "in the middle of one"])
@pytest.mark.parametrize("name", DETOURS)
def test_a_detour_in_mid_connection_encrypts_once(
    bed: Bed, tmp_path: Path, name: str, begins: bool, personality: str
) -> None:
    first = SIZE if begins else SIZE + 5
    cases = [
        tx_case(f"{c} detour", send(first), WAIT, send(SIZE), WAIT, send(SIZE), size=first + 2 * SIZE, cipher=c)
        for c in CIPHERS
    ]

    def meanwhile(run: Running) -> None:
        run.guest_waits()
        before = bed.ethtool()["tx_tls_refilled"]
        with DETOURS[name](bed):
            run.go_on()
            run.guest_waits()  # what it sent may still wait in the socket
            wait_until(lambda: bed.ethtool()["tx_tls_refilled"] > before + 10, "packets go that way")
        run.go_on()

    with tx_personality(bed, personality):
        seen = exchange(bed, cases, tmp_path / "wire.pcap", meanwhile)
    seen.wire_is_encrypted()
    seen.arrived()
    assert seen.driver["tx_drop"] == seen.driver["tx_tls_device_drop"] == 0
    # all of it is the device's business, whoever else encrypted it before; next-record leaves gaps to software
    share = 1 if personality == "rebuild" else 0.5
    assert seen.nic["tx_tls_bytes"] >= share * sum(stream.bytes for stream in seen.streams("tx"))
