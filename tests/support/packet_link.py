"""Frames on the NIC's wire from this process, which is in another network namespace."""

from __future__ import annotations

import select
import socket
import sys
from typing import Final, Self

from testbed.wire.namespace import Wire

MAX_FRAME: Final = 1 << 17
# opens the packet socket where the wire is and hands it over
OPEN: Final = (
    "import socket, sys; s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3));"
    "s.bind((sys.argv[1], 0));"
    "socket.send_fds(socket.socket(fileno=int(sys.argv[2])), [b'x'], [s.fileno()])"
)


class PacketLink:
    """A packet socket on the wire's interface; frames of up to 64 KiB come whole. Context manager."""

    def __init__(self, wire: Wire) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            argv = [sys.executable, "-c", OPEN, wire.interface, str(theirs.fileno())]
            with wire.popen(argv, pass_fds=(theirs.fileno(),)):
                theirs.close()
                _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
        self._socket = socket.socket(fileno=descriptors[0])

    def send(self, frame: bytes) -> None:
        """Put a frame on the wire."""
        self._socket.send(frame)

    def receive(self, seconds: float) -> bytes | None:
        """The next frame, or None when none came in time."""
        if not select.select([self._socket], [], [], max(0.0, seconds))[0]:
            return None
        return self._socket.recv(MAX_FRAME)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
