"""Every error the device raises, as one tree; the class says who broke the rule.

    TlsNicError
     ├── ConfigError            the person who started us: one line on stderr, exit status 2
     ├── ProtocolError          the vhost-user front end: reply-ack nonzero or close that connection
     ├── RingError              the guest's ring: that ring stops, the others go on
     │    └── GuestMemoryError  an address the guest gave is not in its memory
     ├── FrameError             bytes that are no frame we can parse: a named drop
     ├── CommandError           the guest driver's command: a status in its reply
     └── TxDrop                 a packet marked for encryption that must not leave: a named drop

The last four carry what their boundary needs (a counter or a status), so no caller has to translate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nicdev.abi import Status
    from nicdev.stats import Counter


class TlsNicError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(TlsNicError):
    """The command line or environment asks for what cannot be; the message says what to do."""


class ProtocolError(TlsNicError):
    """A vhost-user message that is malformed, out of order or impossible."""


class RingError(TlsNicError):
    """A virtqueue that breaks the virtio specification; the ring cannot be trusted any further."""


class GuestMemoryError(RingError):
    """A guest address or length outside the memory table."""


class FrameError(TlsNicError):
    """A frame that cannot be handled; `counter` names the drop."""

    def __init__(self, counter: Counter, detail: str = "") -> None:
        super().__init__(detail or counter.name.lower())
        self.counter = counter


class CommandError(TlsNicError):
    """A driver command that is refused; `status` goes into its reply."""

    def __init__(self, status: Status, detail: str = "") -> None:
        super().__init__(detail or status.name.lower())
        self.status = status


class TxDrop(TlsNicError):
    """A packet marked for encryption that must not reach the wire; `counter` names the reason."""

    def __init__(self, counter: Counter, detail: str = "") -> None:
        super().__init__(detail or counter.name.lower())
        self.counter = counter
