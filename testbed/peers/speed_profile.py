"""What the guest's processors are at: samples of all of them by function. Runs in the guest, which has no perf.

    python3 -m testbed.peers.speed_profile SECONDS

prints {"idle": n, "functions": {"name" or "name [module]": n, "user": n}, "inside": the same}. A sample belongs to one
function, and is inside all those of the kernel that had called it. The clock's interrupt takes the samples
(perf_event_open(2), PERF_COUNT_SW_CPU_CLOCK), so what runs with interrupts disabled is seen at its end.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import platform
import struct
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Final

# linux/perf_event.h
SYSCALL: Final = {"x86_64": 298, "aarch64": 241}
PERF_TYPE_SOFTWARE: Final = 1
PERF_COUNT_SW_CPU_CLOCK: Final = 0
PERF_SAMPLE_IP: Final = 1 << 0
PERF_SAMPLE_CALLCHAIN: Final = 1 << 5
PERF_RECORD_SAMPLE: Final = 9
PERF_EVENT_IOC_ENABLE: Final = 0x2400
PERF_EVENT_IOC_DISABLE: Final = 0x2401
FLAG_DISABLED: Final = 1 << 0
FLAG_FREQ: Final = 1 << 10
FLAG_EXCLUDE_CALLCHAIN_USER: Final = 1 << 22
PERF_CONTEXT_MAX: Final = (1 << 64) - 4095  # from here on no address, but a mark in a call chain
ATTR: Final = struct.Struct("=IIQQQQQ80x")  # type, size, config, sample_freq, sample_type, read_format, flags
DATA_HEAD, DATA_OFFSET = 1024, 1040  # in struct perf_event_mmap_page
RECORD: Final = struct.Struct("=IHH")  # struct perf_event_header: type, misc, size

HERTZ: Final = 997  # in step with nothing
PAGES: Final = 1024  # of samples, per processor: minutes
IDLE: Final = frozenset(("pv_native_safe_halt", "default_idle", "mwait_idle_with_hints", "acpi_safe_halt"))
KERNEL: Final = 1 << 63


def opened(processor: int) -> tuple[int, mmap.mmap]:
    """A clock of this processor that does not run yet, and where its samples go. Raises OSError."""
    flags = FLAG_DISABLED | FLAG_FREQ | FLAG_EXCLUDE_CALLCHAIN_USER
    sample = PERF_SAMPLE_IP | PERF_SAMPLE_CALLCHAIN
    packed = ATTR.pack(PERF_TYPE_SOFTWARE, ATTR.size, PERF_COUNT_SW_CPU_CLOCK, HERTZ, sample, 0, flags)
    attr = ctypes.create_string_buffer(packed, ATTR.size)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(SYSCALL[platform.machine()], attr, -1, processor, -1, 0)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "perf_event_open")
    return fd, mmap.mmap(fd, (1 + PAGES) * mmap.PAGESIZE)


def chains(samples: mmap.mmap) -> Iterator[list[int]]:
    """Of each sample where it was, and where that was called from, innermost first."""
    (head,) = struct.unpack_from("=Q", samples, DATA_HEAD)
    start = struct.unpack_from("=Q", samples, DATA_OFFSET)[0] or mmap.PAGESIZE
    at = 0
    while at < head:
        kind, _, size = RECORD.unpack_from(samples, start + at)
        if kind == PERF_RECORD_SAMPLE:
            here, count = struct.unpack_from("=QQ", samples, start + at + RECORD.size)
            callers = struct.unpack_from(f"={count}Q", samples, start + at + RECORD.size + 16)
            yield [here, *(caller for caller in callers if caller < PERF_CONTEXT_MAX)]
        at += size


def symbols() -> tuple[list[int], list[str]]:
    """The kernel's functions by address."""
    with open("/proc/kallsyms") as lines:
        found = sorted((int(line[0], 16), " ".join(line[2:4])) for line in map(str.split, lines))
    return [address for address, _ in found], [name for _, name in found]


def main() -> int:
    """Entry point."""
    with ExitStack() as stack:
        clocks = [opened(processor) for processor in range(os.cpu_count() or 1)]
        for fd, samples in clocks:
            stack.callback(os.close, fd)
            stack.enter_context(samples)
        for fd, _ in clocks:
            fcntl.ioctl(fd, PERF_EVENT_IOC_ENABLE)
        time.sleep(float(sys.argv[1]))  # the time that is sampled; nothing is waited for
        for fd, _ in clocks:
            fcntl.ioctl(fd, PERF_EVENT_IOC_DISABLE)
        starts, names = symbols()
        taken = Counter(tuple(chain) for _, samples in clocks for chain in chains(samples))

        @cache
        def name(address: int) -> str:
            return names[bisect_right(starts, address) - 1] if address >= KERNEL else "user"

        json.dump(counted((tuple(map(name, chain)), count) for chain, count in taken.items()), sys.stdout)
    return 0


def counted(named: Iterable[tuple[Sequence[str], int]]) -> dict[str, object]:
    """What is printed, of functions innermost first and how often they were seen so."""
    idle, functions, inside = 0, Counter[str](), Counter[str]()
    for chain, count in named:
        if chain[0] in IDLE:
            idle += count
            continue
        functions[chain[0]] += count
        inside.update(dict.fromkeys(chain, count))
    return {"idle": idle, "functions": functions, "inside": inside}


if __name__ == "__main__":
    sys.exit(main())
