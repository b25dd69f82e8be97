"""The full memory barrier that Python does not have.

A virtqueue's two sides each store one word and then load the other's: we store used.idx and load used_event, or
store avail_event and load avail.idx; the driver does the mirror image. If both loads may overtake both stores, each
side concludes that the other is awake, and the ring hangs silently with work queued. Every architecture, x86
included, lets a load overtake an older store unless a full barrier stands between. This module is the one place
that provides it; ring.py is the one place that uses it.

x86-64  An uncontended acquire and release of a `threading.Lock` is, in every CPython from 3.11 on, at least one
        atomic read-modify-write: sem_trywait and sem_post of the C library through 3.12 (LOCK CMPXCHG both), an
        inlined sequentially consistent compare-and-exchange since 3.13. Semaphores may live between processes and
        PyMutex is compiled in, so neither drops the LOCK prefix in a program of one thread, as the C library's own
        mutexes do. A locked instruction orders all earlier loads and stores before all later ones (Intel SDM 3A
        9.2.3.9, AMD APM 2 7.4.2). 60 ns. The compiler cannot move our accesses across it: each side of the call is
        an opaque function of the interpreter. All other reordering that a ring cares about (store-store, load-load,
        load-store) does not exist for write-back memory on x86.
others  On aarch64 and riscv64 acquiring and releasing a lock is acquire and release only: an older store may still
        sink past a younger load. What does order everything there, is in every Linux kernel since 4.16 and needs no
        library, is membarrier(MEMBARRIER_CMD_GLOBAL_EXPEDITED): the calling thread runs smp_mb() on its way in and
        out whether or not anybody has registered. (PRIVATE_EXPEDITED does nothing at all in a process of one
        thread.) About 1 us, once per batch. These machines also reorder independent stores and loads, so ring.py
        asks for a barrier at `WEAKLY_ORDERED` places too.

Rejected: a system call of any other kind (kernel entry promises no barrier), ctypes on libatomic (often not
installed), polling.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Callable
from typing import Final

from nicdev.errors import ConfigError

_MEMBARRIER: Final = 283  # the number in the kernel's generic system call table
_QUERY: Final = 0
_GLOBAL_EXPEDITED: Final = 1 << 1
_STRONGLY_ORDERED: Final = frozenset({"x86_64"})
_GENERIC_SYSCALLS: Final = frozenset({"aarch64", "riscv64"})

WEAKLY_ORDERED: Final = platform.machine() not in _STRONGLY_ORDERED


def _locked_instruction() -> Callable[[], None]:
    lock = threading.Lock()
    acquire, release = lock.acquire, lock.release

    def barrier() -> None:
        acquire()
        release()

    return barrier


def membarrier(number: int = _MEMBARRIER) -> Callable[[], None]:
    """A barrier by the membarrier system call of that number; raises ConfigError where the kernel does not offer it."""
    syscall = ctypes.CDLL(None).syscall
    syscall.restype = ctypes.c_long
    syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_uint]
    offered = syscall(number, _QUERY, 0)
    if offered < 0 or not offered & _GLOBAL_EXPEDITED:
        raise ConfigError("this kernel has no membarrier(MEMBARRIER_CMD_GLOBAL_EXPEDITED), which virtqueues need here")

    def barrier() -> None:
        syscall(number, _GLOBAL_EXPEDITED, 0)

    return barrier


def barrier_for(machine: str) -> Callable[[], None]:
    """The full barrier of a machine as `platform.machine` names it; raises ConfigError for one that nobody thought
    through."""
    if machine in _STRONGLY_ORDERED:
        return _locked_instruction()
    if machine in _GENERIC_SYSCALLS:
        return membarrier()
    raise ConfigError(f"virtqueues need a full memory barrier, and none is known for {machine}")


full_barrier: Final = barrier_for(platform.machine())
"""Orders every memory access before the call before every access after it."""
