"""What the protocol asks of the operating system and of the device: two interfaces, implemented elsewhere.

File descriptors are plain integers here, so that the whole negotiation runs in a test without a single real one.
"""

from __future__ import annotations

from typing import Final, Protocol

from nicdev.virtio.ring import SplitRing

NO_FD: Final = -1


class Host(Protocol):
    """The operating system, as far as the protocol needs it. edge/hostmem.py implements it."""

    def map(self, fd: int, offset: int, size: int) -> memoryview:
        """Map `size` bytes of `fd` from `offset`, shared and writable; `fd` stays the caller's.

        Raises ProtocolError if it cannot be.
        """

    def unmap(self, view: memoryview) -> None:
        """Give up what `map` returned; the bytes go when the last view of them does."""

    def check_event(self, fd: int) -> None:
        """Make `fd` ready to be used as kick, call or err; raises ProtocolError if it is nothing that can be waited
        for."""

    def signal(self, fd: int) -> None:
        """Signal an event fd; an fd that cannot be signalled is the peer's loss."""

    def close(self, fd: int) -> None:
        """Close `fd`."""


class Device(Protocol):
    """The NIC behind the queues. Vring `index` 2n is receiveq n, 2n + 1 is transmitq n. No callback may raise."""

    def queue_started(self, index: int, ring: SplitRing, kick_fd: int, call_fd: int, err_fd: int) -> None:
        """Serve `ring` from now on, beginning with what is already in it; no kick may come for that.

        call_fd and err_fd may be NO_FD. The fds stay the protocol's property and are valid until `queue_stopped`.
        """

    def queue_stopped(self, index: int) -> None:
        """Do not touch the ring or its fds any more.

        Chains that were popped have been pushed before returning.
        """

    def features_set(self, features: int) -> None:
        """The driver accepted these virtio feature bits; no queue runs."""

    def set_mtu(self, mtu: int) -> None:
        """The host MTU in bytes, 68 to 65535."""

    def reset(self, reason: str) -> None:
        """Contexts and keys must go: there is a new driver instance, or none.

        No queue runs, unless `reason` says otherwise.
        """
