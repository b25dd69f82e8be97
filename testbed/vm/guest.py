"""Start a guest, talk to its agent, and make sure that nothing of it is left behind.

Two failures are never mixed up: BootFailed (it never answered) and GuestDied (it answered once). A failed boot is
tried once more, and said, because emulated early boot is not perfectly reliable; a wrong file or driver is not.
QEMU gets SIGKILL from the kernel when the thread that started it ends, however it ends: start guests from a thread
that outlives them.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from qemu.qmp import QMPClient

from testbed.errors import AgentTimeout, BootFailed, GuestDied, GuestError
from testbed.stages import BUILD, say
from testbed.vm.agent import GuestAgent
from testbed.vm.qemu import SOCKET_PATH_MAX, Machine, VhostUserNic, command_line
from testbed.vm.runtime import RuntimeFolder

BOOT_TIMEOUT = 90.0  # seconds; a loaded machine under TCG needs a few, so only a hang gets here
POLL = 0.05
TAIL_LINES = 30
BOOT_FAILURE = re.compile(r"Kernel panic - not syncing.*|tlsnic-boot-failed:.*|Oops: .*")
# What a kernel prints only when something is wrong with it.
SUSPICIOUS = re.compile(
    r"BUG: |WARNING: |\] RIP: |\] Call Trace:|Oops|Kernel panic|ref_tracker|unreferenced object|blocked for more than|"
    r"possible recursive locking|possible circular locking|inconsistent lock state|suspicious RCU|soft lockup|"
    r"self-detected stall|detected stalls|general protection fault|unregister_netdevice: waiting|UBSAN|KASAN|"
    r"scheduling while atomic|sleeping function called"
)


def kernel_complaints(log: str) -> list[str]:
    """The lines of a kernel log that tell of a fault in the kernel or a driver."""
    return [line for line in log.splitlines() if SUSPICIOUS.search(line)]


class Guest:
    """A running guest; use as a context manager. `agent` is there from start() on."""

    agent: GuestAgent

    def __init__(self, machine: Machine, *, timeout: float = BOOT_TIMEOUT, note: Callable[[str], None] = say) -> None:
        self.machine = machine
        self.about: dict[str, str] = {}
        self.boot_seconds = 0.0
        self.console_log = BUILD / "log" / f"{machine.name}.console"
        self._timeout = timeout
        self._note = note
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: RuntimeFolder | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Boot until the agent answers and the driver is loaded. Raises BootFailed."""
        self._check_inputs()
        try:
            try:
                self._boot()
            except BootFailed as error:
                self._note(f"the guest did not boot ({error}); trying once more")
                self.stop()
                self.console_log.replace(self.console_log.with_suffix(".console-failed"))
                self._boot()
            self._check_driver()
        except BaseException:
            self.stop()
            raise

    def _check_inputs(self) -> None:
        machine = self.machine
        for path in (machine.kernel, machine.initrd, *machine.disks):
            if not path.exists():
                raise BootFailed(f"{path} is missing; run `make image`")
        for nic in machine.nics:
            if isinstance(nic, VhostUserNic) and len(os.fsencode(nic.path)) > SOCKET_PATH_MAX:
                raise BootFailed(f"socket path is longer than {SOCKET_PATH_MAX} bytes: {nic.path}")

    def _boot(self) -> None:
        began = time.monotonic()
        self._folder = RuntimeFolder()
        runtime = self._folder.path
        self.console_log.parent.mkdir(parents=True, exist_ok=True)
        self.console_log.write_bytes(b"")
        argv = ["setpriv", "--pdeathsig", "KILL", *command_line(self.machine, runtime, self.console_log)]
        inherited = [nic.fd for nic in self.machine.nics if hasattr(nic, "fd")]
        with open(runtime / "qemu.log", "wb") as errors:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, start_new_session=True, pass_fds=inherited
            )
        deadline = began + self._timeout
        self.agent = GuestAgent(self._connect(deadline), self.console_tail)
        ping = self.agent.start_ping()
        while True:
            try:
                self.about = ping.about(POLL)
                break
            except AgentTimeout:
                self._check_boot(deadline)
            except GuestDied:
                self._process.wait(10)
                self._check_boot(deadline)
        self.boot_seconds = time.monotonic() - began

    def _connect(self, deadline: float) -> socket.socket:
        assert self._folder is not None
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self._folder.path / "agent.sock"))
            except OSError:
                connection.close()
                self._check_boot(deadline)
                time.sleep(POLL / 5)
            else:
                return connection

    def _check_boot(self, deadline: float) -> None:
        """Raise BootFailed when there is no point in waiting any longer."""
        assert self._process is not None
        assert self._folder is not None
        found = BOOT_FAILURE.search(self.console())
        if found:
            raise BootFailed(f"guest kernel: {found[0].strip()}", self.console_tail())
        if self._process.poll() is not None:
            said = (self._folder.path / "qemu.log").read_text(errors="replace").strip().splitlines()
            what = said[-1] if said else f"exit status {self._process.returncode}"
            raise BootFailed(f"QEMU ended: {what}", self.console_tail())
        if time.monotonic() > deadline:
            last = (self.console().rstrip().splitlines() or ["nothing on its console"])[-1]
            raise BootFailed(f"no answer within {self._timeout:g} s; last: {last}", self.console_tail())

    def _check_driver(self) -> None:
        said = self.about["driver_error"].strip()
        if said:
            driver = self.about["driver"]
            kernel = re.findall(rf"\] ({driver}: .*)", self.agent.kernel_log())
            why = "; ".join([said.splitlines()[-1], *(f"kernel: {line}" for line in kernel[-1:])])
            raise BootFailed(f"the driver {driver} does not load: {why}", self.console_tail())

    def console(self) -> str:
        """Everything the guest's kernel has printed."""
        return self.console_log.read_text(errors="replace") if self.console_log.exists() else ""

    def console_tail(self) -> str:
        """The end of the console, from where the kernel's trouble begins if it is in trouble."""
        lines = self.console().rstrip().splitlines()
        trouble = next((number for number, line in enumerate(lines) if SUSPICIOUS.search(line)), len(lines))
        return "\n".join(lines[min(trouble, max(0, len(lines) - TAIL_LINES)) :])

    def kernel_complaints(self) -> list[str]:
        """Suspicious lines in the guest's kernel log; empty when all is well."""
        return kernel_complaints(self.agent.kernel_log())

    def kernel_log_clean(self) -> bool:
        """Whether the guest's kernel has nothing to complain about."""
        return not self.kernel_complaints()

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        if self._process is None:
            raise GuestError("the guest is not running")
        return self._process.pid

    def qmp(self, command: str, **arguments: object) -> object:
        """Execute a QMP command and return its answer; each call is a connection of its own."""
        path = str(self._folder.path / "qmp.sock") if self._folder else ""

        async def execute() -> object:
            client = QMPClient(self.machine.name)
            await client.connect(path)
            try:
                answer: object = await client.execute(command, arguments or None)
                return answer
            finally:
                await client.disconnect()

        return asyncio.run(asyncio.wait_for(execute(), 10))

    def stop(self) -> None:
        """End QEMU at once and remove its sockets; may be called any number of times."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if hasattr(self, "agent"):
            self.agent.close()
        if self._folder is not None:
            self._folder.remove()
            self._folder = None
