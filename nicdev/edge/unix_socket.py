"""Unix stream sockets by path or by inherited fd, for front ends and for the control socket."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path
from typing import Final

from nicdev.errors import ConfigError

MAX_PATH: Final = 107  # bytes in sockaddr_un, without the NUL
_BACKLOG: Final = 8


class SocketFile:
    """The file of a listening socket of ours: removed at the end, unless somebody put another in its place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = os.stat(path).st_ino

    def remove(self) -> None:
        """Remove the file if it is still the one we made; may be called twice."""
        try:
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)
        except FileNotFoundError:
            pass  # whoever removed it spared us the work


def listen_at(path: str | Path, mode: int | None = None) -> socket.socket:
    """A listening socket at `path` (file mode as umask says, or `mode`); the stale file of a dead process is replaced.

    Raises ConfigError.
    """
    name = os.fsencode(path)
    if not 0 < len(name) <= MAX_PATH:
        raise ConfigError(f"socket path of {len(name)} bytes, the limit is {MAX_PATH}: {path}")
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(name)
        if mode is not None:
            os.chmod(name, mode)  # before listen: nobody can have connected yet
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen at {path}: {error.strerror}") from error
    return sock


def _remove_stale(path: str | Path) -> None:
    """Remove a socket file that nobody listens at. Raises ConfigError if somebody does, or if it is no socket."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ConfigError(f"socket path exists and is not a socket: {path}")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            result = probe.connect_ex(os.fsencode(path))
        if result != errno.ECONNREFUSED:
            raise ConfigError(f"socket path is in use by another process: {path}")
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"cannot use socket path {path}: {error.strerror}") from error


def from_fd(fd: int) -> socket.socket:
    """The inherited vhost-user socket `fd`, connected or listening, which becomes ours.

    Raises ConfigError if it is none.
    """
    if fd < 0:
        raise ConfigError(f"--fd {fd} is not a descriptor")
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ConfigError(f"--fd {fd} is not a socket: {error.strerror}") from error
    if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise ConfigError(f"--fd {fd} is not a unix stream socket")
    sock.set_inheritable(False)
    return sock
