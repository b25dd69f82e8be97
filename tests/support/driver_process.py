"""A driver in a process of its own, for tests in which both sides of a ring must truly run at the same time.

Arguments: memfd kick call num count event_idx seed. It posts `count` chains in random bursts and takes them back,
sleeping whenever there is nothing to do. Exit status 0 when all came back, 3 when it waited 5 s for a signal that
never came.
"""

from __future__ import annotations

import mmap
import os
import random
import select
import sys

from tests.support.fake_driver import FakeQueue

PATIENCE = 5.0
LOST_SIGNAL = 3
DATA = 1 << 16


def main(arguments: list[str]) -> int:
    """Run the driver; returns the exit status."""
    memfd, kick, call, num, count, event_idx, seed = map(int, arguments)
    rng = random.Random(seed)
    ram = memoryview(mmap.mmap(memfd, os.fstat(memfd).st_size))
    queue = FakeQueue(ram, 0, num, event_idx=bool(event_idx), start=65000)
    os.eventfd_write(kick, 1)  # the queue is ready
    posted = done = 0
    while done < count:
        for _ in range(min(rng.randint(1, num), len(queue.free), count - posted)):
            queue.add([(DATA, rng.randint(1, 64))], [])
            posted += 1
        if queue.publish():
            os.eventfd_write(kick, 1)
        done += len(queue.collect())
        if queue.in_flight and not queue.want_signal():
            if not select.select([call], [], [], PATIENCE)[0]:
                return LOST_SIGNAL
            os.eventfd_read(call)
        done += len(queue.collect())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
