"""A port with the fault director in it: wraps any other; without a scenario it only passes on.

The clock and the timer for what is held are here, the decisions in nicdev/faults. Packets for a device that cannot take
more wait in order, and the wrapped port stays silent until the device takes them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from nicdev.abi import Cap, Direction, EventCode
from nicdev.edge.control_socket import Later
from nicdev.edge.loop import Loop
from nicdev.edge.port import Port
from nicdev.errors import ConfigError
from nicdev.faults.device import Faults
from nicdev.faults.director import Director
from nicdev.faults.parcel import Parcel
from nicdev.faults.parse import parse
from nicdev.faults.scenario import Scenario
from nicdev.nic import Nic, Packet
from nicdev.stats import Counter
from nicdev.wire import vnet


class FaultyPort(Port):
    """The port of `nic`, which is `inner` with whatever goes wrong on the way; owns `inner`."""

    def __init__(self, loop: Loop, inner: Port, nic: Nic) -> None:
        super().__init__()
        self._loop = loop
        self._inner = inner
        self._nic = nic
        self._director: Director | None = None
        self._silent = False  # the device cannot take more
        self._waiting: deque[tuple[bytearray, bytearray]] = deque()  # for the device
        self.tell: Callable[[EventCode], None] = lambda code: None  # the driver
        inner.receiver = self._from_inner
        inner.before_frames = self._before_inner

    # -- scenarios ----------------------------------------------------------------------------------------------------

    def set(self, scenario: Scenario) -> None:
        """Begin `scenario` in place of the one before, if any."""
        caps = self._nic.control.caps
        self._end()
        self._director = Director(scenario, self._nic.table, self._nic.stats, self._loop.time)
        self._nic.table.observer = self._director.flows
        self._nic.control.faults = self._director.device
        self._tell_caps(caps)

    def clear(self) -> None:
        """No more faults; what is held leaves now."""
        caps = self._nic.control.caps
        self._end()
        self._tell_caps(caps)

    def _tell_caps(self, before: Cap) -> None:
        """A scenario that refuses contexts takes from what the device can do: the driver has to hear of it."""
        if self._nic.control.caps != before:
            self.tell(EventCode.CONFIG_CHANGED)

    def heard(self) -> bool:
        """Whether the driver goes by what the device can do now."""
        return self._nic.heard

    def _end(self) -> None:
        director, self._director = self._director, None
        if director is None:
            return
        self._nic.table.observer = None
        self._nic.control.faults = Faults()
        self._loop.call_at(None, self._on_time)
        self._emit(director.flush())

    def describe(self) -> dict[str, object] | None:
        """The scenario at work, for control output."""
        return self._director.describe() if self._director is not None else None

    # -- packets ------------------------------------------------------------------------------------------------------

    def send(self, packet: Packet) -> bool:
        """Transmit one frame. With a scenario always True: what the wrapped port refuses is counted here."""
        director = self._director
        if director is None:
            return self._inner.send(packet)
        header = packet.header[: vnet.VNET_HDR.size]
        for parcel in director.feed(Direction.TX, header, packet.frame, self._loop.time()):
            self._transmit(parcel)
        self._loop.call_at(director.deadline(), self._on_time)
        return True

    @property
    def sender(self) -> Callable[[Packet], bool]:
        """Without a scenario the wrapped port's own."""
        return self.send if self._director is not None else self._inner.sender

    def _transmit(self, parcel: Parcel) -> None:
        if not self._inner.send(Packet(parcel.header, parcel.frame)):
            self._nic.stats.add(Counter.TX_DROP_PORT)

    def _before_inner(self) -> None:
        self.before_frames()  # which is set later

    def _from_inner(self, header: memoryview, frame: memoryview) -> bool:
        director = self._director
        if director is None:
            self._deliver(header, frame)
        else:
            for parcel in director.feed(Direction.RX, header, frame, self._loop.time()):
                self._deliver(parcel.header, parcel.frame)
            self._loop.call_at(director.deadline(), self._on_time)
        return not self._silent

    def _deliver(self, header: bytes | memoryview, frame: memoryview) -> None:
        """Hand a packet to the device, or keep a copy until it takes some."""
        if self._silent:
            self._waiting.append((bytearray(header), bytearray(frame)))
        else:
            writable = header if isinstance(header, memoryview) else memoryview(bytearray(header))
            self._silent = not self.receiver(writable, frame)

    def _on_time(self) -> None:
        if self._director is not None:
            self.before_frames()
            self._emit(self._director.poll(self._loop.time()))
            self._loop.call_at(self._director.deadline(), self._on_time)

    def _emit(self, parcels: list[tuple[Direction, Parcel]]) -> None:
        for direction, parcel in parcels:
            if direction is Direction.TX:
                self._transmit(parcel)
            else:
                self._deliver(parcel.header, parcel.frame)

    def resume(self) -> None:
        """The device can take packets again: first those that wait here."""
        self._silent = False
        while self._waiting:
            header, frame = self._waiting.popleft()
            if not self.receiver(memoryview(header), memoryview(frame)):
                self._silent = True
                return
        self._inner.resume()

    def features_changed(self, accepted: int) -> None:
        """The guest accepted these (virtio feature bits)."""
        self._inner.features_changed(accepted)

    def close(self) -> None:
        """Let go what is held, and close the wrapped port."""
        self._end()
        self._inner.close()


class FaultsCommand:
    """{"cmd": "faults"} of the control socket.

    {"do": "set", "text": TOML, "name": for messages, "nic": 0}, {"do": "clear"}, {"do": "show"}; the last two mean all
    NICs where none is named. A scenario that is no good changes nothing. Set is answered when it acts on all that is
    opened in the guest from then on: a driver that has to hear of it has.
    """

    def __init__(self, ports: Sequence[FaultyPort]) -> None:
        self._ports = ports

    def __call__(self, request: dict[str, Any]) -> dict[str, Any] | Later:
        """Answer one request."""
        do, nic = request.get("do", "show"), request.get("nic")
        try:
            if nic is not None and (type(nic) is not int or not 0 <= nic < len(self._ports)):
                raise ConfigError(f"there is no NIC {nic!r}, the last is {len(self._ports) - 1}")
            ports = self._ports if nic is None else [self._ports[nic]]
            if do == "set":
                ports[0].set(self._scenario(request))
                if not ports[0].heard():
                    return Later(ports[0].heard, "the driver has not heard of it")
            elif do == "clear":
                for port in ports:
                    port.clear()
            elif do == "show":
                return {"nics": [port.describe() for port in ports]}
            else:
                raise ConfigError("faults takes do: set, clear or show")
        except ConfigError as error:
            return {"ok": False, "error": str(error)}
        return {}

    @staticmethod
    def _scenario(request: dict[str, Any]) -> Scenario:
        text, name = request.get("text"), request.get("name", "scenario")
        if type(text) is not str or type(name) is not str:
            raise ConfigError("faults set takes text and name")
        return parse(text, name)
