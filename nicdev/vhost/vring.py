"""The virtqueues of one connection: what the front end has told us about each, and whether the device serves it.

A vring is *started* once it has a size, addresses and a kick fd, until GET_VRING_BASE; it is *enabled* by message,
or always where protocol features were not negotiated (vhost-user, "Ring states"). The device serves it while it is
both. It hears only `queue_started` and `queue_stopped`: whatever changes under a running ring (an fd, addresses)
happens between the two.

    stopped ---> started, not in memory ---> running <---> disabled, or broken by its driver
       ^________________|________________________|____________________|    GET_VRING_BASE, reset

What waits in a transmit ring that is disabled is discarded when it is disabled and when it is enabled again
("started but disabled": process and discard); its kicks meanwhile are not watched. A memory change re-translates
the rings; one that is no longer in memory pauses until it is again, because QEMU replaces a region by REM_MEM_REG
and ADD_MEM_REG under running rings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nicdev.errors import GuestMemoryError, ProtocolError, RingError
from nicdev.stats import Counter, Stats
from nicdev.vhost.host import NO_FD, Device, Host
from nicdev.virtio.memory import GuestMemory
from nicdev.virtio.ring import RingLayout, SplitRing


@dataclass(slots=True)
class Vring:
    """One virtqueue; its fds are owned here."""

    index: int
    num: int = 0
    addresses: tuple[int, int, int] | None = None  # descriptor table, available ring, used ring
    base: int = 0  # where to begin; while `ring` lives, ring.base is the truth
    stopped_at: int | None = None  # base when the ring last stopped: the same driver would go on there
    kick_fd: int = NO_FD
    call_fd: int = NO_FD
    err_fd: int = NO_FD
    enabled: bool = False  # by message
    ring: SplitRing | None = None  # from the first time it runs until it stops
    running: bool = False  # the device serves it

    @property
    def started(self) -> bool:
        """Everything that a ring needs is known."""
        return self.num > 0 and self.addresses is not None and self.kick_fd != NO_FD

    @property
    def is_tx(self) -> bool:
        """Odd vrings are transmit queues (virtio 1.2, section 5.1.2)."""
        return self.index % 2 == 1


class Vrings:
    """All virtqueues of a connection; the only place that starts and stops them."""

    def __init__(self, host: Host, device: Device, stats: Stats, count: int) -> None:
        self._host = host
        self._device = device
        self._stats = stats
        self._memory = GuestMemory()
        self._vrings = [Vring(index) for index in range(count)]
        self.negotiated(event_idx=False, indirect=False, by_message=False)

    def __len__(self) -> int:
        return len(self._vrings)

    def __iter__(self) -> Iterator[Vring]:
        return iter(self._vrings)

    def __getitem__(self, index: int) -> Vring:
        """The vring of that number, which is the peer's word; raises ProtocolError if there is none."""
        if index >= len(self._vrings):
            raise ProtocolError(f"vring {index} of {len(self._vrings)}")
        return self._vrings[index]

    def stopped(self, index: int) -> Vring:
        """The vring of that number; also raises ProtocolError while it has a ring, whose size and place must not
        change then."""
        vring = self[index]
        if vring.ring is not None:
            raise ProtocolError(f"vring {index} reconfigured while it runs")
        return vring

    # -- changes that concern all of them --------------------------------------------------------------------------

    def negotiated(self, *, event_idx: bool, indirect: bool, by_message: bool) -> None:
        """What rings made from now on may use, and whether they are enabled by message."""
        self._event_idx = event_idx
        self._indirect = indirect
        self._by_message = by_message
        self._update_all()

    def follow(self, memory: GuestMemory) -> None:
        """Move every ring to a new memory table; pause those that are not in it, start those that are again."""
        self._memory = memory
        for vring in self._vrings:
            if vring.ring is not None:
                try:
                    vring.ring.attach(memory)
                except GuestMemoryError:
                    self.drop_ring(vring)
        self._update_all()

    def _update_all(self) -> None:
        for vring in self._vrings:
            try:
                self._try_to_run(vring)
            except RingError:
                continue  # not in memory now; the next change may bring it

    def forget_driver(self) -> None:
        """The next SET_VRING_BASE says nothing about who the driver is."""
        for vring in self._vrings:
            vring.stopped_at = None

    def stop_all(self) -> None:
        """Stop every vring."""
        for vring in self._vrings:
            self.stop(vring)

    def close(self) -> None:
        """Close every fd; the vrings are stopped already."""
        for vring in self._vrings:
            self.close_fd(vring.call_fd)
            self.close_fd(vring.err_fd)
            vring.call_fd = vring.err_fd = NO_FD

    # -- one vring -------------------------------------------------------------------------------------------------

    def update(self, vring: Vring) -> None:
        """Start the vring if it may run now. Raises ProtocolError if its addresses are impossible, and forgets them."""
        try:
            self._try_to_run(vring)
        except RingError as error:
            vring.addresses = None
            raise ProtocolError(f"vring {vring.index}: {error}") from error

    def _try_to_run(self, vring: Vring) -> None:
        """Raises RingError if the ring cannot be."""
        if vring.running or not vring.started or not self._is_enabled(vring):
            return
        if vring.ring is None:
            assert vring.addresses is not None  # started
            layout = RingLayout(vring.num, *vring.addresses)
            vring.ring = SplitRing(
                self._memory, layout, base=vring.base, event_idx=self._event_idx, indirect=self._indirect
            )
        if vring.ring.broken:
            return
        vring.running = True
        self._device.queue_started(vring.index, vring.ring, vring.kick_fd, vring.call_fd, vring.err_fd)
        # Whoever served the ring before may have used buffers and not lived to say so. A superfluous signal does no
        # harm.
        self._signal(vring)

    def _is_enabled(self, vring: Vring) -> bool:
        return vring.enabled or not self._by_message

    def enable(self, vring: Vring, enabled: bool) -> None:
        """Enable or disable by message. Raises ProtocolError like `update`."""
        if enabled == vring.enabled:
            return
        vring.enabled = enabled
        if not self._is_enabled(vring):
            self.pause(vring)
        if not vring.running:
            self._discard(vring)
        self.update(vring)

    def pause(self, vring: Vring) -> None:
        """Take the ring from the device; its position is kept."""
        if vring.running:
            vring.running = False
            self._device.queue_stopped(vring.index)

    def drop_ring(self, vring: Vring) -> None:
        """Pause, and forget the ring but not where it was."""
        self.pause(vring)
        if vring.ring is not None:
            vring.base = vring.ring.base
            vring.ring = None

    def stop(self, vring: Vring) -> None:
        """Back to "stopped": a new kick fd is needed to start again.

        call and err stay, QEMU may send them only once.
        """
        self.drop_ring(vring)
        if vring.started:
            vring.stopped_at = vring.base
        self.close_fd(vring.kick_fd)
        vring.kick_fd = NO_FD

    def close_fd(self, fd: int) -> None:
        """Close `fd` if it is one."""
        if fd != NO_FD:
            self._host.close(fd)

    def _discard(self, vring: Vring) -> None:
        """Return what waits in a disabled transmit ring unsent, at most one ring full; the packets are counted."""
        ring = vring.ring
        if ring is None or not vring.is_tx or ring.broken:
            return
        try:
            for _ in range(ring.num):
                if (chain := ring.pop()) is None:
                    break
                ring.push(chain[0], 0)
                self._stats.add(Counter.TX_DROP_QUEUE_DOWN)
        except RingError:
            self._stats.add(Counter.TX_RING_ERRORS)
        if ring.publish():
            self._signal(vring)

    def _signal(self, vring: Vring) -> None:
        if vring.call_fd != NO_FD:
            self._host.signal(vring.call_fd)
