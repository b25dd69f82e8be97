"""{"cmd": "personality"} of the control socket: how NICs survive disorder, to see and to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nicdev.abi import EventCode
from nicdev.edge.device import Device
from nicdev.tls.personality import RX_PERSONALITIES


class PersonalityCommand:
    """{"rx": NAME, "nic": 0} changes that of contexts made from now on, and tells the driver.

    Without "rx" it only shows; without "nic" all NICs are meant.
    """

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = devices

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        rx, number = request.get("rx"), request.get("nic")
        if rx is not None and (type(rx) is not str or rx not in RX_PERSONALITIES):
            return {"ok": False, "error": f"rx is one of {', '.join(sorted(RX_PERSONALITIES))}"}
        if number is not None and (type(number) is not int or not 0 <= number < len(self._devices)):
            return {"ok": False, "error": f"there is no NIC {number!r}, the last is {len(self._devices) - 1}"}
        if rx is not None:
            for device in self._devices if number is None else [self._devices[number]]:
                device.nic.table.rx_personality = RX_PERSONALITIES[rx]
                device.tell(EventCode.CONFIG_CHANGED)
        tables = [device.nic.table for device in self._devices]
        return {"nics": [{"rx": table.rx_personality.name.lower().replace("_", "-")} for table in tables]}
