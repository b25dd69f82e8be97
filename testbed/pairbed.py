"""Two NICs back to back in one guest: what one sends, the other receives, and both ends are kTLS sockets.

near  eth0 198.51.100.2  --  NIC 0 == NIC 1  --  eth1 198.51.100.1 (namespace "far" of the guest)  far

The second interface lives in a network namespace, or the guest would talk to itself over loopback.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from testbed.bed import GUEST4, MACS, TOOLS, WIRE4
from testbed.nic import NicProcess
from testbed.setup import Assets
from testbed.stages import BUILD, say
from testbed.vm.agent import GuestAgent, Request
from testbed.vm.guest import Guest
from testbed.vm.qemu import VhostUserNic
from testbed.vm.runtime import RuntimeFolder

FAR: Final = "far"


@dataclasses.dataclass(frozen=True)
class Side:
    """One end of the cable, seen from the guest; `index` is its NIC's number in the process."""

    agent: GuestAgent
    nic: NicProcess
    index: int
    interface: str
    address: str
    enter: tuple[str, ...] = ()

    def run(self, *argv: str) -> str:
        """Standard output of a program that runs on this side."""
        return self.agent.run([*self.enter, *argv]).text

    def spawn(self, tool: str, job: dict[str, Any]) -> Request:
        """Start one of guest-image/tools on this side; its standard input stays open."""
        request = self.agent.spawn([*self.enter, "python3", f"{TOOLS}/{tool}"])
        request.write(json.dumps(job).encode() + b"\n")
        return request

    def tls_stat(self) -> dict[str, int]:
        """/proc/net/tls_stat of this side's namespace."""
        lines = self.run("cat", "/proc/net/tls_stat").splitlines()
        return {name: int(value) for name, value in map(str.split, lines)}

    def ethtool(self) -> dict[str, int]:
        """`ethtool -S` of this side's interface."""
        pairs = (line.rsplit(":", 1) for line in self.run("ethtool", "-S", self.interface).splitlines()[1:])
        return {name.strip(): int(value) for name, value in pairs}

    def stats(self) -> dict[str, int]:
        """The counters of this side's NIC."""
        return self.nic.stats(self.index)

    def contexts(self) -> list[dict[str, Any]]:
        """The contexts of this side's NIC."""
        return self.nic.contexts(self.index)


@dataclasses.dataclass(frozen=True)
class PairBed:
    """Made by `running_pair`."""

    nic: NicProcess
    guest: Guest
    near: Side
    far: Side


def _configure(near: Side, far: Side) -> None:
    near.agent.run(["ip", "netns", "add", FAR])
    near.agent.run(["ip", "link", "set", far.interface, "netns", FAR])
    for side in (near, far):
        side.run("ip", "addr", "add", f"{side.address}/24", "dev", side.interface)
        side.run("ip", "link", "set", side.interface, "up")


@contextmanager
def running_pair(assets: Assets, *, nic_arguments: Sequence[str] = (), name: str = "pair") -> Iterator[PairBed]:
    """Start the NICs and the guest, configure the network, and end everything. Raises SetupError, BootFailed."""
    with ExitStack() as stack:
        runtime = RuntimeFolder()
        stack.callback(runtime.remove)
        log = BUILD / "log" / f"{name}.nic"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        nic = NicProcess([runtime.path / "near", runtime.path / "far"], "pair", log, nic_arguments)
        stack.enter_context(nic)
        attached = tuple(VhostUserNic(str(path), mac=mac) for path, mac in zip(nic.sockets, MACS, strict=False))
        guest = stack.enter_context(Guest(dataclasses.replace(assets.machine, nics=attached, name=name), note=say))
        near = Side(guest.agent, nic, 0, "eth0", GUEST4)
        far = Side(guest.agent, nic, 1, "eth1", WIRE4, ("ip", "netns", "exec", FAR))
        _configure(near, far)
        yield PairBed(nic, guest, near, far)
