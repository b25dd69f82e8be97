"""The peers of guest-image/tools/ktls_many.py, all in one thread: python -m testbed.peers.crowd, where the wire is

The job is the first line of stdin: listen: [host, 0], timeout: seconds for everything, and `connections`, of which a
peer is chosen by the four bytes that its connection begins with: {"keys": as testbed.peers.flowkeys has them, "seed":
names the stream that is sent, "send": bytes of it, "recv": bytes to come, "records": [sizes, repeated]}. Lines of JSON
come back: {"event": "listening", "port": n}, and a list of results at the end.

A peer sends half of its stream when the first record has come, and the rest when more than half of the other has.
"""

from __future__ import annotations

import hashlib
import json
import resource
import selectors
import socket
import sys
import time
from typing import Any, Final

from testbed.peers.flowkeys import DirectionKeys
from testbed.peers.program import cuts, say
from testbed.peers.rawtls import Opener, RecordError, Sealer
from testbed.peers.stream import stream

READ: Final = selectors.EVENT_READ
WRITE: Final = selectors.EVENT_WRITE
RECEIVE: Final = 1 << 16
NUMBER: Final = 4


class Talk:
    """One connection."""

    def __init__(self, crowd: Crowd, sock: socket.socket) -> None:
        self.crowd = crowd
        self.socket = sock
        self.number = -1  # not told yet
        self.head = b""
        self.job: dict[str, Any] = {}
        self.hash = hashlib.sha256()
        self.sent = self.received = 0
        self.waiting = memoryview(b"")  # sealed, for the socket
        self.ended = False
        self.error: str | None = None
        self.watched = READ
        crowd.selector.register(sock, READ, self)

    def handle(self, events: int) -> None:
        """Something can be done."""
        try:
            if events & READ:
                self._receive()
            if self.number >= 0 and self.received:
                self._send()
        except (OSError, RecordError, ValueError) as error:
            self._finish(f"{type(error).__name__}: {error}")

    def _receive(self) -> None:
        data = self.socket.recv(RECEIVE)
        if not data:
            self.ended = True
            if self.number < 0 or self.received < self.job["recv"] or self.opener.pending:
                raise ValueError("the guest ended early")
            return
        if self.number < 0:
            self.head += data
            if len(self.head) < NUMBER:
                return
            data = self.head[NUMBER:]
            self._begin(int.from_bytes(self.head[:NUMBER], "big"))
        for _, text in self.opener.feed(data):
            self.hash.update(text)
            self.received += len(text)

    def _begin(self, number: int) -> None:
        self.number = number
        self.job = self.crowd.job["connections"][number]
        keys = {name: DirectionKeys.from_json(value) for name, value in self.job["keys"].items()}
        self.opener, self.sealer = Opener(keys["tx"]), Sealer(keys["rx"])
        self.outgoing = memoryview(stream(self.job["seed"], self.job["send"]))
        self.crowd.talks[number] = self

    def _send(self) -> None:
        """As much as there is room for."""
        whole = len(self.outgoing)
        limit = whole if self.received > self.job["recv"] // 2 else whole // 2
        if self.sent < limit:
            pieces = cuts(self.outgoing[self.sent : limit], self.job["records"])
            self.waiting = memoryview(bytes(self.waiting) + b"".join(map(self.sealer.seal, pieces)))
            self.sent = limit
        last = bool(self.waiting)
        try:
            while self.waiting:
                self.waiting = self.waiting[self.socket.send(self.waiting) :]
        except BlockingIOError:
            self._watch(WRITE if self.ended else READ | WRITE)
            return
        if last and self.sent == whole:
            self.socket.shutdown(socket.SHUT_WR)
        if self.ended and self.sent == whole:
            self._finish(None)
        else:
            self._watch(READ)

    def _watch(self, events: int) -> None:
        if events != self.watched:
            self.crowd.selector.modify(self.socket, events, self)
            self.watched = events

    def _finish(self, error: str | None) -> None:
        self.error = error
        self.crowd.selector.unregister(self.socket)
        self.socket.close()
        self.crowd.finished += 1

    def result(self) -> dict[str, Any]:
        """What came of it."""
        return {"received": self.received, "sha256_received": self.hash.hexdigest(), "error": self.error}


class Crowd:
    """All connections."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.selector = selectors.DefaultSelector()
        self.talks: dict[int, Talk] = {}
        self.finished = 0

    def run(self) -> list[dict[str, Any] | None]:
        """Until all have ended, or time is up; a result for each number, None for one that never came."""
        deadline = time.monotonic() + self.job["timeout"]
        wanted = len(self.job["connections"])
        with socket.create_server(tuple(self.job["listen"]), backlog=4096) as server:
            server.setblocking(False)
            self.selector.register(server, READ)
            say({"event": "listening", "port": server.getsockname()[1]})
            while self.finished < wanted and time.monotonic() < deadline:
                for key, events in self.selector.select(1):
                    if key.data is None:
                        sock, _ = server.accept()
                        sock.setblocking(False)
                        Talk(self, sock)
                    else:
                        key.data.handle(events)
        talks = map(self.talks.get, range(wanted))
        return [talk.result() if talk is not None else None for talk in talks]


def main() -> int:
    """Entry point."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print(json.dumps(Crowd(json.loads(sys.stdin.readline())).run()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
