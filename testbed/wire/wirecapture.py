"""tcpdump on the wire's interface, started and stopped so that no packet is missed at either end.

tcpdump hears a packet after it says "listening on", and may still have packets to write when it is told to stop.
So the last packet is one of ours: a frame that the capture must show before tcpdump is stopped. It has the second
local experimental EtherType and goes to nobody's address; the guest ignores it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final, Self

from testbed.wire.namespace import Wire
from testbed.wire.pcapfile import CaptureError

START_SECONDS: Final = 10.0
STOP_SECONDS: Final = 20.0
POLL: Final = 0.02
BUFFER_KIB: Final = 1 << 17
DROPPED: Final = re.compile(r"^(\d+) packets? dropped by", re.MULTILINE)
MARKER_SIZE: Final = 60
MARKER_ETHERTYPE: Final = 0x88B6  # local experimental, the second one
SEND_MARKER: Final = (
    "import socket,sys; s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); s.bind((sys.argv[1], 0));"
    "s.send(bytes.fromhex(sys.argv[2]))"
)


class WireCapture:
    """Records `wire` into `path` (its name must end in .pcap, else distributions' tcpdump may not write it)."""

    def __init__(self, wire: Wire, path: Path, expression: str = "") -> None:
        self.path = path
        self._wire = wire
        # the marker must pass the filter, or the end would never come
        self._filter = [f"({expression}) or ether proto {MARKER_ETHERTYPE:#x}"] if expression else []
        self._process: subprocess.Popen[bytes] | None = None
        self._said = Path()

    def start(self) -> None:
        """Return when packets are being recorded. Raises CaptureError."""
        self._said = self.path.with_suffix(".said")
        self.path.unlink(missing_ok=True)
        argv = [sys.executable, "-m", "testbed.wire.tcpdump", "-i", self._wire.interface, "-n", "-U"]
        argv += ["-B", str(BUFFER_KIB), "-w", str(self.path), *self._filter]
        with open(self._said, "wb") as errors:
            self._process = self._wire.popen(argv, stdout=errors, stderr=errors)
        deadline = time.monotonic() + START_SECONDS
        while "listening on" not in self._said.read_text():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = self._said.read_text().strip()
                self.kill()
                raise CaptureError(f"tcpdump does not record {self._wire.interface}: {said or 'it says nothing'}")
            time.sleep(POLL)

    def stop(self) -> None:
        """End the capture with everything that was sent until now. Raises CaptureError, also when packets were lost."""
        assert self._process is not None
        try:
            self._flush(time.monotonic() + STOP_SECONDS)
            self._process.send_signal(signal.SIGINT)
            self._process.wait(STOP_SECONDS)
            said = self._said.read_text()
        except subprocess.TimeoutExpired:
            raise CaptureError("tcpdump does not end") from None
        finally:
            self.kill()
        losses = [int(count) for count in DROPPED.findall(said)]
        if not losses or any(losses):
            raise CaptureError(f"tcpdump lost packets: {said.strip()}")

    def _flush(self, deadline: float) -> None:
        """Send the marker and wait until it is in the file."""
        assert self._process is not None
        cookie = secrets.token_bytes(32)
        frame = bytes.fromhex("020000000001020000000002") + MARKER_ETHERTYPE.to_bytes(2, "big") + cookie
        frame = frame.ljust(MARKER_SIZE, b"\0")
        self._wire.run([sys.executable, "-c", SEND_MARKER, self._wire.interface, frame.hex()])
        with open(self.path, "rb") as file:
            while True:
                file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 20)))
                if cookie in file.read():
                    return
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise CaptureError(f"the end of the capture did not come: {self._said.read_text().strip()}")
                time.sleep(POLL)

    def kill(self) -> None:
        """End tcpdump, whatever it does; may be called any number of times."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        with contextlib.suppress(FileNotFoundError):
            self._said.unlink()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self._process is not None:
            self.stop()
        else:
            self.kill()
