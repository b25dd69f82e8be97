"""A guest with two NICs that meet at a bridge on the wire, and ways to lead packets by the one or the other.

guest eth0  --  NIC 0  --  wire0 \\
                                   br0 198.51.100.1, 2001:db8:1::1
guest eth1  --  NIC 1  --  wire1 /

The guest's addresses are those of eth0. What the wire sends to them goes to the interface that `receives`, whatever the
guest sends by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from testbed.bed import GUEST4, GUEST6, MACS, WIRE4, WIRE6, Bed, running
from testbed.setup import Assets
from testbed.wire.namespace import Wire, held_wire

BRIDGE = "br0"
WIRE_MAC = "02:00:00:00:00:02"
# isolated ports do not talk to each other: what one NIC floods does not come back by the other
JOIN = f"""
ip link add {BRIDGE} address {WIRE_MAC} type bridge
for port in wire0 wire1; do
    ip link set $port master {BRIDGE}
    bridge link set dev $port isolated on
done
ip addr add {WIRE4}/24 dev {BRIDGE}
ip -6 addr add {WIRE6}/64 dev {BRIDGE} nodad
ip link set {BRIDGE} up
"""
# the bridge is not confused by packets that leave by a NIC which is not their address's
PIN = f"""
bridge link set dev wire0 learning off
bridge link set dev wire1 learning off
bridge fdb replace {MACS[0]} dev wire0 master static
bridge fdb replace {MACS[1]} dev wire1 master static
"""


def shell(bed: Bed, *commands: str) -> None:
    """Run lines of shell in the guest, each of which must succeed."""
    for command in commands:
        bed.agent.run(["sh", "-c", command])


@contextmanager
def two_nics(assets: Assets, name: str, *, bond: bool = False) -> Iterator[Bed]:
    """The bed; `bed.nic` is NIC 0, `bed.others[0]` NIC 1. A `bond` has one address for both."""
    with held_wire() as held:
        held.run(["ip", "tuntap", "add", "dev", "wire1", "mode", "tap", "vnet_hdr"])
        with running(assets, name=name, wire=held, nics=2) as bed:
            held.run(["sh", "-ec", JOIN if bond else JOIN + PIN])
            bed.wire = Wire(held.pid, BRIDGE)
            receives(bed, "eth0")
            # a link that goes down takes IPv6 addresses away otherwise
            shell(bed, "sysctl -qw net.ipv6.conf.eth0.keep_addr_on_down=1", "ip link set eth1 up")
            yield bed


def receives(bed: Bed, interface: str) -> None:
    """What is sent to the guest's addresses arrives there."""
    mac = MACS[int(interface.removeprefix("eth"))]
    for address in (GUEST4, GUEST6):
        bed.wire.run(["ip", "neigh", "replace", address, "lladdr", mac, "dev", BRIDGE, "nud", "permanent"])


@contextmanager
def received_by(bed: Bed, interface: str) -> Iterator[None]:
    """For the time of the block; by eth0 afterwards."""
    receives(bed, interface)
    try:
        yield
    finally:
        receives(bed, "eth0")


@contextmanager
def sent_by(bed: Bed, interface: str) -> Iterator[None]:
    """The guest's route to the wire, for the time of the block; by eth0 afterwards."""
    shell(
        bed,
        f"ip route replace {WIRE4}/32 dev {interface} src {GUEST4}",
        f"ip -6 route replace {WIRE6}/128 dev {interface} src {GUEST6} metric 1",
    )
    try:
        yield
    finally:
        shell(bed, f"ip route del {WIRE4}/32", f"ip -6 route del {WIRE6}/128 metric 1")
