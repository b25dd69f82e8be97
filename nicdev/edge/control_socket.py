"""The control socket: one JSON object per line in, one per line out, for tests, tools and people with socat.

Requests: {"cmd": "stats"} counters by name; {"cmd": "contexts"} and {"cmd": "history"} see watch.ContextsCommand;
{"cmd": "info"} version and limits; {"cmd": "faults"} see port_faulty.FaultsCommand; {"cmd": "personality"} see
personality.PersonalityCommand. An answer is {"ok": true, ...} or {"ok": false, "error": "..."}; a client that
misbehaves loses its connection and nothing else.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

from nicdev.edge.loop import Loop
from nicdev.edge.unix_socket import SocketFile, listen_at

MAX_LINE: Final = 65536
Handler = Callable[[dict[str, Any]], dict[str, Any]]


class ControlSocket:
    """Listens on `path` (unix, mode 0600); `handlers` answer by the request's "cmd"."""

    def __init__(self, loop: Loop, path: Path, handlers: dict[str, Handler]) -> None:
        self._loop = loop
        self._handlers = handlers
        self._clients: dict[socket.socket, bytearray] = {}
        self._listener = listen_at(path, 0o600)
        self._listener.setblocking(False)
        self._file = SocketFile(path)
        loop.watch(self._listener.fileno(), self._on_connect)

    def _on_connect(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return  # the client is gone again, or fds are short; one that waits is found again by the next poll
        client.setblocking(True)
        client.settimeout(1)  # an answer that is not read within a second ends the connection
        self._clients[client] = bytearray()
        self._loop.watch(client.fileno(), partial(self._on_readable, client))

    def _on_readable(self, client: socket.socket) -> None:
        buffer = self._clients[client]
        try:
            data = client.recv(MAX_LINE)
            buffer += data
            while (end := buffer.find(b"\n")) >= 0:
                line = bytes(buffer[:end])
                del buffer[: end + 1]
                client.sendall(json.dumps(self._answer(line)).encode() + b"\n")
        except OSError:
            data = b""
        if not data or len(buffer) > MAX_LINE:
            self._drop(client)

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            handler = self._handlers[request["cmd"]]
        except (ValueError, TypeError, KeyError, RecursionError):
            known = ", ".join(sorted(self._handlers))
            return {"ok": False, "error": f'expected {{"cmd": NAME}} with NAME one of {known}'}
        return {"ok": True, **handler(request)}

    def _drop(self, client: socket.socket) -> None:
        self._loop.unwatch(client.fileno())
        del self._clients[client]
        client.close()

    def close(self) -> None:
        """Drop all clients and remove the socket."""
        for client in list(self._clients):
            self._drop(client)
        self._loop.unwatch(self._listener.fileno())
        self._listener.close()
        self._file.remove()
