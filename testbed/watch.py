"""`make tcpdump`, `make wire` and `make ctl`: into the run that is going on, from another terminal.

Wherever the namespace and the control socket of its NIC are: the run says so in a file.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from testbed.errors import BedError, SetupError
from testbed.nic import NicProcess
from testbed.stages import BUILD
from testbed.wire.namespace import Wire

RUN_FILE: Final = BUILD / "run.json"


@dataclass(frozen=True)
class Run:
    """What of a run can be reached from outside."""

    wire: Wire
    control: Path

    def command(self, verb: str, arguments: Sequence[str]) -> list[str]:
        """What to execute for a verb: tcpdump, wire (a program at the wire's end; none: a shell), ctl."""
        if verb == "tcpdump":
            program = [sys.executable, "-m", "testbed.wire.tcpdump", "-n", "-i", self.wire.interface]
            return self.wire.argv([*program, *arguments])
        if verb == "wire":
            return self.wire.argv(arguments or [os.environ.get("SHELL", "sh")])
        if verb == "ctl":
            return [sys.executable, "-m", "nicdev.ctl", str(self.control), *arguments]
        raise SetupError(f"{verb}: choose tcpdump, wire or ctl")


@contextmanager
def announced(nic: NicProcess, wire: Wire) -> Iterator[None]:
    """Let others find this NIC and wire for the time of the block."""
    mine = json.dumps({"pid": wire.pid, "interface": wire.interface, "control": str(nic.control_path)})
    RUN_FILE.write_text(mine)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            if RUN_FILE.read_text() == mine:  # else another run has begun meanwhile
                RUN_FILE.unlink()


def going_on() -> Run:
    """The run that announced itself last. Raises SetupError when there is none."""
    try:
        said = json.loads(RUN_FILE.read_text())
        run = Run(Wire(said["pid"], said["interface"]), Path(said["control"]))
        command = Path(f"/proc/{run.wire.pid}/cmdline").read_bytes()
    except (OSError, ValueError, KeyError):
        command = b""
    if b"nicdev" not in command:
        raise SetupError("no run is going on; start `make run` in another terminal first")
    return run


def main() -> int:
    """Become what the verb stands for, with the arguments given."""
    try:
        argv = going_on().command(sys.argv[1] if len(sys.argv) > 1 else "", sys.argv[2:])
        os.execvp(argv[0], argv)
    except OSError as error:
        print(f"error: {argv[0]}: {error.strerror}", file=sys.stderr)
    except BedError as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
