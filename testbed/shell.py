"""`make shell`: a guest with a plain network card, and a shell in it."""

from __future__ import annotations

import sys
from dataclasses import replace

from testbed.errors import BedError
from testbed.guest import Guest
from testbed.qemu import UserNic
from testbed.setup import prepare
from testbed.stages import say
from testbed.terminal import interact


def main() -> int:
    """Boot, hand over the terminal, clean up; without a terminal say so instead."""
    try:
        if not sys.stdin.isatty():
            raise BedError("a shell needs a terminal")
        assets = prepare(with_driver=False)
        with Guest(replace(assets.machine, nics=(UserNic(),), driver="virtio_net", name="shell")) as guest:
            say(f"kernel {guest.about['kernel']}, {guest.boot_seconds:.1f} s to boot; leave with `exit` or Ctrl-]")
            interact(guest.agent)
    except BedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
