"""The NIC's backend as a child process: started, asked over its control socket, stopped."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Self

from testbed.errors import SetupError
from testbed.wire.namespace import Wire

START_SECONDS: Final = 20
STOP_SECONDS: Final = 5
NIC_MODULE: Final = "nicdev.cli"


class NicProcess:
    """`vhost-user-tlsnic` serving `sockets` (created by it); `log` takes its stderr. Context manager.

    It runs in the namespace of `wire` if one is given. After `stop` or `kill` it may be started again. `module` is the
    program, for a test that needs one with a difference.
    """

    def __init__(
        self,
        sockets: Sequence[Path],
        port: str,
        log: Path,
        extra: Sequence[str] = (),
        wire: Wire | None = None,
        *,
        module: str = NIC_MODULE,
    ) -> None:
        self.sockets = list(sockets)
        self.log = log
        self.control_path = sockets[0].with_name(f"{sockets[0].name}.control")
        paths = [item for path in sockets for item in ("--socket-path", str(path))]
        control = ["--control", str(self.control_path)]
        program = [sys.executable, "-m", module, *paths, "--port", port, *control, *extra]
        # The kernel ends it when the thread that started it goes, however that goes.
        self.argv = wire.argv(program) if wire else ["setpriv", "--pdeathsig", "KILL", "--", *program]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id; the tap's namespace is /proc/PID/ns/net."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start and wait until it answers on its control socket. Raises SetupError with the backend's own words."""
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                lines = self.log.read_text(errors="replace").strip().splitlines()
                raise SetupError(lines[-1] if lines else "the NIC did not start and said nothing")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.02)

    def _answers(self) -> bool:
        try:
            self.ask("info")
        except (FileNotFoundError, ConnectionRefusedError):  # not yet, or the file of one that was killed
            return False
        return True

    def ask(self, command: str, **fields: Any) -> dict[str, Any]:
        """One request to the control socket. Raises SetupError with the NIC's words when it refuses."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(10)
            client.connect(str(self.control_path))
            client.sendall(json.dumps({"cmd": command, **fields}).encode() + b"\n")
            with client.makefile("rb") as answers:
                answer: dict[str, Any] = json.loads(answers.readline())
        if not answer.pop("ok"):
            raise SetupError(f"NIC: {answer['error']}")
        return answer

    def stats(self, index: int = 0) -> dict[str, int]:
        """The counters of one NIC of the process."""
        counters: dict[str, int] = self.ask("stats")["nics"][index]
        return counters

    def contexts(self, index: int = 0) -> list[dict[str, Any]]:
        """The live contexts of one NIC of the process."""
        contexts: list[dict[str, Any]] = self.ask("contexts")["nics"][index]
        return contexts

    def history(self, flow: str | None = None, index: int = 0) -> list[dict[str, Any]]:
        """The same, each with its last events; `flow` as in nicdev.edge.watch."""
        chosen = {} if flow is None else {"flow": flow}
        contexts: list[dict[str, Any]] = self.ask("history", **chosen)["nics"][index]
        return contexts

    @contextlib.contextmanager
    def faults(self, text: str, index: int = 0) -> Iterator[None]:
        """A fault scenario (TOML, docs/faults.md) for the time of the block.

        Raises SetupError for a bad one, and for one that the guest's driver does not hear of in time.
        """
        answer = self.ask("faults", do="set", text=text, nic=index)
        try:
            if "warning" in answer:
                raise SetupError(f"NIC: {answer['warning']}")
            yield
        finally:
            self.ask("faults", do="clear", nic=index)

    def fault_rules(self, index: int = 0) -> dict[str, int]:
        """How often each rule of the scenario at work has struck."""
        scenario = self.ask("faults", do="show", nic=index)["nics"][0]
        return {rule["name"]: rule["struck"] for rule in scenario["rules"]}

    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> int:
        """SIGTERM and wait; returns the exit status."""
        if self._process is None:
            return 0
        self._process.terminate()
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
