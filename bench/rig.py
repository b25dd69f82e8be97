"""A NIC at the hands of the synthetic driver: production's event loop, device, queues and NIC in this process.

Only two things are not those of `vhost-user-tlsnic`: the rings are attached directly rather than through the
vhost-user socket, and the port is one that takes everything. So all checks are on, and so is the fault director's port,
which has nothing to do. Device and driver are pinned to a processor each, where there are two.

    with Rig(Shape(num=256, works={"plain": {}})) as rig:
        rig.run("plain", 100000, piece=10000).pieces        # packets per second of each piece
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

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
DIES_WITH_US: Final = ("setpriv", "--pdeathsig", "KILL", "--")
TX, RX = 1, 0  # vring numbers
COMMANDS: Final = ("add_tx", "add_rx", "delete")  # works
DROPS: Final = [
    c for c in Counter
    if "_drop_" in c.name.lower() or "ERROR" in c.name or c in (Counter.CMD_FAILED, Counter.EVENTS_SENT)
]  # fmt: skip
MakePort = Callable[[Loop], Port]


@dataclass(frozen=True)
class Shape:
    """What the driver is to prepare: a tx ring of `num` descriptors and the works by name (see bench/synthetic.py)."""

    num: int
    works: Mapping[str, Mapping[str, Any]]
    memory: int = 64 << 20  # bytes of guest memory
    max_contexts: int = 65536
    rx_buffers: int = 0  # size of the rx ring; 0: none


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


class Run(NamedTuple):
    """What came of an order. Marks are (chains so far, time in ns)."""

    marks: list[tuple[int, int]]
    chains: int
    processor_seconds: float  # that the device took
    kicks: int  # that the driver had to give: how often the device had run out of work

    @property
    def pieces(self) -> list[float]:
        """Chains per second of each piece."""
        return [1e9 * (done - before) / (at - since) for (before, since), (done, at) in pairwise(self.marks)]

    @property
    def by_processor(self) -> float:
        """Chains per second of processor time: less at the mercy of what else runs, but blind to waiting."""
        return self.chains / self.processor_seconds


class TimedLoop(Loop):
    """Production's loop, in which somebody has a look between any two bursts (some 0.1 us)."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        super().__init__()

    def soon(self, callback: Callable[[], None]) -> None:
        """A queue with more to do asks for that after every burst."""
        self._look()
        super().soon(callback)

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """A port reads a burst when there is something to read."""

        def called() -> None:
            callback()
            self._look()

        super().watch(fd, called)


class Progress:
    """Marks of a ring: when another `piece` of its chains had been taken.

    They are the device's. A driver that is held up would see one too late, and think the next piece too fast.
    """

    def __init__(self, ring: SplitRing, piece: int) -> None:
        self.marks: list[tuple[int, int]] = []
        self._ring = ring
        self._piece = piece
        self._base = ring.base
        self._done = self._next = 0

    def look(self) -> None:
        """Make a mark if it is time."""
        base = self._ring.base
        self._done += (base - self._base) & 0xFFFF
        self._base = base
        if self._done >= self._next:
            self.marks.append((self._done, time.perf_counter_ns()))
            self._next = self._done + self._piece


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


class Rig:
    """Device here, driver in another process. `posted` counts chains by what they are, and frames from the port."""

    def __init__(self, shape: Shape, where: Processors | None = None) -> None:
        self.shape = shape
        self.where = where or processors()
        stats = Stats()
        table = ContextTable(shape.max_contexts, Loop.time)
        self.nic = Nic(stats, table, Control(Identity(__version__), table, stats), lambda: secrets.randbits(64))
        self.nic.features = features.OFFERED & ~features.VIRTIO_NET_F_MQ  # one queue pair
        self.posted = {Counter.TX_WIRE_PACKETS: 0, Counter.CMD_OK: 0, Counter.RX_WIRE_PACKETS: 0, Counter.HELLOS: 0}
        self.rings: dict[int, SplitRing] = {}
        self.layouts: dict[int, list[int]] = {}
        self._events: dict[int, tuple[int, int]] = {}  # kick, call

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
        memfd = os.memfd_create("guest")
        stack.callback(os.close, memfd)
        os.ftruncate(memfd, self.shape.memory)
        indexes = (TX, RX) if self.shape.rx_buffers else (TX,)
        for index in indexes:
            self._events[index] = (os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK))
            for fd in self._events[index]:
                stack.callback(os.close, fd)
        fds = (memfd, *(fd for index in indexes for fd in self._events[index]))
        config = {"num": self.shape.num, "works": self.shape.works, "rx_buffers": self.shape.rx_buffers,
                  "sleeping": self.where.shared, "processor": self.where.driver}  # fmt: skip
        self._driver = subprocess.Popen(
            [*DIES_WITH_US, sys.executable, "-m", "bench.synthetic", json.dumps(config), *map(str, fds)],
            cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=fds,
        )  # fmt: skip
        stack.enter_context(self._driver)
        stack.callback(self._driver.kill)
        self.layouts = dict(zip(indexes, self._answer(), strict=True))  # as in RingLayout
        self.memory = LinuxHost().map(memfd, 0, self.shape.memory)
        memory = GuestMemory([Region(0, 0, self.shape.memory, self.memory)])
        for index, layout in self.layouts.items():
            self.rings[index] = SplitRing(memory, RingLayout(*layout), event_idx=True, indirect=True)

    def _answer(self) -> Any:
        assert self._driver.stdout is not None
        line = self._driver.stdout.readline()
        if not line:
            raise BedError(f"the synthetic driver ended with status {self._driver.wait()}")
        return json.loads(line)

    def tell(self, order: Mapping[str, Any]) -> None:
        """Send the driver an order."""
        assert self._driver.stdin is not None
        self._driver.stdin.write(json.dumps(order).encode() + b"\n")
        self._driver.stdin.flush()

    def run(self, work: str, count: int, piece: int = 0, window: int = 0, port: MakePort | None = None) -> Run:
        """Have `count` chains of a work handled, at most `window` at a time, and a mark made at every `piece`.

        Raises BedError, also where not all was done, or anything dropped.
        """
        order = {"work": work, "count": count, "window": window or self.shape.num}
        self.posted[_counter(work)] += count
        return self.serve(order, port or (lambda loop: FaultyPort(loop, Port(), self.nic)), self.rings[TX], piece)

    def again(self, work: str) -> None:
        """Let a work begin anew with its first chain."""
        self.tell({"again": work})

    def record(self, work: str, count: int, keep: int) -> list[bytes]:
        """Handle `count` chains and return the first `keep` frames that left."""
        recorder = Recorder(keep)
        self.run(work, count, port=lambda _: recorder)
        return recorder.frames

    def serve(self, order: Mapping[str, Any], port: MakePort, ring: SplitRing, piece: int = 0) -> Run:
        """Be the device until the driver has answered to `order`; marks are of `ring`. Raises BedError as `run`."""
        assert self._driver.stdout is not None
        answers: list[int] = []
        progress = Progress(ring, piece or order["count"])
        loop = TimedLoop(progress.look)

        def answered() -> None:
            loop.stop()
            answers.append(self._answer())

        with pinned(self.where.device), closing(loop), closing(port(loop)) as wire:
            device = Device(loop, self.nic, wire, 1)
            device.features_set(self.nic.features)
            for index, attached in self.rings.items():
                device.queue_started(index, attached, *self._events[index], NO_FD)
            loop.watch(self._driver.stdout.fileno(), answered)
            self.tell(order)
            began = time.process_time()
            loop.run()
            took = time.process_time() - began
        self._account()
        return Run(progress.marks, order["count"], took, answers[0])

    def _account(self) -> None:
        """Everything that was posted was done, and nothing dropped. Raises BedError."""
        stats = self.nic.stats
        expected = dict.fromkeys(DROPS, 0) | self.posted
        wrong = {c.name.lower(): f"{stats[c]}, not {count}" for c, count in expected.items() if stats[c] != count}
        if wrong:
            raise BedError(f"the device has counted {wrong}")


def _counter(work: str) -> Counter:
    """What counts the chains of a work."""
    if work == "hello":
        return Counter.HELLOS
    return Counter.CMD_OK if work in COMMANDS else Counter.TX_WIRE_PACKETS
