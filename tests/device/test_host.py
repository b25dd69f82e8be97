"""The operating system as the back-end sees it: guest memory is mapped and unmapped, events are signalled."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nicdev.edge.host import LinuxHost
from nicdev.errors import ProtocolError
from tests.support.frontend_bench import mappings, open_fds


def test_unmap_waits_for_the_last_view() -> None:
    """A chain that is still looked at when its region goes keeps the bytes, and only the bytes, alive."""
    host = LinuxHost()
    fd = os.memfd_create("fake-guest")
    os.ftruncate(fd, 8192)
    before = open_fds(), mappings()
    view = host.map(fd, 0, 8192)
    chain = view[100:200]
    host.unmap(view)
    chain[:] = b"x" * 100
    assert os.pread(fd, 100, 100) == b"x" * 100
    del chain
    assert (open_fds(), mappings()) == before
    os.close(fd)


def test_guest_memory_is_not_in_core_dumps() -> None:
    host = LinuxHost()
    fd = os.memfd_create("fake-guest")
    os.ftruncate(fd, 8192)
    view = host.map(fd, 0, 8192)
    smaps = Path("/proc/self/smaps").read_text()
    entry = smaps[smaps.index("memfd:fake-guest") :]
    flags = entry[entry.index("VmFlags:") :].splitlines()[0].split()
    assert "dd" in flags
    host.unmap(view)
    os.close(fd)


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 8193), (8192, 1), (1 << 63, 1), (0, 1 << 63), ((1 << 64) - 4096, 4096)]
)
def test_map_beyond_the_file(offset: int, size: int) -> None:
    fd = os.memfd_create("short")
    os.ftruncate(fd, 8192)
    with pytest.raises(ProtocolError):
        LinuxHost().map(fd, offset, size)
    os.close(fd)


def test_signal_never_blocks_or_fails() -> None:
    host = LinuxHost()
    fd = os.eventfd((1 << 32) - 1, 0)
    host.check_event(fd)
    os.eventfd_write(fd, (1 << 64) - 2 - ((1 << 32) - 1))
    host.signal(fd)
    os.close(fd)
    reader, writer = os.pipe()
    host.check_event(writer)
    os.close(reader)
    host.signal(writer)
    os.close(writer)
