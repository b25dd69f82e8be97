"""The operating system as vhost/host.py wants it: guest memory mapped, event fds checked and signalled, fds closed.

A mapping lives until the last view of it is gone: `unmap` closes it at once if nothing looks into it any more, else
it goes with the chain that still does. So no order of messages can leave a view of unmapped memory behind.

The peer can shrink a file after we mapped it; touching the lost pages raises SIGBUS, which no Python code survives.
We refuse what is too short when it is mapped; against a peer that truncates later only a restart helps.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from typing import Final

from nicdev.errors import ProtocolError

_ONE: Final = (1).to_bytes(8, "little")


class LinuxHost:
    """Implements nicdev.vhost.host.Host."""

    def map(self, fd: int, offset: int, size: int) -> memoryview:
        """Map `size` bytes of `fd` from `offset`, in whole pages of whatever size the file system has."""
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise ProtocolError("guest memory is not a file or memfd")
        if offset + size > info.st_size:
            raise ProtocolError(f"guest memory of {offset} + {size} bytes in a file of {info.st_size}")
        page = max(info.st_blksize, mmap.ALLOCATIONGRANULARITY)
        start = offset - offset % page
        end = min(-(-(offset + size) // page) * page, info.st_size)
        try:
            mapping = mmap.mmap(fd, end - start, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=start)
        except (OSError, ValueError, OverflowError) as error:
            raise ProtocolError(f"guest memory cannot be mapped: {error}") from error
        mapping.madvise(mmap.MADV_DONTDUMP)
        return memoryview(mapping)[offset - start : offset - start + size]

    def unmap(self, view: memoryview) -> None:
        """Unmap what `map` returned, now or when the last view of it goes."""
        mapping = view.obj
        view.release()
        assert isinstance(mapping, mmap.mmap)
        with contextlib.suppress(BufferError):  # a view is still in use; its end unmaps
            mapping.close()

    def check_event(self, fd: int) -> None:
        """Accept eventfds and pipes only, and never block on them."""
        if os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[eventfd]" and not stat.S_ISFIFO(os.fstat(fd).st_mode):
            raise ProtocolError("neither an eventfd nor a pipe")
        os.set_blocking(fd, False)

    def signal(self, fd: int) -> None:
        """Add 1 to an eventfd; a full one says already what we want to say, a dead pipe has nobody to hear it."""
        with contextlib.suppress(OSError):
            os.write(fd, _ONE)

    def close(self, fd: int) -> None:
        """Close `fd`."""
        os.close(fd)
