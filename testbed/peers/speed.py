"""Either end of a measurement of throughput: its jobs, and the part of them that is about bulk.

Guest and wire run the same program, `python -m testbed.peers.speed_end`: in the guest a copy of the files speed*.py, so
standard library only, but where the user-space side of TLS is. A line of stdin is a job, a JSON object; a line of
stdout its result, or {"error": text}. A job is {"do": verb, ...}, see the methods do_*; most of them work on one
connection:

    connect: [host, port], or without it: the next one that comes to the port that "listen" has opened
    cipher, keys: {"tx": ..., "rx": ...} as testbed.peers.flowkeys has them: what the kernel is to encrypt and decrypt
        with. tools: the folder of guest-image/tools
    zerocopy: true    TLS_TX_ZEROCOPY_RO
    seal: the keys of one direction; encrypt here
    ask, asked: true    the receiver sends a byte when it is ready to decrypt; the sender waits for it
    pattern: a file of PERIOD bytes; what is sent is these, over and over
    connections: so many at once (default 1)

A receiver counts the bytes of `seconds` seconds that begin `warm` seconds after its first byte, and receives to the
end. It keeps nothing but the last PERIOD bytes of each connection, or 64 records made of them, of which it takes a
sample now and then: each begins at a multiple of that size, so it must be the pattern's begin, or records of that.
"""

from __future__ import annotations

import importlib
import itertools
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

PERIOD: Final = 1 << 20
RECORD: Final = 1 << 14
RECORD_OVERHEAD: Final = 5 + 8 + 16
RECORDS: Final = PERIOD // RECORD
SEALED_RECORD: Final = RECORD + RECORD_OVERHEAD
SEALED_PERIOD: Final = RECORDS * SEALED_RECORD
APPLICATION_DATA: Final = 23
VERSION: Final = 0x0303
BATCH: Final = 16  # records sealed and sent at once
SAMPLE_EVERY: Final = 64  # periods
TIMEOUT: Final = 60  # seconds for any one call
# include/uapi/linux/tls.h, tcp.h
SOL_TLS, TCP_ULP, TLS_TX_ZEROCOPY_RO = 282, 31, 3
ASK: Final = b"?"
NUMBER: Final = struct.Struct(">I")  # of a connection, its first bytes where there may be several
T = TypeVar("T")


class Short(Exception):
    """There is too little to measure."""


class Window:
    """What arrived within `seconds` seconds that begin `warm` seconds after the first bytes."""

    def __init__(self, warm: float, seconds: float) -> None:
        self._warm, self._seconds = warm, seconds
        self._opens = self._closes = 0.0
        self._marks: list[tuple[float, int]] = []  # the begin, later the end: time, bytes so far
        self.total = 0

    def add(self, size: int, now: float) -> None:
        """`size` bytes at `now` (seconds); the end of the stream is 0 bytes."""
        if not self.total:
            self._opens = now + self._warm
            self._closes = self._opens + self._seconds
        self.total += size
        if now >= self._opens and (not self._marks or (len(self._marks) == 1 and now >= self._closes)):
            self._marks.append((now, self.total))

    def result(self) -> dict[str, Any]:
        """`bytes`, the `seconds` in which they came, and the `total` with what came before and after. Raises Short."""
        if len(self._marks) < 2:
            raise Short(f"the stream ended early, after {self.total} bytes")
        (began, before), (ended, after) = self._marks
        return {"bytes": after - before, "seconds": ended - began, "total": self.total}


class Ring:
    """The last `size` bytes of a stream, and copies of them as they were now and then: (place in the stream, bytes)."""

    def __init__(self, size: int) -> None:
        self._buffer = bytearray(size)
        self._view = memoryview(self._buffer)
        self._at = 0
        self._turns = 0
        self.samples: list[tuple[int, bytes]] = []

    def space(self) -> memoryview:
        """Where to put what comes next."""
        return self._view[self._at :]

    def put(self, size: int) -> None:
        """So much was put there."""
        self._at += size
        if self._at == len(self._buffer):
            if self._turns % SAMPLE_EVERY == 0:
                self._sample()
            self._turns += 1
            self._at = 0

    def _sample(self) -> None:
        self.samples.append((self._turns * len(self._buffer), bytes(self._view[: self._at])))

    def end(self) -> None:
        """No more comes: the last sample, which may be shorter."""
        if not self._at and self._turns:
            self._turns, self._at = self._turns - 1, len(self._buffer)
        if not self.samples or self.samples[-1][0] < self._turns * len(self._buffer):
            self._sample()


def sealed(keys: dict[str, Any], pattern: bytes | memoryview) -> Iterator[memoryview]:
    """The pattern over and over, in TLS 1.2 records (RFC 5288), BATCH of them at once in a buffer that is used again.

    Made here, as quickly as it can be: the sender must not be what is measured.
    """
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # the guest has none

    key, salt, iv = (bytes.fromhex(keys[name]) for name in ("key", "salt", "iv"))
    seal, nonce, number = AESGCM(key).encrypt_into, int.from_bytes(iv, "big"), int(keys["rec_seq"])
    additional, explicit = struct.Struct(">QBHH").pack, struct.Struct(">Q")
    view, buffer = memoryview(pattern), bytearray(BATCH * SEALED_RECORD)
    out = memoryview(buffer)
    for at in range(0, len(buffer), SEALED_RECORD):
        out[at : at + 5] = struct.pack(">BHH", APPLICATION_DATA, VERSION, SEALED_RECORD - 5)
    while True:
        for start in range(0, PERIOD, BATCH * RECORD):
            for index in range(BATCH):
                at, source = index * SEALED_RECORD, start + index * RECORD
                counter = explicit.pack(nonce)
                out[at + 5 : at + 13] = counter
                aad = additional(number, APPLICATION_DATA, VERSION, RECORD)
                seal(salt + counter, view[source : source + RECORD], aad, out[at + 13 : at + SEALED_RECORD])
                nonce, number = nonce + 1, number + 1
            yield out


class Ends:
    """Opens and takes connections; what is done with them are the methods do_* of the classes that inherit."""

    def __init__(self) -> None:
        self.listener: socket.socket | None = None
        self.datagrams = socket.socket(type=socket.SOCK_DGRAM)

    def do_listen(self, job: dict[str, Any]) -> dict[str, Any]:
        """Open the port that all later connections come to, and the UDP port with that number."""
        self.listener = socket.create_server(tuple(job["listen"]), backlog=4096)
        self.listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
        self.datagrams.bind(self.listener.getsockname())
        return {"port": self.listener.getsockname()[1]}

    def close(self) -> None:
        """No more connections come."""
        self.datagrams.close()
        if self.listener is not None:
            self.listener.close()

    def open(self, job: dict[str, Any]) -> socket.socket:
        """The connection of a job. Kernel timeouts rather than settimeout(), which would make calls non-blocking."""
        if "connect" in job:
            sock = socket.create_connection(tuple(job["connect"]))
        else:
            assert self.listener is not None
            self.listener.settimeout(TIMEOUT)
            sock, _ = self.listener.accept()
            sock.setblocking(True)
        if job.get("greet") and "connect" in job:
            sock.sendall(NUMBER.pack(job["number"]))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", TIMEOUT, 0))
        install(sock, job)
        return sock


class Bulk(Ends):
    """As much as goes by one connection, or by several, each of which has a thread here."""

    def _each(self, job: dict[str, Any], work: Callable[[socket.socket, int], T]) -> list[T]:
        """Open the connections, and do this with each and its number, which the side that connects says first."""

        def run(sock: socket.socket, number: int) -> T:
            with sock:
                told = number if "connect" in job else NUMBER.unpack(sock.recv(NUMBER.size, socket.MSG_WAITALL))[0]
                return work(sock, told)

        count = job.get("connections", 1)
        with ThreadPoolExecutor(count) as pool:
            futures = [pool.submit(run, self.open(job | {"number": n, "greet": True}), n) for n in range(count)]
            return [future.result() for future in futures]

    def do_send(self, job: dict[str, Any]) -> dict[str, Any]:
        """Send for `seconds` seconds, in pieces of `write` bytes, or of BATCH records."""
        pattern = memoryview(Path(job["pattern"]).read_bytes())
        write = job.get("write", PERIOD)

        def send(sock: socket.socket, number: int) -> int:
            pieces: Iterator[memoryview]
            if "seal" in job:
                pieces = sealed(numbered(job["seal"], number), pattern)
            else:
                pieces = itertools.cycle(pattern[at : at + write] for at in range(0, PERIOD, write))
            if job.get("asked"):
                sock.recv(len(ASK))
            total, end = 0, time.monotonic() + job["seconds"]
            for piece in pieces:
                sock.sendall(piece)
                total += len(piece)
                if time.monotonic() > end:
                    break
            return total

        return {"total": sum(self._each(job, send))}

    def do_sendfile(self, job: dict[str, Any]) -> dict[str, Any]:
        """Send whole periods for `seconds` seconds by sendfile(2)."""
        file = os.memfd_create("pattern")
        os.write(file, Path(job["pattern"]).read_bytes())

        def send(sock: socket.socket, _: int) -> int:
            total, end = 0, time.monotonic() + job["seconds"]
            while total % PERIOD or time.monotonic() < end:
                at = total % PERIOD
                total += os.sendfile(sock.fileno(), file, at, PERIOD - at)
            return total

        try:
            return {"total": sum(self._each(job, send))}
        finally:
            os.close(file)

    def do_receive(self, job: dict[str, Any]) -> dict[str, Any]:
        """Receive to the end; with `records`, a file to write samples of encrypted records to, without: check them."""
        records = job.get("records")
        window, lock, clock = Window(job["warm"], job["seconds"]), threading.Lock(), time.monotonic

        def receive(sock: socket.socket, _: int) -> list[tuple[int, bytes]]:
            ring = Ring(SEALED_PERIOD if records else PERIOD)
            if job.get("ask"):
                sock.send(ASK)
            while size := sock.recv_into(ring.space()):
                ring.put(size)
                with lock:
                    window.add(size, clock())
            ring.end()
            return ring.samples

        samples = [sample for found in self._each(job, receive) for sample in found]
        window.add(0, clock())
        if records:
            Path(records).write_bytes(b"".join(sample for _, sample in samples))
        else:
            pattern = Path(job["pattern"]).read_bytes()
            if any(sample != pattern[: len(sample)] for _, sample in samples):
                raise ValueError("something else arrived than was sent")
        return {**window.result(), "samples": [(place, len(sample)) for place, sample in samples]}


def install(sock: socket.socket, job: dict[str, Any]) -> None:
    """Give the socket to the kernel's TLS as a job says."""
    if "keys" not in job:
        return
    sys.path[:1] = [job["tools"]]
    tool = importlib.import_module("ktls_raw")
    sock.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
    for direction, keys in job["keys"].items():
        sock.setsockopt(
            SOL_TLS, tool.DIRECTIONS[direction], tool.crypto_info(job["cipher"], **numbered(keys, job.get("number", 0)))
        )
    if job.get("zerocopy"):
        sock.setsockopt(SOL_TLS, TLS_TX_ZEROCOPY_RO, struct.pack("=I", 1))


def numbered(keys: dict[str, Any], number: int) -> dict[str, Any]:
    """The keys of a direction for the connection of this number: other nonces, so that none is used twice."""
    return keys | {"iv": f"{int(keys['iv'], 16) + (number << 24):016x}"}
