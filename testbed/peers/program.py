"""User-space TLS peers for the guest's kTLS sockets: python -m testbed.peers.program raw|openssl JOB, where the wire is

`raw` speaks TLS 1.2 records with fixed keys and can misbehave; `openssl` is Python's ssl module with a
certificate made for the run. JOB is one JSON object; lines of JSON come back: {"event": "listening", "port": n},
{"event": "waiting"}, and the result last.

    listen: [host, port] (port 0: any), or connect: [host, port]
    cipher: "aes-128-gcm" or "aes-256-gcm" (raw); OpenSSL's name, such as ECDHE-RSA-AES128-GCM-SHA256 (openssl)
    keys: (raw) {"tx": {...}, "rx": {...}} as testbed.peers.flowkeys has them. As everywhere, tx is guest to wire: this
        side opens records with tx and seals them with rx. A missing direction is clear
    keylog: (openssl) file to which the session's secrets are appended in NSS format
    seed: names the stream that is sent; timeout: seconds for any one blocking call (default 60)
    options: {"TCP_MAXSEG": n, "TCP_CONGESTION": name, ...} set before connecting or listening
    first_seq: TCP's sequence number of the SYN, if it is this side that connects
    spoil: (raw) {"k": spot} flips a bit of the k-th record sent, counted from 0; spots: rawtls.SPOTS
    steps: list of {"do": verb, ...}, see the methods do_* of Session
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import socket
import ssl
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from testbed.peers.certificate import self_signed
from testbed.peers.flowkeys import DirectionKeys
from testbed.peers.rawtls import APPLICATION_DATA, MAX_PLAINTEXT, Opener, RecordError, Sealer
from testbed.peers.stream import BLOCK, stream

RECEIVE: Final = 1 << 18
POLL: Final = 0.0005  # seconds between looks at the socket's output queue
SIOCOUTQ: Final = 0x5411  # bytes not yet acknowledged (tcp(7))
SIOCOUTQNSD: Final = 0x894B  # bytes not yet sent (linux/sockios.h)


class Channel(Protocol):
    """What a session needs of either kind of peer."""

    @property
    def records_sent(self) -> int:
        """Records sealed."""

    @property
    def records_received(self) -> int:
        """Records opened."""

    def seal(self, data: memoryview, records: Sequence[int]) -> Iterator[bytes | memoryview]:
        """Cut `data` into records of these plaintext sizes, repeated; yields what to write."""

    def receive(self) -> list[tuple[int, bytes]]:
        """(record type, plaintext) of what came next; nothing more comes after an empty list."""

    def record(self, kind: int, data: bytes) -> bytes:
        """One record of any type."""

    def write(self, data: bytes | memoryview) -> None:
        """Send all of what `seal` or `record` gave."""

    def finish(self) -> None:
        """Tell the peer that no more is sent."""


def cuts(data: memoryview, sizes: Sequence[int]) -> Iterator[memoryview]:
    """`data` in pieces of the given sizes, which are repeated; the last piece may be shorter."""
    start = 0
    for size in itertools.cycle(sizes):
        if start >= len(data):
            return
        yield data[start : start + size]
        start += size


class RawChannel:
    """Fixed keys; without a key the direction is clear."""

    def __init__(self, sock: socket.socket, job: dict[str, Any]) -> None:
        self._socket = sock
        keys = {name: DirectionKeys.from_json(value) for name, value in job.get("keys", {}).items()}
        spoil = {int(number): spot for number, spot in job.get("spoil", {}).items()}
        self._sealer = Sealer(keys["rx"], spoil) if "rx" in keys else None
        self._opener = Opener(keys["tx"]) if "tx" in keys else None

    @property
    def records_sent(self) -> int:
        return self._sealer.records if self._sealer else 0

    @property
    def records_received(self) -> int:
        return self._opener.records if self._opener else 0

    def seal(self, data: memoryview, records: Sequence[int]) -> Iterator[bytes | memoryview]:
        if self._sealer is None:
            return iter([data])
        return map(self._sealer.seal, cuts(data, records))

    def record(self, kind: int, data: bytes) -> bytes:
        return self._sealer.seal(data, kind) if self._sealer else data

    def receive(self) -> list[tuple[int, bytes]]:
        while data := self._socket.recv(RECEIVE):
            if self._opener is None:
                return [(APPLICATION_DATA, data)]
            if found := list(self._opener.feed(data)):
                return found
        if self._opener and self._opener.pending:
            raise RecordError(self._opener.records, f"cut short after {self._opener.pending} bytes")
        return []

    def write(self, data: bytes | memoryview) -> None:
        self._socket.sendall(data)

    def finish(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)


class OpensslChannel:
    """OpenSSL keeps records to itself: they are not counted, and only application data can be sent."""

    records_sent = records_received = 0

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._socket = sock

    def seal(self, data: memoryview, records: Sequence[int]) -> Iterator[bytes | memoryview]:
        return cuts(data, records)

    def record(self, kind: int, data: bytes) -> bytes:
        raise ValueError("the openssl peer sends application data only")

    def receive(self) -> list[tuple[int, bytes]]:
        data = self._socket.recv(RECEIVE)
        return [(APPLICATION_DATA, data)] if data else []

    def write(self, data: bytes | memoryview) -> None:
        self._socket.sendall(data)

    def finish(self) -> None:
        with contextlib.suppress(OSError):  # the other side may close without an answer
            self._socket.unwrap()


class Session:
    """Runs the steps of a job on one connection."""

    def __init__(self, sock: socket.socket, channel: Channel, job: dict[str, Any]) -> None:
        self.socket = sock
        self.channel = channel
        steps = job.get("steps", [])
        self.outgoing = memoryview(stream(job.get("seed", ""), sum(s["size"] for s in steps if s["do"] == "send")))
        self.timeout = float(job.get("timeout", 60))
        self.sent = self.received = 0
        self.sent_hash, self.received_hash = hashlib.sha256(), hashlib.sha256()
        self.control: list[dict[str, Any]] = []
        self.surplus = bytearray()  # received beyond what the step wanted
        self.ended = False
        self.began: float | None = None  # when data began to flow

    def do_send(
        self, size: int, records: Sequence[int] = (MAX_PLAINTEXT,), writes: Sequence[int] = (), apart: bool = False
    ) -> None:
        """Send the next `size` bytes of the stream in records of these sizes.

        `writes` cuts the bytes on the wire differently; with `apart`, each write leaves in packets of its own.
        """
        data, self.outgoing = self.outgoing[:size], self.outgoing[size:]
        pieces: Iterator[bytes | memoryview] = self.channel.seal(data, records)
        if writes:
            pieces = cuts(memoryview(b"".join(pieces)), writes)
        if apart:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            self.began = self.began or time.monotonic()
            self.channel.write(piece)
            if apart:
                self._await_queue(SIOCOUTQNSD)
        self.sent += size
        self.sent_hash.update(data)

    def do_drain(self) -> None:
        """Wait until everything sent is acknowledged."""
        self._await_queue(SIOCOUTQ)

    def _await_queue(self, which: int) -> None:
        deadline = time.monotonic() + self.timeout
        while struct.unpack("i", fcntl.ioctl(self.socket, which, bytes(4)))[0]:
            if time.monotonic() > deadline:
                raise TimeoutError("the peer does not take what is sent")
            time.sleep(POLL)

    def _pull(self) -> None:
        found = self.channel.receive()
        self.began = self.began or time.monotonic()
        self.ended = not found
        for kind, data in found:
            if kind == APPLICATION_DATA:
                self.surplus += data
            else:
                self.control.append({"kind": kind, "data": data.hex()})

    def _take(self, size: int) -> bytes:
        while len(self.surplus) < size and not self.ended:
            self._pull()
        if len(self.surplus) < size:
            raise EOFError(f"the peer ended {size - len(self.surplus)} bytes early")
        data = bytes(memoryview(self.surplus)[:size])
        del self.surplus[:size]
        self.received += size
        self.received_hash.update(data)
        return data

    def do_recv(self, size: int) -> None:
        """Receive `size` bytes of application data; other records are noted under `control`."""
        while size:
            size -= len(self._take(min(size, RECEIVE)))

    def do_recv_blocks(self, size: int) -> None:
        """Receive `size` bytes as whole blocks of the stream in any order; they count as if they came in order."""
        while len(self.surplus) < size and not self.ended:
            self._pull()
        blocks = [bytes(self.surplus[start : start + BLOCK]) for start in range(0, min(size, len(self.surplus)), BLOCK)]
        self.surplus[:size] = b"".join(sorted(blocks))
        self._take(size)

    def do_recv_clear(self, size: int) -> None:
        """Receive `size` bytes that come before the first record; they do not count as received."""
        while size:
            data = self.socket.recv(min(size, RECEIVE))
            if not data:
                raise EOFError(f"the peer ended {size} bytes early")
            size -= len(data)

    def do_echo(self, size: int) -> None:
        """Send back `size` bytes as they come."""
        while size:
            if not self.surplus:
                self._pull()
            data = self._take(min(size, len(self.surplus) or 1))
            for piece in self.channel.seal(memoryview(data), (MAX_PLAINTEXT,)):
                self.channel.write(piece)
            self.sent_hash.update(data)
            self.sent += len(data)
            size -= len(data)

    def do_recv_record(self) -> None:
        """Wait for a record that is not application data."""
        have = len(self.control)
        while len(self.control) == have:
            self._pull()
            if self.surplus or self.ended:
                raise ValueError("no control record came")

    def do_record(self, kind: int, data: str) -> None:
        """Send one record of any type, `data` in hexadecimal (raw)."""
        self.channel.write(self.channel.record(kind, bytes.fromhex(data)))

    def do_send_clear(self, data: str) -> None:
        """Send bytes past TLS, in hexadecimal; they do not count as sent."""
        self.socket.sendall(bytes.fromhex(data))

    def do_eof(self) -> None:
        """The peer must end its side without more data."""
        while not self.surplus and not self.ended:
            self._pull()
        if self.surplus:
            raise ValueError(f"at least {len(self.surplus)} bytes more than expected")

    def do_shutdown(self) -> None:
        """No more to send: FIN (raw), close_notify (openssl)."""
        self.channel.finish()

    def do_reset(self) -> None:
        """End with RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def do_wait(self) -> None:
        """Say {"event": "waiting"} and go on after a line on stdin."""
        say({"event": "waiting"})
        sys.stdin.readline()

    def result(self) -> dict[str, Any]:
        """What was sent and received so far."""
        return {
            "sent": self.sent,
            "sha256_sent": self.sent_hash.hexdigest(),
            "received": self.received,
            "sha256_received": self.received_hash.hexdigest(),
            "records_sent": self.channel.records_sent,
            "records_received": self.channel.records_received,
            "control": self.control,
        }


def say(message: dict[str, Any]) -> None:
    """One line of JSON, at once."""
    print(json.dumps(message), flush=True)


def set_first_seq(sock: socket.socket, number: int) -> None:
    """Only a socket under repair may be told (tcp_setsockopt); it may not stay so, or it connects without a word."""
    # linux/tcp.h: TCP_REPAIR on, TCP_REPAIR_QUEUE (the one that sends), TCP_QUEUE_SEQ, TCP_REPAIR off
    for option, value in ((19, 1), (20, 2), (21, number), (19, 0)):
        sock.setsockopt(socket.IPPROTO_TCP, option, struct.pack("=I", value))


def open_socket(job: dict[str, Any]) -> socket.socket:
    """The connected TCP socket."""
    host, port = job["connect"] if "connect" in job else job["listen"]
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.settimeout(float(job.get("timeout", 60)))
    for name, value in job.get("options", {}).items():
        level = socket.IPPROTO_TCP if name.startswith("TCP_") else socket.SOL_SOCKET
        sock.setsockopt(level, getattr(socket, name), value.encode() if isinstance(value, str) else value)
    if "first_seq" in job:
        set_first_seq(sock, job["first_seq"])
    if "connect" in job:
        sock.connect((host, port))
        return sock
    with sock as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1)
        say({"event": "listening", "port": listener.getsockname()[1]})
        accepted, _ = listener.accept()
    accepted.settimeout(float(job.get("timeout", 60)))
    return accepted


def tls_context(job: dict[str, Any]) -> ssl.SSLContext:
    """TLS 1.2 with the one cipher of the job."""
    serving = "listen" in job
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if serving else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(job["cipher"])
    if "keylog" in job:
        context.keylog_filename = job["keylog"]
    if serving:
        with tempfile.NamedTemporaryFile(suffix=".pem") as file:
            Path(file.name).write_bytes(self_signed())
            context.load_cert_chain(file.name)
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def run(kind: str, job: dict[str, Any]) -> dict[str, Any]:
    """Do a job to its end or its first error: `ok`, or `error` with the step's number.

    `seconds` runs from the first data sent or received to the last step.
    """
    result: dict[str, Any] = {"ok": False}
    session: Session | None = None
    number: int | None = None
    try:
        context = tls_context(job) if kind == "openssl" else None
        with open_socket(job) as sock:
            channel: Channel
            if context is None:
                session = Session(sock, RawChannel(sock, job), job)
            else:
                secure = context.wrap_socket(sock, server_side="listen" in job)
                channel = OpensslChannel(secure)
                session = Session(secure, channel, job)
            result["remote"] = session.socket.getpeername()[:2]
            for number, step in enumerate(job.get("steps", [])):  # noqa: B007 - read by the handler below
                arguments = {name: value for name, value in step.items() if name != "do"}
                getattr(session, "do_" + step["do"])(**arguments)
            now = time.monotonic()
            result["seconds"] = now - (session.began or now)
            session.socket.close()
        result["ok"] = True
    except Exception as error:  # noqa: BLE001 - whatever it is, the result line tells it
        result["error"] = {"step": number, "kind": type(error).__name__, "message": str(error)}
    return result | (session.result() if session else {})


def main(argv: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    if len(argv) != 2 or argv[0] not in ("raw", "openssl"):
        print("usage: python -m testbed.peers.program raw|openssl JOB", file=sys.stderr)
        return 2
    result = run(argv[0], json.loads(argv[1]))
    say(result)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
