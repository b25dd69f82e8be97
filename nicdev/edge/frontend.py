"""The vhost-user socket: one front end at a time, from connect to disconnect, and then the next.

`Frontend` is one fd for an event loop (an epoll instance over listener and connection, readable when either is) and
one callback. Nothing here blocks: a message is collected piece by piece as it comes, a reply that the peer does not
take at once ends the connection. Every message is read with the exact number of bytes it still lacks, so an fd
always belongs to the message whose bytes it came with.

Any fault of the peer ends its connection and nothing else: the backend object closes what it got and lets guest
memory go, and the listener waits for the next one.
"""

from __future__ import annotations

import logging
import os
import select
import socket
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Final

from nicdev.edge.unix_socket import SocketFile
from nicdev.errors import ProtocolError
from nicdev.vhost import message as msg
from nicdev.vhost.message import Header
from nicdev.vhost.protocol import VhostUserBackend

log = logging.getLogger(__name__)

_BURST: Final = 64  # messages per callback, so that no front end starves the queues


class _Connection:
    """A connected socket and the message that is coming in."""

    def __init__(self, sock: socket.socket, backend: VhostUserBackend) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._backend = backend
        self._data = bytearray()
        self._fds: list[int] = []
        self._header: Header | None = None

    def receive(self) -> bool:
        """Read towards the next message and handle it when complete; False when there is nothing more to read now.

        Raises ProtocolError when the connection must end, EOFError when the peer ended it, OSError when it broke.
        """
        wanted = msg.HEADER.size if self._header is None else self._header.size
        if len(self._data) < wanted:
            try:
                data = self._read(wanted - len(self._data))
            except BlockingIOError:
                return False
            if not data:
                raise EOFError
            self._data += data
            if len(self._data) < wanted:
                return True
        if self._header is None:
            self._header = msg.decode_header(self._data)
            self._data.clear()
            if self._header.size > msg.MAX_PAYLOAD:
                error = ProtocolError(f"payload of {self._header.size} bytes")
                self._reply(self._backend.refuse(self._header, error))
                raise error
            if self._header.size:
                return True
        header, payload, fds = self._header, bytes(self._data), self._fds
        self._header, self._fds = None, []
        self._data.clear()
        self._reply(self._backend.handle(header, payload, fds))
        return True

    def _read(self, count: int) -> bytes:
        """Up to `count` bytes; fds that came with them are ours from here on."""
        space = socket.CMSG_SPACE(msg.MAX_FDS * array("i").itemsize)
        data, ancillary, flags, _ = self.sock.recvmsg(count, space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array("i")
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
                self._fds += fds
        if flags & socket.MSG_CTRUNC or len(self._fds) > msg.MAX_FDS:
            raise ProtocolError(f"more than {msg.MAX_FDS} fds in a message")
        return data

    def _reply(self, reply: bytes) -> None:
        if reply and self.sock.send(reply, socket.MSG_NOSIGNAL) != len(reply):
            raise ProtocolError("the peer does not read its replies")

    def close(self) -> None:
        """Close the socket, the fds of the unfinished message and all that the backend holds."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        self.sock.close()
        self._backend.close()


class Frontend:
    """Serves one front end at a time with a fresh backend each; `sock` is listening or connected and ours to close.

    A connected socket is served once: afterwards `finished` is true. `unlink` is the path to remove at the end.
    """

    def __init__(
        self, sock: socket.socket, make_backend: Callable[[], VhostUserBackend], unlink: Path | None = None
    ) -> None:
        self._make_backend = make_backend
        self._epoll = select.epoll()
        self._connection: _Connection | None = None
        self._listener: socket.socket | None = None
        self._file = SocketFile(unlink) if unlink else None
        self.finished = False
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            sock.setblocking(False)
            self._listener = sock
            self._epoll.register(sock, select.EPOLLIN)
        else:
            self._serve(sock)

    def fileno(self) -> int:
        """Readable when `on_readable` has something to do; stays the same for life."""
        return self._epoll.fileno()

    @property
    def connected(self) -> bool:
        """Whether a front end is being served."""
        return self._connection is not None

    def on_readable(self) -> None:
        """Handle what is ready: new connections, and messages up to a bounded number."""
        for fd, _events in self._epoll.poll(0):
            if self._listener is not None and fd == self._listener.fileno():
                self._accept(self._listener)
            elif self._connection is not None and fd == self._connection.sock.fileno():
                self._receive(self._connection)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:
            # The peer is gone again, or fds are short; a peer that waits is found again by the next poll.
            log.warning("vhost-user: accept: %s", error)
            return
        if self._connection is not None:
            log.warning("vhost-user: a second front end was refused")
            sock.close()
            return
        log.info("vhost-user: front end connected")
        self._serve(sock)

    def _serve(self, sock: socket.socket) -> None:
        self._connection = _Connection(sock, self._make_backend())
        self._epoll.register(sock, select.EPOLLIN)

    def _receive(self, connection: _Connection) -> None:
        try:
            for _ in range(_BURST):
                if not connection.receive():
                    return
        except EOFError:
            self.disconnect("front end disconnected")
        except (ProtocolError, OSError) as error:
            self.disconnect(f"connection closed: {error}")

    def disconnect(self, reason: str) -> None:
        """End the current connection, if any, from our side; a listener goes on."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        log.info("vhost-user: %s", reason)
        self._epoll.unregister(connection.sock)
        connection.close()
        self.finished = self._listener is None

    def close(self) -> None:
        """End everything, and remove the socket file if it is still the one we made."""
        self.disconnect("shutting down")
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self._epoll.close()
        self.finished = True
        if self._file is not None:
            self._file.remove()
