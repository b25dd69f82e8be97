"""Driver and device on two processors: no kick and no signal may be lost, nothing may be used twice.

This is where a missing barrier shows: each side goes to sleep believing that the other will wake it.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from nicdev.edge.host import LinuxHost
from nicdev.virtio.memory import GuestMemory, Region
from nicdev.virtio.ring import RingLayout, SplitRing
from tests.support.driver_process import PATIENCE
from tests.support.fake_driver import FakeQueue

ROOT = Path(__file__).parents[2]
SIZE = 1 << 17


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("num", "event_idx", "count"), [(2, True, 100000), (4, False, 100000), (64, True, 300000)])
def test_nothing_is_lost_between_processes(num: int, event_idx: bool, count: int, late: bool) -> None:
    host = LinuxHost()
    memfd = os.memfd_create("ring")
    os.ftruncate(memfd, SIZE)
    kick, call = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    arguments = [str(n) for n in (memfd, kick, call, num, count, int(event_idx), 7)]
    driver = subprocess.Popen(
        [sys.executable, "-m", "tests.support.driver_process", *arguments], cwd=ROOT, pass_fds=(memfd, kick, call)
    )
    pid = os.pidfd_open(driver.pid)
    try:
        assert select.select([kick, pid], [], [], 20)[0] == [kick], "the driver did not come up"
        os.eventfd_read(kick)
        view = host.map(memfd, 0, SIZE)
        where = FakeQueue(memoryview(bytearray(SIZE)), 0, num)
        layout = RingLayout(num, where.desc_at, where.avail_at, where.used_at)
        ring = SplitRing(GuestMemory([Region(0, 0, SIZE, view)]), layout, base=65000, event_idx=event_idx)
        done = serve(ring, host, kick, call, pid, late=late)
        assert driver.wait(PATIENCE) == 0, "a signal was lost"
        assert done == count
    finally:
        driver.kill()
        driver.wait()
        for fd in (memfd, kick, call, pid):
            os.close(fd)


def serve(ring: SplitRing, host: LinuxHost, kick: int, call: int, pid: int, *, late: bool) -> int:
    """Be the device until the driver's process ends; returns the number of chains used.

    `late`: a signal that is owed waits until there is nothing else to do.
    """
    done = 0
    while True:
        ring.suppress_kicks()
        while (chain := ring.pop()) is not None:
            ring.push(chain[0], 0)
            done += 1
        owed = ring.show() if late else ring.publish()
        if owed and not late:
            host.signal(call)
        if ring.want_kicks():
            continue
        if owed and late and ring.publish():
            host.signal(call)
        ready = select.select([kick, pid], [], [], 2 * PATIENCE)[0]
        assert ready, "neither a kick nor the driver's end"
        if kick not in ready:
            return done
        os.eventfd_read(kick)
