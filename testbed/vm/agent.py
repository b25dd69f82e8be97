"""The host's side of the agent in the guest: run programs, move files, read the kernel log, without the network.

The protocol stands at the top of guest-image/agent.py. One reader thread takes frames off the stream and hands each to
the request it belongs to, so many requests run at once and any thread may start one. Every wait has a deadline. When
the stream ends, every open request and every later one raises GuestDied with the last lines of the console.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from testbed.errors import AgentError, AgentTimeout, GuestDied

HEADER = struct.Struct("!IBI")
PING, SPAWN, PUT, GET, DATA, SIGNAL, WINDOW = 1, 2, 3, 4, 5, 6, 7
OUT, ERR, EXIT, FAIL, HELLO = 16, 17, 18, 19, 20
CHUNK = 65536
KILL_GRACE = 10.0  # seconds a killed program has for its end to be reported


@dataclass(frozen=True)
class Completed:
    """A finished program; `returncode` is negative for a signal, as in subprocess."""

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        """Standard output as text."""
        return self.stdout.decode(errors="replace")


class Request:
    """One request under way; filled by the reader thread, awaited by the caller."""

    def __init__(self, agent: GuestAgent, number: int, label: str) -> None:
        self.agent = agent
        self.number = number
        self.label = label
        self.changed = threading.Condition()
        self.stdout = bytearray()
        self.stderr = bytearray()
        self.answer: tuple[int, bytes] | None = None
        self.read_so_far = 0

    def deliver(self, kind: int, data: bytes) -> None:
        """A frame has come for this request (reader thread)."""
        with self.changed:
            if kind == OUT:
                self.stdout += data
            elif kind == ERR:
                self.stderr += data
            else:
                self.answer = kind, data
            self.changed.notify_all()

    def _until(self, ready: Callable[[], bool], timeout: float) -> bool:
        """Wait for `ready` or the end of the request; GuestDied when neither can come any more."""
        with self.changed:
            done = self.changed.wait_for(lambda: ready() or self.answer is not None or self.agent.dead, timeout)
            if done and self.answer is None and not ready():
                raise self.agent.death(self.label)
            return done

    @property
    def running(self) -> bool:
        """Whether the guest has not yet reported the end."""
        return self.answer is None

    @property
    def unread(self) -> bool:
        """Whether `read` would return data at once."""
        return len(self.stdout) > self.read_so_far

    def wait(self, timeout: float) -> int:
        """The exit status. Raises AgentTimeout (the program goes on), AgentError, GuestDied."""
        if not self._until(lambda: False, timeout):
            what = f"{self.label}: still running after {timeout:g} s"
            raise AgentTimeout(what, bytes(self.stdout), bytes(self.stderr))
        assert self.answer is not None
        kind, data = self.answer
        if kind == FAIL:
            raise AgentError(f"{self.label}: {data.decode(errors='replace')}")
        return int(data) if kind == EXIT else 0

    def about(self, timeout: float) -> dict[str, str]:
        """The answer to a ping."""
        self.wait(timeout)
        assert self.answer is not None
        about: dict[str, str] = json.loads(self.answer[1])
        return about

    def read(self, timeout: float) -> bytes:
        """The next piece of standard output, b"" at the end. Raises AgentTimeout, GuestDied."""
        if not self._until(lambda: self.unread, timeout):
            raise AgentTimeout(f"{self.label}: said nothing for {timeout:g} s")
        with self.changed:
            piece = bytes(self.stdout[self.read_so_far :])
            self.read_so_far += len(piece)
        return piece

    def wait_for_output(self, needle: bytes, timeout: float) -> None:
        """Until `needle` stands in stdout or stderr. Raises AgentTimeout, AgentError (ended without it), GuestDied."""

        def seen() -> bool:
            return needle in self.stdout or needle in self.stderr

        if not self._until(seen, timeout):
            raise AgentTimeout(
                f"{self.label}: no {needle!r} within {timeout:g} s", bytes(self.stdout), bytes(self.stderr)
            )
        if not seen():
            raise AgentError(f"{self.label}: ended without {needle!r}: {bytes(self.stdout + self.stderr)[-500:]!r}")

    def write(self, data: bytes) -> None:
        """Feed standard input."""
        for start in range(0, len(data), CHUNK):
            self.agent.send(self.number, DATA, data[start : start + CHUNK])

    def close_input(self) -> None:
        """End of standard input."""
        self.agent.send(self.number, DATA)

    def resize(self, rows: int, columns: int) -> None:
        """Tell the program's terminal its size."""
        self.agent.send(self.number, WINDOW, struct.pack("!HH", rows, columns))

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the program's whole process group."""
        self.agent.send(self.number, SIGNAL, bytes([number]))


class GuestAgent:
    """A connection to the agent. `console_tail` supplies the text that GuestDied carries."""

    def __init__(self, connection: socket.socket, console_tail: Callable[[], str] = str) -> None:
        self._socket = connection
        self._console_tail = console_tail
        self._numbers = itertools.count(1)
        self._requests: dict[int, Request] = {}
        self._send_lock = threading.Lock()
        self.dead = False
        self._reader = threading.Thread(target=self._read_frames, name="guest-agent", daemon=True)
        self._reader.start()

    def death(self, label: str) -> GuestDied:
        """The error for a request that can no longer be answered."""
        console = self._console_tail()
        panic = re.search(r"Kernel panic - not syncing.*", console)
        cause = f": {panic[0].strip()}" if panic else ""
        return GuestDied(f"the guest went away during {label}{cause}", console)

    def close(self) -> None:
        """End the connection; open requests raise GuestDied."""
        with contextlib.suppress(OSError):  # the other side may have been faster
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._socket.close()

    def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self._socket.recv(min(size - len(data), 1 << 20))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def _read_frames(self) -> None:
        try:
            while True:
                number, kind, length = HEADER.unpack(self._receive(HEADER.size))
                data = self._receive(length)
                request = self._requests.get(number)
                if request is not None:
                    request.deliver(kind, data)
                    if kind not in (OUT, ERR):
                        del self._requests[number]
        except (OSError, EOFError):
            self.dead = True
            for request in list(self._requests.values()):
                with request.changed:
                    request.changed.notify_all()

    def send(self, number: int, kind: int, data: bytes = b"") -> None:
        """One frame to the guest. Raises GuestDied."""
        try:
            with self._send_lock:
                self._socket.sendall(HEADER.pack(number, kind, len(data)) + data)
        except OSError as error:
            raise self.death("a request to its agent") from error

    def _start(self, kind: int, label: str, **arguments: object) -> Request:
        request = Request(self, next(self._numbers), label)
        self._requests[request.number] = request
        self.send(request.number, kind, json.dumps(arguments).encode())
        return request

    def start_ping(self) -> Request:
        """Ask for a sign of life without waiting; `Request.about` takes the answer."""
        return self._start(PING, "ping")

    def ping(self, timeout: float = 10.0) -> dict[str, str]:
        """What the guest says of itself: `kernel`, `driver`, `driver_error`."""
        return self.start_ping().about(timeout)

    def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        terminal: tuple[int, int] | None = None,
    ) -> Request:
        """Start a program and return at once. `terminal` (rows, columns) gives it a terminal of its own."""
        extra: dict[str, object] = {}
        if terminal is not None:
            extra = {"pty": True, "rows": terminal[0], "cols": terminal[1]}
        return self._start(SPAWN, " ".join(argv), argv=list(argv), env=dict(env or {}), cwd=cwd, **extra)

    def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes = b"",  # noqa: A002 - the name that subprocess.run uses
        timeout: float = 30.0,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        check: bool = True,
    ) -> Completed:
        """Run a program to its end (`timeout` in seconds; then it is killed and AgentTimeout raised).

        Raises AgentError when it cannot be started, or, with `check`, when it ends with a status other than 0.
        """
        request = self.spawn(argv, env=env, cwd=cwd)
        deadline = time.monotonic() + timeout
        if input:
            request.write(input)
        request.close_input()
        try:
            status = request.wait(max(0.0, deadline - time.monotonic()))
        except AgentTimeout:
            request.kill()
            try:
                request.wait(KILL_GRACE)
            except AgentTimeout as error:
                raise self.death(f"{request.label} (it does not even answer to SIGKILL)") from error
            raise
        done = Completed(tuple(argv), status, bytes(request.stdout), bytes(request.stderr))
        if check and status:
            said = (done.stderr or done.stdout).decode(errors="replace").strip()
            raise AgentError(f"{request.label}: exit status {status}: {said[-2000:]}")
        return done

    def put(self, path: str, content: bytes, mode: int = 0o644, timeout: float = 60.0) -> None:
        """Write a file in the guest; its folders are made."""
        request = self._start(PUT, f"put {path}", path=path, mode=mode)
        request.write(content)
        request.close_input()
        request.wait(timeout)

    def get(self, path: str, timeout: float = 60.0) -> bytes:
        """A file's content."""
        request = self._start(GET, f"get {path}", path=path)
        request.wait(timeout)
        return bytes(request.stdout)

    def kernel_log(self) -> str:
        """The guest's kernel log from its beginning."""
        return self.run(["dmesg"]).text
