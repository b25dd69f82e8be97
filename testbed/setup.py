"""Prepare everything a guest needs, stage by stage: `python -m testbed.setup [--kernel 6.12]`.

testbed/bootstrap has done the first two stages (Debian packages, Python environment) in shell, as Python may have been
missing. `prepare` is also what tests and demonstrations call; with everything cached it takes well under a second.
"""

from __future__ import annotations

import argparse
import os
import pwd
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nicdev.edge.port_tap import open_tun
from nicdev.errors import ConfigError
from testbed.assets import driver, image
from testbed.assets.image import DEFAULT_KERNEL, Kernel, kernel_named
from testbed.errors import BedError, SetupError
from testbed.stages import BUILD, Progress, build_lock, say
from testbed.vm import accel
from testbed.vm.qemu import Accel, Machine, Qemu

SHELL_STAGES = 2
STAGES = SHELL_STAGES + 4


@dataclass(frozen=True)
class Assets:
    """What `prepare` made; `machine` boots it with no NIC, to be completed with dataclasses.replace."""

    kernel: Kernel
    module: Path | None
    initrd: Path
    qemu: Qemu
    accel: Accel

    @property
    def machine(self) -> Machine:
        """A guest with these parts."""
        disks = (BUILD / "guest.squashfs", self.kernel.folder / "modules.squashfs")
        machine = Machine(self.qemu, self.accel, self.kernel.image, self.initrd, disks)
        return machine if self.module else replace(machine, driver="none")

    @property
    def summary(self) -> str:
        """One line: kernel, QEMU, accelerator and why."""
        return f"kernel {self.kernel.release}, {self.qemu}, {self.accel}"


def prepare(
    kernel_name: str | None = None, *, with_driver: bool = True, environ: Mapping[str, str] = os.environ
) -> Assets:
    """Build what is not there yet, one line per stage; the default kernel is `environ["KERNEL"]`. Raises SetupError."""
    kernel = kernel_named(kernel_name or environ.get("KERNEL") or DEFAULT_KERNEL)
    accel.check_wishes(environ)
    check_namespaces()
    with build_lock(say):
        progress = Progress(STAGES, SHELL_STAGES + 1)
        _stage(progress, f"kernel {kernel.name} and its compiler", lambda: image.build_kernel(kernel))
        _stage(progress, f"guest root file system ({image.GUEST_SUITE})", image.build_guest)
        module = None
        if with_driver:
            _stage(progress, f"driver for {kernel.release}", lambda: driver.build(kernel)[1])
            module = kernel.folder / "driver" / driver.MODULE
        else:
            progress.number += 1
        initrd = image.write_initrd(kernel, module)
        with progress.stage("QEMU and accelerator") as outcome:
            qemu, chosen = accel.choose(kernel.image, kernel.release, environ)
            outcome.append(f"{qemu}, {chosen}")
    return Assets(kernel, module, initrd, qemu, chosen)


def check_namespaces() -> None:
    """Images and driver are made in namespaces of their own. Raises SetupError when this user may not have them."""
    if os.geteuid() == 0:
        return
    tried = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "true"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        raise SetupError(f"user namespaces are forbidden here ({tried.stderr.strip()}); allow them, or run as root")
    user = pwd.getpwuid(os.geteuid()).pw_name
    for name in ("/etc/subuid", "/etc/subgid"):
        path = Path(name)
        entries = [line.split(":")[0] for line in path.read_text().splitlines()] if path.exists() else []
        if not {user, str(os.geteuid())} & set(entries):
            cure = f"usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
            raise SetupError(f"{name} has no ids for {user}'s user namespaces; as root: {cure}")


def check_tap() -> None:
    """The NIC's wire is a tap. Raises SetupError when this user may not make one."""
    try:
        os.close(open_tun())
    except ConfigError as error:
        raise SetupError(str(error)) from error


def _stage(progress: Progress, title: str, build: Callable[[], bool]) -> None:
    with progress.stage(title) as outcome:
        if not build():
            outcome.append("cached")


def main() -> int:
    """Command line; errors are one line."""
    parser = argparse.ArgumentParser(prog="testbed.setup", description="Prepare what a guest needs, under build/.")
    parser.add_argument("--kernel", help=f"one of {', '.join(image.KERNELS)}; default $KERNEL or {DEFAULT_KERNEL}")
    parser.add_argument("--without-driver", action="store_true", help="for guests with a stock driver only")
    arguments = parser.parse_args()
    try:
        prepare(arguments.kernel, with_driver=not arguments.without_driver)
    except BedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
