"""The virtual machine as a value, and QEMU's command line as a pure function of it.

Nothing here touches the system: which QEMU and which accelerator is testbed/vm/accel.py's decision, starting it is
testbed/vm/guest.py's. Attaching the NIC is the stock way: a vhost-user chardev behind an ordinary virtio-net-pci,
with guest memory in a shareable memfd.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

AGENT_PORT = "tlsnic.agent"
SOCKET_PATH_MAX = 107  # sun_path holds 108 bytes with its zero (unix(7))
# Before this, a vhost-user NIC with MSI-X crashes QEMU where there is no KVM, and AES is emulated slowly.
FIRST_GOOD_TCG = (8, 0, 0)
# An emulated `rep movsb` copies byte by byte. A kernel that is told to prefer it copies five times more slowly than
# with moves of eight bytes.
EMULATED_CPU = "max,-erms,-fsrm"


@dataclass(frozen=True)
class Qemu:
    """A QEMU program: how to start it, its version, and where it comes from, for people."""

    argv: tuple[str, ...]
    version: tuple[int, int, int]
    origin: str

    def __str__(self) -> str:
        return f"QEMU {'.'.join(map(str, self.version))} ({self.origin})"


@dataclass(frozen=True)
class Accel:
    """`name` is "kvm" or "tcg"; `reason` says why, for people."""

    name: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" if self.reason else self.name


@dataclass(frozen=True)
class VhostUserNic:
    """A NIC whose back end listens on the unix socket `path`."""

    path: str
    queues: int = 1
    mac: str | None = None
    mtu: int | None = None
    vectors: int | None = None  # MSI-X; None: one for every queue


@dataclass(frozen=True)
class UserNic:
    """QEMU's own virtio-net with its built-in user-mode network; needs nothing from the host."""

    mac: str | None = None


@dataclass(frozen=True)
class TapNic:
    """QEMU's own virtio-net on an open tap that QEMU inherits as descriptor `fd`; the opponent in comparisons."""

    fd: int
    mac: str | None = None


Nic = VhostUserNic | UserNic | TapNic


@dataclass(frozen=True)
class Machine:
    """Everything that determines a guest.

    `driver` is what the guest's init loads: tlsnic, virtio_net or none. `cpu`: QEMU's `-cpu`; None: see `cpu_model`.
    """

    qemu: Qemu
    accel: Accel
    kernel: Path
    initrd: Path
    disks: tuple[Path, ...] = ()
    memory_mib: int = 1024
    cpus: int = 2
    nics: tuple[Nic, ...] = ()
    driver: str = "tlsnic"
    cmdline: tuple[str, ...] = ()
    cpu: str | None = None
    name: str = "guest"
    extra: tuple[str, ...] = field(default=())

    @property
    def tcg(self) -> bool:
        """Whether instructions are emulated."""
        return self.accel.name == "tcg"

    @property
    def cpu_model(self) -> str:
        """What `cpu` says, else the best model for the accelerator."""
        return self.cpu or (EMULATED_CPU if self.tcg else "max")


def kernel_command_line(machine: Machine) -> str:
    """Console on the serial port; an oops ends the guest instead of leaving half of one."""
    fixed = ["console=ttyS0", "panic=-1", "oops=panic", f"tlsnic.driver={machine.driver}"]
    return " ".join([*fixed, *machine.cmdline])


def _escape(value: str | Path) -> str:
    return str(value).replace(",", ",,")


def _nic(machine: Machine, nic: Nic, index: int) -> list[str]:
    device = [f"virtio-net-pci,netdev=n{index},romfile="]
    if nic.mac:
        device.append(f"mac={nic.mac}")
    if isinstance(nic, UserNic):
        return ["-netdev", f"user,id=n{index}", "-device", ",".join(device)]
    if isinstance(nic, TapNic):
        return ["-netdev", f"tap,id=n{index},fd={nic.fd}", "-device", ",".join(device)]
    retry = "reconnect-ms=1000" if machine.qemu.version >= (9, 2, 0) else "reconnect=1"
    if nic.queues > 1:
        device.append("mq=on")
    if machine.tcg and machine.qemu.version < FIRST_GOOD_TCG:
        device.append("vectors=0")
    elif nic.vectors is not None or nic.queues > 1:
        device.append(f"vectors={2 * nic.queues + 2 if nic.vectors is None else nic.vectors}")
    if nic.mtu:
        device.append(f"host_mtu={nic.mtu}")
    return [
        *("-chardev", f"socket,id=c{index},path={_escape(nic.path)},{retry}"),
        *("-netdev", f"vhost-user,id=n{index},chardev=c{index},queues={nic.queues}"),
        *("-device", ",".join(device)),
    ]


def command_line(machine: Machine, sockets: Path, console: Path) -> list[str]:
    """The whole argument list; `sockets` is the folder for agent.sock and qmp.sock, `console` the kernel's log file."""
    accel = "tcg,thread=multi" if machine.tcg else machine.accel.name
    argv = [*machine.qemu.argv, "-name", machine.name, "-nodefaults", "-no-user-config", "-display", "none"]
    argv += ["-no-reboot", "-accel", accel, "-cpu", machine.cpu_model, "-smp", str(machine.cpus)]
    argv += ["-machine", "q35,memory-backend=ram", "-m", str(machine.memory_mib)]
    argv += ["-object", f"memory-backend-memfd,id=ram,size={machine.memory_mib}M,share=on"]
    argv += ["-kernel", str(machine.kernel), "-initrd", str(machine.initrd), "-append", kernel_command_line(machine)]
    argv += ["-chardev", f"file,id=console,path={_escape(console)}", "-serial", "chardev:console"]
    argv += ["-chardev", f"socket,id=qmp,path={_escape(sockets / 'qmp.sock')},server=on,wait=off"]
    argv += ["-mon", "chardev=qmp,mode=control"]
    argv += ["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]
    argv += ["-chardev", f"socket,id=agent,path={_escape(sockets / 'agent.sock')},server=on,wait=off"]
    argv += ["-device", f"virtserialport,chardev=agent,name={AGENT_PORT}"]
    for index, disk in enumerate(machine.disks):
        argv += ["-blockdev", f"driver=file,node-name=d{index},filename={_escape(disk)},read-only=on,locking=off"]
        argv += ["-device", f"virtio-blk-pci,drive=d{index}"]
    for index, nic in enumerate(machine.nics):
        argv += _nic(machine, nic, index)
    return argv + list(machine.extra)


def printable(argv: Sequence[str]) -> str:
    """A command line to read or to paste into a shell."""
    return shlex.join(argv)
