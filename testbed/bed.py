"""A NIC and a guest, connected and configured: what demonstrations and guest tests stand on.

guest eth0 198.51.100.2, 2001:db8:1::2  --  NIC  --  wire0 198.51.100.1, 2001:db8:1::1  (namespace of the NIC)

A guest may have several NICs, each a process of its own: eth1 leads to wire1 in the same namespace, and so on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from testbed.errors import AgentError
from testbed.nic import NIC_MODULE, NicProcess
from testbed.setup import Assets
from testbed.stages import BUILD, say
from testbed.vm.agent import GuestAgent
from testbed.vm.guest import Guest
from testbed.vm.qemu import Machine, VhostUserNic
from testbed.vm.runtime import RuntimeFolder
from testbed.wire.namespace import Wire

GUEST4, WIRE4 = "198.51.100.2", "198.51.100.1"
GUEST6, WIRE6 = "2001:db8:1::2", "2001:db8:1::1"
TOOLS: Final = "/opt/tlsnic/tools"
QUEUES: Final = 2
MACS: Final = tuple(f"52:54:00:12:34:{number:x}" for number in range(0x56, 0x60))


def configure_guest(agent: GuestAgent, interface: str = "eth0") -> None:
    """Give the guest's interface its addresses and bring it up."""
    script = (
        f"ip addr add {GUEST4}/24 dev {interface} && ip -6 addr add {GUEST6}/64 dev {interface} nodad"
        f" && ip link set {interface} up"
    )
    agent.run(["sh", "-c", script])


@dataclasses.dataclass
class Bed:
    """A running NIC with its guest. Made by `running`. `others` are the NICs behind eth1 and so on."""

    nic: NicProcess
    guest: Guest
    wire: Wire
    folder: Path
    others: tuple[NicProcess, ...] = ()

    @property
    def agent(self) -> GuestAgent:
        """The way into the guest."""
        return self.guest.agent

    def tool(self, name: str, job: dict[str, Any], timeout: float = 120) -> dict[str, Any]:
        """Run one of guest-image/tools with a JSON job; its last line of output, decoded."""
        done = self.agent.run(["python3", f"{TOOLS}/{name}", json.dumps(job)], timeout=timeout, check=False)
        return last_line(done.stdout, done.stderr)

    def tls_stat(self) -> dict[str, int]:
        """/proc/net/tls_stat of the guest."""
        lines = self.agent.run(["cat", "/proc/net/tls_stat"]).text.splitlines()
        return {name: int(value) for name, value in (line.split() for line in lines)}

    def ethtool(self, interface: str = "eth0") -> dict[str, int]:
        """`ethtool -S` of the guest's interface."""
        lines = self.agent.run(["ethtool", "-S", interface]).text.splitlines()[1:]
        pairs = (line.rsplit(":", 1) for line in lines)
        return {name.strip(): int(value) for name, value in pairs}


def last_line(stdout: bytes, stderr: bytes = b"") -> dict[str, Any]:
    """The JSON object in the last line of a tool's output. Raises AgentError with what it said instead."""
    try:
        found: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = (stderr or stdout).decode(errors="replace").strip()[-2000:]
        raise AgentError(f"a guest tool failed: {said or 'it said nothing'}") from None
    return found


@contextmanager
def running(
    assets: Assets,
    *,
    nic_arguments: Sequence[str] = (),
    queues: int = QUEUES,
    change: Callable[[Machine], Machine] = lambda machine: machine,
    name: str = "guest",
    mtu: int = 1500,
    wire: Wire | None = None,
    nics: int = 1,
    nic_module: str = NIC_MODULE,
) -> Iterator[Bed]:
    """Start NIC and guest, configure the network, and end both afterwards. Raises SetupError, BootFailed.

    The NIC makes a namespace of its own, unless it is to work in the one of `wire`. Several NICs need that; where they
    meet is the caller's business, and so are the addresses there.
    """
    with ExitStack() as stack:
        runtime = RuntimeFolder()
        stack.callback(runtime.remove)
        folder = runtime.path
        log = BUILD / "log" / f"{name}.nic"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        namespace = ",netns=current" if wire else ""
        addresses = f",address={WIRE4}/24,address={WIRE6}/64" if nics == 1 else ""
        processes: list[NicProcess] = []
        for number in range(nics):
            port = f"tap:name=wire{number},mtu={mtu}{addresses}{namespace}"
            path = folder / f"nic{number}"
            options = ["--queues", str(queues), *nic_arguments]
            process = NicProcess([path], port, log, options, wire, module=nic_module)
            processes.append(stack.enter_context(process))
        attached = tuple(
            VhostUserNic(str(process.sockets[0]), queues=queues, mac=mac, mtu=None if mtu == 1500 else mtu)
            for process, mac in zip(processes, MACS, strict=False)
        )
        machine = change(dataclasses.replace(assets.machine, nics=attached, name=name))
        guest = stack.enter_context(Guest(machine, note=say))
        if machine.driver != "none":
            configure_guest(guest.agent)
        nic, *others = processes
        yield Bed(nic, guest, wire or Wire(nic.pid), folder, tuple(others))
