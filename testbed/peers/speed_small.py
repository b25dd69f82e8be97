"""The jobs of speed.py that are about little things: round trips, datagrams, short connections."""

from __future__ import annotations

import contextlib
import itertools
import socket
import statistics
import time
from pathlib import Path
from typing import Any

from testbed.peers.speed import ASK, PERIOD, TIMEOUT, Ends, numbered


class Small(Ends):
    """Each for `seconds` seconds."""

    def do_ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Send a byte and wait for its answer, for `seconds` seconds: how often, and the median time (s)."""
        times = []
        with self.open(job) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end = time.monotonic() + job["seconds"]
            while (began := time.monotonic()) < end:
                sock.send(ASK)
                if not sock.recv(1):
                    raise EOFError("no answer")
                times.append(time.monotonic() - began)
        return {"count": len(times), "median": statistics.median(times)}

    def do_answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """Send back what comes, to the end."""
        with self.open(job) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := sock.recv(PERIOD):
                sock.sendall(data)
        return {}

    def do_send_packets(self, job: dict[str, Any]) -> dict[str, Any]:
        """Send datagrams of `size` bytes to `connect` for `seconds` seconds."""
        data, count = bytes(job["size"]), 0
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.connect(tuple(job["connect"]))
            end = time.monotonic() + job["seconds"]
            while time.monotonic() < end:
                for _ in range(100):
                    sock.send(data)
                count += 100
        return {"count": count}

    def do_count_packets(self, job: dict[str, Any]) -> dict[str, Any]:
        """Packets that an `interface` receives in `seconds` seconds that begin `warm` seconds after the first.

        They go to the UDP port, and nobody reads them but the first, and what was left there.
        """
        self.datagrams.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.datagrams.recv(1)
        self.datagrams.settimeout(TIMEOUT)
        self.datagrams.recv(1)
        time.sleep(job["warm"])  # no wait for anything: these are the lengths of what is measured
        before, began = packets_received(job["interface"]), time.monotonic()
        time.sleep(job["seconds"])
        count = packets_received(job["interface"]) - before
        return {"count": count, "seconds": time.monotonic() - began}

    def do_small(self, job: dict[str, Any]) -> dict[str, Any]:
        """One connection after the other for `seconds` seconds: `up` bytes there, `down` bytes back, and its end.

        The first is for warming up. All are in `count`, the others in `rate` (per second).
        """
        request, answer = (Path(job["pattern"]).read_bytes()[: job[name]] for name in ("up", "down"))
        count, began = 0, float("inf")
        while time.monotonic() < began + job["seconds"]:
            with self.open(job | {"number": count}) as sock:
                sock.sendall(request)
                found = bytearray()
                while data := sock.recv(PERIOD):
                    found += data
            if found != answer:
                raise ValueError(f"connection {count}: {len(found)} bytes came back, not what was to come")
            count += 1
            began = min(began, time.monotonic())
        rate = (count - 1) / (time.monotonic() - began)
        with socket.create_connection(tuple(job["connect"])):  # it says nothing: the last one
            return {"count": count, "rate": rate}

    def do_serve_small(self, job: dict[str, Any]) -> dict[str, Any]:
        """The other side of `small`: every record is opened, with the keys that `peer_keys` has, if it has any."""
        pattern = Path(job["pattern"]).read_bytes()
        for number in itertools.count():
            with self.open(job) as sock:
                if not sock.recv(1, socket.MSG_PEEK):
                    return {"count": number}
                serve(sock, job.get("peer_keys"), number, pattern[: job["up"]], pattern[: job["down"]])
        raise AssertionError  # count() has no end


def packets_received(interface: str) -> int:
    """By an interface of this network namespace, since it is there (/proc/net/dev)."""
    lines = (line.partition(":") for line in Path("/proc/net/dev").read_text().splitlines())
    return next(int(counts.split()[1]) for name, _, counts in lines if name.strip() == interface)


def serve(sock: socket.socket, keys: dict[str, Any] | None, number: int, request: bytes, answer: bytes) -> None:
    """Take a request and give the answer. Raises ValueError for another request, RecordError for a bad record."""
    from testbed.peers.flowkeys import DirectionKeys  # the guest has neither, nor needs them
    from testbed.peers.rawtls import Opener, Sealer

    opener = Opener(DirectionKeys.from_json(numbered(keys["tx"], number))) if keys else None
    found = bytearray()
    while len(found) < len(request):
        if not (data := sock.recv(PERIOD)):
            raise ValueError(f"connection {number} ended after {len(found)} bytes")
        found += b"".join(text for _, text in opener.feed(data)) if opener else data
    if found != request:
        raise ValueError(f"connection {number}: something else arrived than was sent")
    sock.sendall(Sealer(DirectionKeys.from_json(numbered(keys["rx"], number))).seal(answer) if keys else answer)
