#!/usr/bin/env python3
"""Many real kTLS sockets at once, in one thread. The job is the first line of stdin:

    connect: [host, port]
    cipher: "aes-128-gcm" or "aes-256-gcm"
    ahead: how many connections may be on their way to being open
    timeout: seconds for everything
    connections: [{"keys": {"tx": ..., "rx": ...} as ktls_raw.py takes them, "seed": ..., "send": n, "recv": n,
                   "write": bytes per call}, ...]

Each connection tells its number in four clear bytes, switches both directions to TLS, and sends half of its stream.
When all are open: {"event": "open"}; after a line on stdin they send the rest, and end one by one. The last line is the
result: "seconds", "open_seconds", and for each connection its port, what it received, and what went wrong.
"""

import hashlib
import json
import os
import resource
import selectors
import socket
import sys
import time

from ktls_common import explain, say, stream
from ktls_raw import DIRECTIONS, SOL_TLS, TCP_ULP, crypto_info

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
BUFFER = memoryview(bytearray(1 << 16))


class Flow:
    """One connection."""

    def __init__(self, crowd, number, job):
        self.crowd, self.number, self.job = crowd, number, job
        self.outgoing = memoryview(stream(job["seed"], job["send"]))
        self.sent = self.received = self.watched = 0
        self.hash = hashlib.sha256()
        self.opening, self.ended = True, False
        self.error = None
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.connect_ex(tuple(crowd.job["connect"]))
        self.watch(WRITE)

    def watch(self, events):
        """Ask for these events instead of those before."""
        selector = self.crowd.selector
        if events and self.watched:
            selector.modify(self.socket, events, self)
        elif events:
            selector.register(self.socket, events, self)
        elif self.watched:
            selector.unregister(self.socket)
        self.watched = events

    def handle(self, events):
        """Something can be done. Never raises: a test reads JSON, not tracebacks."""
        try:
            if self.opening:
                self.open()
            if events & READ:
                self.receive()
            self.send()
        except (OSError, ValueError) as error:
            self.finish(explain(error))

    def open(self):
        code = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        self.port = self.socket.getsockname()[1]
        self.socket.send(self.number.to_bytes(4, "big"))
        self.socket.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
        for name, number in DIRECTIONS.items():
            info = crypto_info(self.crowd.job["cipher"], **self.job["keys"][name])
            self.socket.setsockopt(SOL_TLS, number, info)
        self.opening = False
        self.crowd.opened += 1

    def receive(self):
        try:
            got = self.socket.recv_into(BUFFER)
        except BlockingIOError:  # a part of a record
            return
        self.hash.update(BUFFER[:got])
        self.received += got
        self.ended = not got
        if self.ended and self.received < self.job["recv"]:
            raise ValueError("the peer ended early")

    def send(self):
        """As much as there is room for; then wait for room, or for data."""
        whole = len(self.outgoing)
        limit = whole if self.crowd.released else whole // 2
        try:
            while self.sent < limit:
                piece = self.outgoing[self.sent : min(self.sent + self.job["write"], limit)]
                last = self.sent + len(piece) == whole
                # what a call that does not block took may still wait in kTLS, where shutdown() forgets it
                self.socket.setblocking(last)
                self.sent += self.socket.send(piece)
                if last:
                    self.socket.shutdown(socket.SHUT_WR)
                    self.socket.setblocking(False)
        except BlockingIOError:
            self.watch(WRITE if self.ended else READ | WRITE)
            return
        if self.ended and self.sent == whole:
            self.finish(None)
        else:
            self.watch(0 if self.ended else READ)

    def finish(self, error):
        self.error = error
        self.watch(0)
        self.socket.close()
        self.outgoing = None
        self.crowd.finished += 1

    def result(self):
        return {
            "port": getattr(self, "port", 0),
            "sent": self.sent,
            "received": self.received,
            "sha256_received": self.hash.hexdigest(),
            "error": self.error,
        }


class Crowd:
    """All connections."""

    def __init__(self, job):
        self.job = job
        self.selector = selectors.DefaultSelector()
        self.opened = self.finished = 0
        self.released = False
        self.flows = []

    def run(self):
        jobs = self.job["connections"]
        deadline = time.monotonic() + self.job["timeout"]
        began, opened = time.monotonic(), None
        while self.finished < len(jobs) and time.monotonic() < deadline:
            while len(self.flows) < min(len(jobs), self.opened + self.job["ahead"]):
                self.flows.append(Flow(self, len(self.flows), jobs[len(self.flows)]))
            if opened is None and self.opened == len(jobs):
                opened = time.monotonic() - began
                say({"event": "open"})
                self.selector.register(0, READ)
            for key, events in self.selector.select(1):
                if key.data is None:
                    self.release()
                elif key.data.watched:
                    key.data.handle(events)
        results = [flow.result() for flow in self.flows]
        ok = self.finished == len(jobs) and not any(result["error"] for result in results)
        return {"ok": ok, "seconds": time.monotonic() - began, "open_seconds": opened, "connections": results}

    def release(self):
        os.read(0, 1)
        self.selector.unregister(0)
        self.released = True
        for flow in self.flows:
            if flow.error is None:
                flow.handle(0)


def main():
    job = json.loads(sys.stdin.readline())
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    result = Crowd(job).run()
    say(result)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
