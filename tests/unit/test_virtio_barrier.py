"""The barrier's choice.

Whether it orders anything is argued in barrier.py and tried by tests/device/test_ring_processes.py.
"""

from __future__ import annotations

import platform

import pytest

from nicdev.errors import ConfigError
from nicdev.virtio.barrier import WEAKLY_ORDERED, barrier_for, full_barrier, membarrier

MEMBARRIER = {"x86_64": 324, "aarch64": 283, "riscv64": 283}  # asm/unistd_64.h, asm-generic/unistd.h


def test_this_machine_has_one() -> None:
    full_barrier()
    barrier_for(platform.machine())()
    assert WEAKLY_ORDERED is (platform.machine() != "x86_64")


def test_the_other_kind_works_too() -> None:
    """What aarch64 and riscv64 use, with this machine's number for it."""
    membarrier(MEMBARRIER[platform.machine()])()


@pytest.mark.parametrize("machine", ["s390x", "ppc64le", "i686", ""])
def test_machine_that_nobody_thought_through(machine: str) -> None:
    with pytest.raises(ConfigError, match="barrier"):
        barrier_for(machine)


def test_kernel_without_the_system_call() -> None:
    with pytest.raises(ConfigError, match="membarrier"):
        membarrier(1_000_000)
