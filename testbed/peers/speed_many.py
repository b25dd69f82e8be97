"""The jobs of speed.py that are about many connections at once."""

from __future__ import annotations

import selectors
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from testbed.peers.speed import RECORD, RECORD_OVERHEAD, Ends, Window

WRITE: Final = 4 * RECORD
SEALED_WRITE: Final = WRITE + 4 * RECORD_OVERHEAD
SAMPLED: Final = 64  # every so many connections
RECEIVE: Final = 1 << 18


class Many(Ends):
    """`count` connections, the n-th with the n-th keys."""

    def do_send_many(self, job: dict[str, Any]) -> dict[str, Any]:
        """Send WRITE bytes by one after the other, for `seconds` seconds once all have been opened."""
        data = memoryview(Path(job["pattern"]).read_bytes())[:WRITE]
        with ExitStack() as stack:
            socks = [stack.enter_context(self.open(job | {"number": number})) for number in range(job["count"])]
            end = time.monotonic() + job["seconds"]
            total = 0
            while time.monotonic() < end:
                for sock in socks:
                    sock.sendall(data)
                total += len(socks) * WRITE
        return {"total": total}

    def do_receive_many(self, job: dict[str, Any]) -> dict[str, Any]:
        """Receive to the end of all; the first writes of every SAMPLED-th go to the file `records`, if there is one."""
        buffer, window = bytearray(RECEIVE), Window(job["warm"], job["seconds"])
        size = SEALED_WRITE if "records" in job else WRITE
        samples = {number: bytearray() for number in range(0, job["count"], SAMPLED)}
        with ExitStack() as stack, selectors.DefaultSelector() as selector:
            for number in range(job["count"]):
                sock = stack.enter_context(self.open(job))
                selector.register(sock, selectors.EVENT_READ, number)
            while selector.get_map():
                for key, _ in selector.select():
                    assert isinstance(key.fileobj, socket.socket)
                    got = key.fileobj.recv_into(buffer)
                    window.add(got, time.monotonic())
                    if not got:
                        selector.unregister(key.fileobj)
                    elif len(sample := samples.get(key.data, buffer)) < size:
                        sample += memoryview(buffer)[: min(got, size - len(sample))]
            window.add(0, time.monotonic())
        if "records" in job:
            Path(job["records"]).write_bytes(b"".join(samples.values()))
        elif any(sample != Path(job["pattern"]).read_bytes()[:WRITE] for sample in samples.values()):
            raise ValueError("something else arrived than was sent")
        return {**window.result(), "samples": list(samples)}
