"""The harness's handle on a peer (testbed.peers.program) that runs in the NIC's namespace."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, Final, Self

from testbed.errors import BedError
from testbed.wire.namespace import Wire

START_SECONDS: Final = 20.0


class PeerError(BedError):
    """A peer did not do what was expected; the message has its own words."""


class Peer:
    """One running peer of `kind` raw or openssl. Context manager; `wire=None` runs it where we are.

    A listening peer's `port` is known when the constructor returns. It is killed when the thread that made it ends.
    """

    def __init__(self, wire: Wire | None, kind: str, job: dict[str, Any]) -> None:
        argv = [sys.executable, "-m", "testbed.peers.program", kind, json.dumps(job)]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop
        self._process = subprocess.Popen(
            wire.argv(argv) if wire else argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._last: dict[str, Any] | None = None
        self.port = 0
        if "listen" in job:
            try:
                self.port = int(self._event("listening", START_SECONDS)["port"])
            except BaseException:
                self.stop()
                raise

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put(None)

    def _next(self, deadline: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise PeerError("the peer says nothing") from None
        if line is None:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip()
            raise PeerError(f"the peer ended without a result: {said[-1000:]}")
        return line

    def _event(self, name: str, timeout: float) -> dict[str, Any]:
        line = self._next(time.monotonic() + timeout)
        if line.get("event") != name:
            raise PeerError(f"the peer did not get to {name!r}: {line.get('error', line)}")
        return line

    def await_waiting(self, timeout: float = 60) -> None:
        """Until it has reached a step "wait"."""
        self._event("waiting", timeout)

    def release(self) -> None:
        """Let it go on behind a step "wait"."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def result(self, timeout: float = 60) -> dict[str, Any]:
        """The result line, good or bad. Raises PeerError when there is none."""
        if self._last is None:
            deadline = time.monotonic() + timeout
            line = self._next(deadline)
            while "event" in line:
                line = self._next(deadline)
            self._last = line
        return self._last

    def stop(self) -> None:
        """End it, whatever it does; may be called any number of times."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
