"""The event loop: epoll, callbacks that asked to run again or at a time, and a clean end on SIGTERM or SIGINT.

It blocks whenever there is nothing to do: a polling backend starves a guest that runs under TCG on the same cores.
"""

from __future__ import annotations

import select
import signal
import socket
import time
from collections.abc import Callable

from nicdev.edge.collector import seldom_full


class Loop:
    """Single-threaded readiness loop. Callbacks must not block."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._soon: dict[Callable[[], None], None] = {}  # ordered set
        self._timers: dict[Callable[[], None], float] = {}
        self._running = True
        self._wake_r, self._wake_w = socket.socketpair()
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        self.watch(self._wake_r.fileno(), self._on_signal)

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back while `fd` is readable (level-triggered)."""
        self._epoll.register(fd, select.EPOLLIN)
        self._callbacks[fd] = callback

    def unwatch(self, fd: int) -> None:
        """Forget `fd`; unknown ones are ignored, so that cleanup may run twice."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def soon(self, callback: Callable[[], None]) -> None:
        """Call back once in the next round, after whatever is ready."""
        self._soon[callback] = None

    @staticmethod
    def time() -> float:
        """The loop's clock: seconds, never set back."""
        return time.monotonic()

    def call_at(self, when: float | None, callback: Callable[[], None]) -> None:
        """Call back once at `when` (as `time` tells it), in place of any other time for this callback; None: never."""
        if when is None:
            self._timers.pop(callback, None)
        else:
            self._timers[callback] = when

    def _run_timers(self) -> float:
        """Call back whose time has come; returns seconds until the next one's, -1: there is none."""
        now = self.time()
        nearest = min(self._timers.values())
        if nearest <= now:
            for callback in [callback for callback, when in self._timers.items() if when <= now]:
                if self._timers.pop(callback, None) is not None:  # one that came before may have taken it away
                    callback()
            if not self._timers:
                return -1
            nearest = min(self._timers.values())
        return max(0.0, nearest - now)

    def install_signals(self) -> None:
        """End `run` on SIGTERM and SIGINT."""
        signal.set_wakeup_fd(self._wake_w.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())

    def stop(self) -> None:
        """Make `run` return after the current round, or at once if it has not begun."""
        self._running = False

    def _on_signal(self) -> None:
        self._wake_r.recv(4096)

    @seldom_full()
    def run(self) -> None:
        """Run until `stop`; once."""
        while self._running:
            soon, self._soon = self._soon, {}
            for callback in soon:
                callback()
            patience = self._run_timers() if self._timers else -1
            if self._soon or not self._running:
                patience = 0
            for fd, _events in self._epoll.poll(patience):
                # A callback of this round may have unwatched an fd that is still in the list.
                if (ready := self._callbacks.get(fd)) is not None:
                    ready()

    def close(self) -> None:
        """Release the epoll instance and the signal pipe."""
        self._epoll.close()
        self._wake_r.close()
        self._wake_w.close()
