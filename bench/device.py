"""The groups in which a synthetic driver stands in for the guest: all of production's device, no virtual machine."""

from __future__ import annotations

from typing import Final

from bench import device_contexts, device_rx, device_tap, device_two, device_tx

GROUPS: Final = (
    *device_tx.GROUPS,
    device_rx.GROUP,
    device_two.GROUP,
    *device_contexts.GROUPS,
    device_tap.GROUP,
)
