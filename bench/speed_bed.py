"""The bed of the throughput figures: one guest with our NIC and QEMU's own virtio-net side by side.

guest eth0 198.51.100.2  --  vhost-user  --  NIC  --  wire0 198.51.100.1
guest eth1 203.0.113.2   --  virtio-net in QEMU   --  qemu0 203.0.113.1    (same namespace, driver virtio_net)

Both taps have virtio_net_hdr and the same offloads, both devices mergeable buffers. In the guest and in the namespace
runs one testbed.peers.speed_end each for all measurements, so that no arm pays for the start of a program.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from bench import passt
from testbed.bed import MACS, TOOLS, WIRE4, Bed, running
from testbed.errors import BedError
from testbed.peers import speed
from testbed.peers.stream import stream
from testbed.setup import Assets
from testbed.vm.agent import Request
from testbed.vm.qemu import Machine, Nic, TapNic, VhostUserNic
from testbed.vm.runtime import RuntimeFolder
from testbed.wire.namespace import Wire, held_wire

SECONDS: Final = 120.0  # for one job
PROGRAM: Final = "testbed.peers.speed_end"
GUEST_FOLDER: Final = "/tmp/speed"  # noqa: S108 - of a guest that is ours alone
PATTERN: Final = stream("speed", speed.PERIOD)
SEND_TAP: Final = (
    "import socket, sys; from nicdev.edge.port_tap import open_tap\n"
    "socket.send_fds(socket.socket(fileno=0), [b'.'], [open_tap(sys.argv[1])])"
)
# what one arm's loss did to TCP is not the next one's business
FORGET: Final = ["sh", "-c", "echo 1 >/proc/sys/net/ipv4/tcp_no_metrics_save"]
GCM: Final = re.compile(r"^name +: gcm\(aes\)\ndriver +: (\S+)\n(?:.+\n)*?priority +: (\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Link:
    """A way from the guest to the wire: the guest's interface, whom it reaches by it, and the interface there."""

    interface: str
    host: str
    tap: str


NIC: Final = Link("eth0", WIRE4, "wire0")
QEMU: Final = Link("eth1", "203.0.113.1", "qemu0")
PASST: Final = Link("eth1", passt.HOST, "lo")


def tap(wire: Wire, name: str, address: str) -> int:
    """A new tap in the namespace, up, with an address, as a descriptor of this process."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        helper = wire.popen([sys.executable, "-c", SEND_TAP, name], stdin=theirs.fileno())
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
        helper.wait()
    wire.run(["sh", "-ec", f"ip addr add {address}/24 dev {name}; ip link set {name} up"])
    return fd


class Program:
    """A running testbed.peers.speed_end."""

    def tell(self, job: Mapping[str, Any]) -> None:
        """Give it a job."""
        raise NotImplementedError

    def answer(self) -> dict[str, Any]:
        """The result of the oldest job that has none yet. Raises BedError with its own words."""
        found: dict[str, Any] = json.loads(self._line())
        if "error" in found:
            raise BedError(f"{type(self).__name__}: {found['error']}")
        return found

    def _line(self) -> bytes:
        raise NotImplementedError


class InGuest(Program):
    """The one in the guest."""

    def __init__(self, bed: Bed) -> None:
        for path in Path(speed.__file__).parent.glob("speed*.py"):
            bed.agent.put(f"{GUEST_FOLDER}/testbed/peers/{path.name}", path.read_bytes())
        bed.agent.put(f"{GUEST_FOLDER}/pattern", PATTERN)
        self._request: Request = bed.agent.spawn(["python3", "-m", PROGRAM], cwd=GUEST_FOLDER)
        self._said = b""

    def tell(self, job: Mapping[str, Any]) -> None:
        """Paths are the guest's."""
        line = json.dumps({"pattern": f"{GUEST_FOLDER}/pattern", "tools": TOOLS, **job})
        self._request.write(line.encode() + b"\n")

    def _line(self) -> bytes:
        while b"\n" not in self._said:
            piece = self._request.read(SECONDS)
            if not piece:
                raise BedError(f"the guest's program ended: {bytes(self._request.stderr)[-1000:]!r}")
            self._said += piece
        line, _, self._said = self._said.partition(b"\n")
        return line


class OnWire(Program):
    """The one where the wire is; `port` is where it listens. Context manager."""

    def __init__(self, wire: Wire, folder: Path) -> None:
        self.samples = folder / "samples"
        self._pattern = folder / "pattern"
        self._pattern.write_bytes(PATTERN)
        pipe = subprocess.PIPE
        self._process = wire.popen([sys.executable, "-m", PROGRAM], stdin=pipe, stdout=pipe)
        self.pid = self._process.pid
        self.tell({"do": "listen", "listen": ["", 0]})
        self.port = int(self.answer()["port"])

    def tell(self, job: Mapping[str, Any]) -> None:
        """Paths are this process's."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"pattern": str(self._pattern), **job}).encode() + b"\n")
        self._process.stdin.flush()

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BedError(f"the program on the wire ended with status {self._process.wait()}")
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


@dataclass
class SpeedBed:
    """Made by `speed_bed`."""

    bed: Bed
    guest: InGuest
    wire: OnWire
    pids: dict[str, int]  # of all that takes part in a transfer
    vcpus: list[int] = field(default_factory=list)  # threads of QEMU that are the guest's processors
    _offloads: dict[str, bool] = field(default_factory=dict)

    def run(self, guest: Mapping[str, Any], wire: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """A job for each; their results in the same order. Raises BedError with what one of them says instead."""
        self.wire.tell(wire)
        self.guest.tell(guest)
        return self.guest.answer(), self.wire.answer()

    def offload(self, direction: str, wanted: bool) -> None:
        """Whether TLS sockets made from now on use the NIC."""
        if self._offloads.get(direction) != wanted:
            state = "on" if wanted else "off"
            self.bed.agent.run(["ethtool", "-K", NIC.interface, f"tls-hw-{direction}-offload", state])
            self._offloads[direction] = wanted

    def pin(self) -> None:
        """The guest's processors share one of ours, everything else has another: both faster and steadier than free."""
        ours = sorted(os.sched_getaffinity(0))
        first, second = ours[0], ours[-1]
        for pid in self.pids.values():
            for task in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), {second})
        processors: Any = self.bed.guest.qmp("query-cpus-fast")
        self.vcpus = [processor["thread-id"] for processor in processors]
        for thread in self.vcpus:
            os.sched_setaffinity(thread, {first})

    def facts(self) -> dict[str, Any]:
        """What software kTLS and TCP run on in this guest. Raises BedError if TLS would run slower than it can."""
        modules = self.bed.agent.get("/proc/modules").decode()
        if "aesni_intel " not in modules:
            raise BedError("the guest has no aesni_intel: its software TLS would be too easy to beat")
        found = GCM.findall(self.bed.agent.get("/proc/crypto").decode())
        machine = self.bed.guest.machine
        best = max((int(priority), driver) for driver, priority in found)[1]
        congestion = self.bed.agent.get("/proc/sys/net/ipv4/tcp_congestion_control").decode().strip()
        return {"cpu": machine.cpu_model, "cpus": machine.cpus, "gcm(aes)": best, "congestion_control": congestion}


@contextmanager
def _bed(assets: Assets, name: str, held: Wire, other: Nic, address: str, *, mtu: int = 1500) -> Iterator[SpeedBed]:
    """The guest has another NIC beside ours, with an address and the stock driver: ours leaves it alone."""

    def both(machine: Machine) -> Machine:
        return dataclasses.replace(machine, nics=(*machine.nics, other))

    script = f"modprobe virtio_net && ip addr add {address}/24 dev eth1 && ip link set eth1 up mtu {mtu}"
    with running(assets, name=name, wire=held, change=both) as bed, OnWire(held, bed.folder) as wire:
        bed.agent.run(["sh", "-ec", script])
        bed.agent.run(FORGET)
        held.run(FORGET)
        pids = {"qemu": bed.guest.pid, "nic": bed.nic.pid, "peer": wire.pid}
        made = SpeedBed(bed, InGuest(bed), wire, pids)
        made.pin()
        yield made


@contextmanager
def speed_bed(assets: Assets) -> Iterator[SpeedBed]:
    """With QEMU's own NIC; for Session.guest. Raises BedError."""
    with held_wire() as held, ExitStack() as stack:
        fd = tap(held, QEMU.tap, QEMU.host)
        stack.callback(os.close, fd)
        yield stack.enter_context(_bed(assets, "bench-speed", held, TapNic(fd, MACS[1]), "203.0.113.2"))


@contextmanager
def passt_bed(assets: Assets) -> Iterator[SpeedBed]:
    """With a NIC that has passt behind it; for Session.guest. Raises BedError."""
    passt.unpack()
    with held_wire() as held, ExitStack() as stack:
        folder = RuntimeFolder()
        stack.callback(folder.remove)
        path = folder.path / "passt"
        pid = stack.enter_context(passt.running(held, path))
        other = VhostUserNic(str(path), mac=MACS[1])
        bed = stack.enter_context(_bed(assets, "bench-passt", held, other, passt.GUEST, mtu=passt.MTU))
        bed.pids["passt"] = pid
        bed.pin()
        yield bed


def cpu_seconds(pid: int) -> float:
    """Processor time of a process with all its threads so far (proc(5): utime and stime)."""
    return _seconds(Path(f"/proc/{pid}/stat"))


def _seconds(stat: Path) -> float:
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def used(bed: SpeedBed) -> dict[str, float]:
    """Processor seconds so far of all that takes part; "machine": of everything that runs here.

    "vcpus" are the threads of QEMU that are the guest's processors, "qemu" is the rest of it.
    """
    busy = [int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    idle, iowait, steal = busy[3], busy[4], busy[7]
    found = {name: cpu_seconds(pid) for name, pid in bed.pids.items()}
    found["vcpus"] = sum(_seconds(Path(f"/proc/{thread}/task/{thread}/stat")) for thread in bed.vcpus)
    found["qemu"] -= found["vcpus"]
    found["machine"] = (sum(busy[:8]) - idle - iowait - steal) / os.sysconf("SC_CLK_TCK")
    return found
