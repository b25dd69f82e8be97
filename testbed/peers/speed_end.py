"""python -m testbed.peers.speed_end: does the jobs of speed.py, speed_small.py and speed_many.py, until stdin ends."""

from __future__ import annotations

import json
import resource
import sys

from testbed.peers.speed import Bulk
from testbed.peers.speed_many import Many
from testbed.peers.speed_small import Small


class Program(Bulk, Small, Many):
    """All verbs."""


def main() -> int:
    """Entry point."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    program = Program()
    for line in sys.stdin:
        job = json.loads(line)
        try:
            result = getattr(program, "do_" + job["do"])(job)
        except Exception as error:  # noqa: BLE001 - whatever it is, the result line tells it
            result = {"error": f"{job['do']}: {type(error).__name__}: {error}"}
        print(json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
