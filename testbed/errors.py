"""What can go wrong around the guest, as one tree; each message is one line for the person at the terminal.

BedError
 ├── SetupError        the host lacks something, or a build stage failed
 └── GuestError        a virtual machine
      ├── BootFailed   it never answered: missing file, panic, hang, QEMU exit
      ├── GuestDied    it answered once and then went away; carries the end of its console
      ├── AgentError   the guest's agent refused a request (no such file, no such program)
      └── AgentTimeout a request did not finish before its deadline
"""

from __future__ import annotations


class BedError(Exception):
    """Base of all errors of the test bed; `str()` is fit for the user."""


class SetupError(BedError):
    """The host cannot do what is asked; the message says what to do about it."""


class GuestError(BedError):
    """Something about a running or booting guest."""

    def __init__(self, message: str, console: str = "") -> None:
        super().__init__(message)
        self.console = console


class BootFailed(GuestError):
    """The guest did not come up; `console` holds what its kernel said."""


class GuestDied(GuestError):
    """The guest or its QEMU ended while it was needed; `console` holds its last words."""


class AgentError(GuestError):
    """The agent in the guest answered with an error."""


class AgentTimeout(GuestError):
    """A deadline passed; `stdout` and `stderr` hold what had arrived until then."""

    def __init__(self, message: str, stdout: bytes = b"", stderr: bytes = b"") -> None:
        super().__init__(message)
        self.stdout = stdout
        self.stderr = stderr
