"""64-byte frames between a virtqueue and a tap interface, which take a system call each.

The interface lies in a network namespace of a process of its own. What leaves the NIC is for another host, so the
kernel takes it from the tap and drops it: the figure is the NIC's and the tun driver's. What comes is made by the
kernel, which cuts UDP datagrams out of large ones (UDP_SEGMENT) once the driver has taken those before, so that none is
lost for want of room.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from bench.child import Child, Talk
from bench.device_tx import ROUNDS, measured
from bench.registry import Group, Measured, Session
from bench.rig import RX, Rig, Run, Shape
from nicdev.edge import netns
from nicdev.edge.loop import Loop
from nicdev.edge.port import Port
from nicdev.edge.port_faulty import FaultyPort
from nicdev.edge.port_tap import TapPort, open_tap
from nicdev.stats import Counter
from testbed.errors import BedError

INTERFACE: Final = "bench0"
ADDRESS: Final = "198.51.100.1/24"
NEIGHBOUR: Final = ("198.51.100.2", "52:54:00:00:00:02")
RX_RING: Final = 1024
PIECES: Final = 20


def open_interface() -> int:
    """A tap interface, up, in a new namespace that this process enters, and silent by itself. Raises ConfigError."""
    from pyroute2 import IPRoute

    netns.enter_own()
    fd = open_tap(INTERFACE)
    try:
        Path(f"/proc/sys/net/ipv6/conf/{INTERFACE}/disable_ipv6").write_text("1")
    except FileNotFoundError:
        pass  # a kernel without IPv6
    except OSError as error:
        raise BedError(f"cannot keep the tap interface silent: {error}") from error
    netns.configure(INTERFACE, (ADDRESS,), 1500)
    with IPRoute() as ip:
        index = ip.link_lookup(ifname=INTERFACE)[0]
        address, hardware = NEIGHBOUR
        ip.neigh("replace", dst=address, lladdr=hardware, ifindex=index, state="permanent")
    return fd


def taken_by_kernel() -> int:
    """Frames that the interface has taken from us; tells of this namespace."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.strip().partition(":")
        if name == INTERFACE:
            return int(numbers.split()[1])
    raise BedError(f"there is no {INTERFACE}")


def both(talk: Talk, count: int, rounds: int) -> None:
    """Runs of both directions, in turns."""
    fd = open_interface()
    shape = Shape(256, {"plain": {}}, rx_buffers=RX_RING)
    with ExitStack() as stack:
        rig = stack.enter_context(Rig(shape))

        def port(loop: Loop) -> Port:
            return FaultyPort(loop, TapPort(loop, os.dup(fd)), rig.nic)

        for number in range(1, rounds + 1):
            tx = rig.run("plain", count, count // PIECES, port=port)
            if taken_by_kernel() != number * count:
                raise BedError(f"the kernel took {taken_by_kernel()} frames of {number * count}")
            rig.posted[Counter.RX_WIRE_PACKETS] += count
            rx = rig.serve({"take": NEIGHBOUR[0], "count": count}, port, rig.rings[RX], count // PIECES)
            if rig.nic.stats[Counter.RX_PACKETS] != number * count:
                raise BedError("a frame was received that did not arrive")
            talk.tell((tx, rx))


def measure(session: Session) -> Iterator[Measured]:
    """Frames out and in."""
    rounds = session.rounds(ROUNDS)
    with Child("bench.device_tap:both", count=session.scaled(128_000, 6_400), rounds=rounds) as child:
        runs = [[Run(*run) for run in child.hear()] for _ in range(rounds)]
    for name, found in zip(("tap_kpps", "tap_rx_kpps"), zip(*runs, strict=True), strict=True):
        yield measured(name, "k/s", found, lambda rate: rate / 1e3, frame_bytes=64)


GROUP: Final = Group("device-tap", "device", "frames of 64 bytes through a tap interface", measure)
