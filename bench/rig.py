"""A NIC at the hands of the synthetic driver: production's event loop, device, queues and NIC in this process.

Only two things are not those of `vhost-user-tlsnic`: the rings are attached directly rather than through the
vhost-user socket, and the port is one that takes everything. So all checks are on, and so is the fault director's port,
which has nothing to do. Device and driver are pinned to a processor each, where there are two.

    with Rig(Shape(num=256, works={"plain": {}})) as rig:
        rig.run("plain", 100000, piece=10000)        # packets per second of each piece
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Final, Self

from nicdev import __version__
from nicdev.control import Control, Identity
from nicdev.edge.device import Device
from nicdev.edge.host import LinuxHost
from nicdev.edge.loop import Loop
from nicdev.edge.port import Port
from nicdev.edge.port_faulty import FaultyPort
from nicdev.nic import Nic, Packet
from nicdev.stats import Counter, Stats
from nicdev.tls.table import ContextTable
from nicdev.virtio import features
from nicdev.virtio.memory import GuestMemory, Region
from nicdev.virtio.ring import RingLayout, SplitRing
from testbed.errors import BedError
from testbed.stages import PROJECT

NO_FD: Final = -1
COMMANDS: Final = ("add_tx", "add_rx", "delete")  # works
DROPS: Final = [c for c in Counter if "_drop_" in c.name.lower() or "ERROR" in c.name or c is Counter.CMD_FAILED]


@dataclass(frozen=True)
class Shape:
    """What the driver is to prepare: a tx ring of `num` descriptors and the works by name (see bench/synthetic.py)."""

    num: int
    works: Mapping[str, Mapping[str, Any]]
    memory: int = 64 << 20  # bytes of guest memory
    max_contexts: int = 65536


@dataclass(frozen=True)
class Processors:
    """Where device and driver run; a driver without one of its own sleeps."""

    device: int
    driver: int | None

    @property
    def shared(self) -> bool:
        """Whether the driver has no processor to itself."""
        return self.driver is None or self.driver == self.device


def processors() -> Processors:
    """The first that we may use for the device, the last for the driver."""
    usable = sorted(os.sched_getaffinity(0))
    return Processors(usable[0], usable[-1])


@contextmanager
def pinned(processor: int) -> Iterator[None]:
    """This process on one processor only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {processor})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Recorder(Port):
    """Keeps copies of the first `keep` frames."""

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.frames: list[bytes] = []
        self._keep = keep

    def send(self, packet: Packet) -> bool:
        """Take one frame."""
        if len(self.frames) < self._keep:
            self.frames.append(bytes(packet.frame))
        return True


@dataclass
class Rig:
    """Device here, driver in another process. `totals` are the packets and commands that were posted so far."""

    shape: Shape
    where: Processors = field(default_factory=processors)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _open(self, stack: ExitStack) -> None:
        host = LinuxHost()
        memfd = os.memfd_create("guest")
        stack.callback(os.close, memfd)
        os.ftruncate(memfd, self.shape.memory)
        self._kick, self._call = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2))
        stack.callback(os.close, self._kick)
        stack.callback(os.close, self._call)
        config = {"num": self.shape.num, "works": self.shape.works, "sleeping": self.where.shared,
                  "processor": self.where.driver}  # fmt: skip
        self._driver = subprocess.Popen(
            [sys.executable, "-m", "bench.synthetic", *map(str, (memfd, self._kick, self._call)), json.dumps(config)],
            cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(memfd, self._kick, self._call),
        )  # fmt: skip
        stack.enter_context(self._driver)
        stack.callback(self._driver.kill)
        layout = RingLayout(*self._answer())
        view = host.map(memfd, 0, self.shape.memory)
        memory = GuestMemory([Region(0, 0, self.shape.memory, view)])
        stack.callback(self._forget)
        self.ring = SplitRing(memory, layout, event_idx=True, indirect=True)
        stats = Stats()
        table = ContextTable(self.shape.max_contexts, Loop.time)
        self.nic = Nic(stats, table, Control(Identity(__version__), table, stats), lambda: secrets.randbits(64))
        self.nic.features = features.OFFERED & ~features.VIRTIO_NET_F_MQ  # one queue pair
        self.totals = {"packets": 0, "commands": 0}

    def _forget(self) -> None:
        """Let the mapping go."""
        del self.ring

    def _answer(self) -> Any:
        assert self._driver.stdout is not None
        line = self._driver.stdout.readline()
        if not line:
            raise BedError(f"the synthetic driver ended with status {self._driver.wait()}")
        return json.loads(line)

    def run(self, work: str, count: int, piece: int, window: int = 0, **more: Any) -> list[float]:
        """Handle `count` chains of a work; chains per second of each whole piece but the first."""
        order = {"work": work, "count": count, "piece": piece, "window": window or self.shape.num, **more}
        marks = self._run(order, lambda loop: FaultyPort(loop, Port(), self.nic))
        return [1e9 * (done - before) / (at - since) for (before, since), (done, at) in pairwise(marks)]

    def record(self, work: str, count: int, keep: int) -> list[bytes]:
        """Handle `count` chains and return the first `keep` frames that left."""
        recorder = Recorder(keep)
        order = {"work": work, "count": count, "piece": count, "window": self.shape.num}
        self._run(order, lambda _: recorder)
        return recorder.frames

    def _run(self, order: Mapping[str, Any], port: Callable[[Loop], Port]) -> list[tuple[int, int]]:
        assert self._driver.stdin is not None
        assert self._driver.stdout is not None
        marks: list[tuple[int, int]] = []
        loop = Loop()

        def answered() -> None:
            marks.extend(self._answer())
            loop.stop()

        try:
            device = Device(loop, self.nic, port(loop), 1)
            device.queue_started(1, self.ring, self._kick, self._call, NO_FD)
            loop.watch(self._driver.stdout.fileno(), answered)
            self._driver.stdin.write(json.dumps(order).encode() + b"\n")
            self._driver.stdin.flush()
            with pinned(self.where.device):
                loop.run()
        finally:
            loop.close()
        self.totals["commands" if order["work"] in COMMANDS else "packets"] += order["count"]
        self._account()
        return marks

    def _account(self) -> None:
        """Everything that was posted was done, and nothing dropped. Raises BedError."""
        stats = self.nic.stats
        wrong = {c.name.lower(): stats[c] for c in DROPS if stats[c]}
        for name, counter in (("packets", Counter.TX_WIRE_PACKETS), ("commands", Counter.CMD_OK)):
            if stats[counter] != self.totals[name]:
                wrong[counter.name.lower()] = stats[counter]
        if wrong:
            raise BedError(f"posted {self.totals}, but the device has counted {wrong}")
