"""Packets of an offloaded socket that reach the NIC by way of another device, where the kernel encrypted them already.

Encrypting AES-GCM a second time is decrypting it: what comes encrypted must go out as it is.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.bed import WIRE4, Bed
from tests.guest.exchange import WAIT, Running, exchange, send, tx_case

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

SIZE = 300_000
MACVLAN = (
    "ip link add mv0 link eth0 type macvlan mode bridge",
    "ip link set mv0 up",
    f"ip route add {WIRE4}/32 dev mv0",
)


@pytest.mark.parametrize("begins", [True, False], ids=["from the start of a record", "in the middle of one"])
def test_a_detour_in_mid_connection_encrypts_once(bed: Bed, tmp_path: Path, begins: bool) -> None:
    """A route change sends the socket's packets over a macvlan, which hands them to the NIC; then back again."""
    first = SIZE if begins else SIZE + 5
    case = tx_case("detour", send(first), WAIT, send(SIZE), WAIT, send(SIZE), size=first + 2 * SIZE)

    def meanwhile(run: Running) -> None:
        run.guest_waits()
        for command in MACVLAN:
            bed.agent.run(command.split())
        run.go_on()
        run.guest_waits()
        bed.agent.run(["ip", "link", "del", "mv0"])
        run.go_on()

    seen = exchange(bed, [case], tmp_path / "wire.pcap", meanwhile)
    seen.wire_is_encrypted()
    seen.arrived()
    # the detour's packets were not the device's business, those before and after were
    assert SIZE < seen.nic["tx_tls_bytes"] < 2.5 * SIZE
    assert seen.driver["tx_drop"] == 0
