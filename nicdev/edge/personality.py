"""{"cmd": "personality"} of the control socket: how NICs survive disorder, to see and to change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nicdev.abi import EventCode, RxPersonality, TxPersonality
from nicdev.control import TX_PERSONALITIES
from nicdev.edge.device import Device
from nicdev.tls.personality import RX_PERSONALITIES


class PersonalityCommand:
    """{"rx": NAME, "tx": NAME, "nic": 0} changes them and tells the driver.

    rx is that of contexts which the driver makes after it has heard of it, tx that of the whole NIC. Without either it
    only shows; without "nic" all NICs are meant.
    """

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = devices

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        number = request.get("nic")
        for direction, known in (("rx", RX_PERSONALITIES), ("tx", TX_PERSONALITIES)):
            name = request.get(direction)
            if name is not None and (type(name) is not str or name not in known):
                return {"ok": False, "error": f"{direction} is one of {', '.join(sorted(known))}"}
        if number is not None and (type(number) is not int or not 0 <= number < len(self._devices)):
            return {"ok": False, "error": f"there is no NIC {number!r}, the last is {len(self._devices) - 1}"}
        rx, tx = RX_PERSONALITIES.get(request.get("rx", "")), TX_PERSONALITIES.get(request.get("tx", ""))
        if rx is not None or tx is not None:
            for device in self._devices if number is None else [self._devices[number]]:
                _change(device, rx, tx)
        nics = [device.nic for device in self._devices]
        return {
            "nics": [{"rx": _name(nic.control.rx_personality), "tx": _name(nic.control.tx_personality)} for nic in nics]
        }


def _change(device: Device, rx: RxPersonality | None, tx: TxPersonality | None) -> None:
    if rx is not None:
        device.nic.control.rx_personality = rx
    if tx is not None:
        device.nic.control.tx_personality = tx
    device.tell(EventCode.CONFIG_CHANGED)


def _name(personality: RxPersonality | TxPersonality) -> str:
    return personality.name.lower().replace("_", "-")
