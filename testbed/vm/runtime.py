"""Folders for the sockets of a run: private, short of path, and removed even when the run was killed.

The process that made a folder holds a lock on it for as long as it lives. Whoever makes the next one removes those
that nobody holds any more.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

from testbed.vm.qemu import SOCKET_PATH_MAX

PREFIX: Final = "tlsnic-run-"


class RuntimeFolder:
    """A new folder, `path`, whose name leaves room for unix sockets wherever the checkout lies."""

    def __init__(self) -> None:
        base = _base()
        _sweep(base)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
            self._lock = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if self.path.exists():
                return
            os.close(self._lock)  # somebody swept it before it was locked

    def remove(self) -> None:
        """Remove the folder and all that is in it; may be called any number of times."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _base() -> Path:
    wanted = os.environ.get("XDG_RUNTIME_DIR", "")
    if not os.access(wanted, os.W_OK) or len(wanted) > SOCKET_PATH_MAX - 40:
        wanted = "/tmp"  # noqa: S108 - mkdtemp makes a private folder in it
    return Path(wanted)


def _sweep(base: Path) -> None:
    """Remove our folders of processes that are gone."""
    for path in base.glob(f"{PREFIX}*"):
        with suppress(OSError):  # not ours to touch, no folder, or gone already
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if os.fstat(lock).st_uid == os.geteuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held: OSError
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)
