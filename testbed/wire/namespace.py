"""How to run programs where the wire is: in the network namespace of a running NIC, as root or without.

A NIC started by an ordinary user has made a user namespace too; joining that first gives the rights to join the
other. Programs are killed when the thread that started them ends, so nothing is left behind.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from testbed.errors import SetupError

INTERFACE: Final = "wire0"


class Wire:
    """The namespace of process `pid`, whose wire side is `interface`."""

    def __init__(self, pid: int, interface: str = INTERFACE) -> None:
        self.pid = pid
        self.interface = interface

    def argv(self, argv: Sequence[str]) -> list[str]:
        """`argv` as it must be run from here."""
        try:
            foreign = Path(f"/proc/{self.pid}/ns/user").stat().st_ino != Path("/proc/self/ns/user").stat().st_ino
        except OSError as error:
            raise SetupError(
                f"cannot enter the NIC's network namespace: {error.strerror} (process {self.pid})"
            ) from None
        enter = ["nsenter", "--target", str(self.pid), "--net"]
        if foreign:
            enter += ["--user", "--preserve-credentials"]
        return [*enter, "--", "setpriv", "--pdeathsig", "KILL", "--", *argv]

    def run(self, argv: Sequence[str], timeout: float = 30) -> str:
        """Run to the end and return standard output. Raises SetupError with the program's words when it fails."""
        done = subprocess.run(
            self.argv(argv), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False
        )
        if done.returncode:
            raise SetupError(f"{argv[0]} in the wire's namespace: {done.stderr.strip() or f'status {done.returncode}'}")
        return done.stdout

    def popen(
        self, argv: Sequence[str], stdin: int | IO[bytes] = subprocess.DEVNULL, **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start and return; the process id is the program's own."""
        return subprocess.Popen(self.argv(argv), stdin=stdin, **options)


@contextmanager
def held_wire(interface: str = INTERFACE) -> Iterator[Wire]:
    """A namespace with a tap that outlives any NIC: one with `--port tap:netns=current` in it takes the tap over.

    So NICs come and go while the peers' connections, routes and captures stay. Raises SetupError.
    """
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    script = f"ip link set lo up && ip tuntap add dev {interface} mode tap vnet_hdr && echo ready && exec cat"
    argv = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", *user, "--", "setpriv", "--pdeathsig", "KILL"]
    pipe = subprocess.PIPE
    with subprocess.Popen([*argv, "sh", "-c", script], stdin=pipe, stdout=pipe, stderr=pipe) as holder:
        assert holder.stdout is not None
        assert holder.stderr is not None
        try:
            if holder.stdout.readline() != b"ready\n":
                raise SetupError(f"cannot make a network namespace: {holder.stderr.read().decode().strip()}")
            yield Wire(holder.pid, interface)
        finally:
            holder.kill()
