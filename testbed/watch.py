"""`make tcpdump`: tcpdump on the wire of the run that is going on, wherever its namespace is."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from testbed.errors import BedError, SetupError
from testbed.stages import BUILD
from testbed.wire.namespace import Wire

RUN_FILE: Final = BUILD / "run.json"


@contextmanager
def announced(wire: Wire) -> Iterator[None]:
    """Let `make tcpdump` find this wire for the time of the block."""
    mine = json.dumps({"pid": wire.pid, "interface": wire.interface})
    RUN_FILE.write_text(mine)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            if RUN_FILE.read_text() == mine:  # else another run has begun meanwhile
                RUN_FILE.unlink()


def running_wire() -> Wire:
    """The wire of the run that announced itself last. Raises SetupError when there is none."""
    try:
        run = json.loads(RUN_FILE.read_text())
        command = Path(f"/proc/{run['pid']}/cmdline").read_bytes()
    except (OSError, ValueError, KeyError):
        command = b""
    if b"nicdev" not in command:
        raise SetupError("no run is going on; start `make run` in another terminal first")
    return Wire(run["pid"], run["interface"])


def main() -> int:
    """Become tcpdump, with the arguments given."""
    try:
        wire = running_wire()
        argv = wire.argv([sys.executable, "-m", "testbed.wire.tcpdump", "-n", "-i", wire.interface, *sys.argv[1:]])
    except BedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return os.execvp(argv[0], argv)


if __name__ == "__main__":
    sys.exit(main())
