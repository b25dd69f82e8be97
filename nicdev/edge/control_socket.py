"""The control socket: one JSON object per line in, one per line out, for tests, tools and people with socat.

Requests: {"cmd": "stats"} counters by name; {"cmd": "contexts"} and {"cmd": "history"} see watch.ContextsCommand;
{"cmd": "info"} version and limits; {"cmd": "faults"} see port_faulty.FaultsCommand; {"cmd": "personality"} see
personality.PersonalityCommand. An answer is {"ok": true, ...} or {"ok": false, "error": "..."}; a client that
misbehaves loses its connection and nothing else. What has to be heard by the driver first is answered later: that
client's next request waits, all else goes on.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from nicdev.edge.loop import Loop
from nicdev.edge.unix_socket import SocketFile, listen_at

MAX_LINE: Final = 65536
PATIENCE: Final = 1.0  # seconds that an answer waits at most
LOOK: Final = 0.001  # seconds between two looks whether it has to


class Later(NamedTuple):
    """An answer that is given when `ready`, or with a `warning` when that takes longer than PATIENCE."""

    ready: Callable[[], bool]
    warning: str


Handler = Callable[[dict[str, Any]], dict[str, Any] | Later]


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
        try:
            data = client.recv(MAX_LINE)
        except OSError:
            data = b""
        self._clients[client] += data
        if not data or not self._serve(client):
            self._drop(client)

    def _serve(self, client: socket.socket) -> bool:
        """Answer the requests that are here, up to one that takes time; False if the client has to go."""
        buffer = self._clients[client]
        while (end := buffer.find(b"\n")) >= 0:
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            answer = self._answer(line)
            if isinstance(answer, Later):
                self._loop.unwatch(client.fileno())
                self._wait(client, answer, self._loop.time() + PATIENCE)
                return True
            if not self._send(client, answer):
                return False
        return len(buffer) <= MAX_LINE

    def _wait(self, client: socket.socket, later: Later, deadline: float) -> None:
        """Answer if it is time, or look again soon."""
        if client not in self._clients:
            return
        now, ready = self._loop.time(), later.ready()
        if not ready and now < deadline:
            self._loop.call_at(now + LOOK, partial(self._wait, client, later, deadline))
            return
        self._loop.watch(client.fileno(), partial(self._on_readable, client))
        answer = {"ok": True} if ready else {"ok": True, "warning": later.warning}
        if not (self._send(client, answer) and self._serve(client)):
            self._drop(client)

    @staticmethod
    def _send(client: socket.socket, answer: dict[str, Any]) -> bool:
        try:
            client.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:
            return False
        return True

    def _answer(self, line: bytes) -> dict[str, Any] | Later:
        try:
            request = json.loads(line)
            handler = self._handlers[request["cmd"]]
        except (ValueError, TypeError, KeyError, RecursionError):
            known = ", ".join(sorted(self._handlers))
            return {"ok": False, "error": f'expected {{"cmd": NAME}} with NAME one of {known}'}
        answer = handler(request)
        return answer if isinstance(answer, Later) else {"ok": True, **answer}

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
