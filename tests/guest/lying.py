"""What tests need of a device that lies (tests/support/lying_nic.py), and of a driver that is taken off it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from testbed.bed import Bed, configure_guest
from tests.guest.conftest import wait_until


@contextmanager
def lying(bed: Bed, *lies: str, share: float = 1) -> Iterator[Counter[str]]:
    """The device lies so for the time of the block, on a share of all occasions; afterwards: how often."""
    told: Counter[str] = Counter()
    bed.nic.ask("lie", lies=lies, share=share, seed=" ".join(lies))
    try:
        yield told
    finally:
        told.update(bed.nic.ask("lie", lies=())["told"])


# the guest's only network device, which has device ID 1 (virtio, section 5.1)
FIND = "device=$(dirname $(grep -l 0x0001 /sys/bus/virtio/devices/*/device)) && cd /sys/bus/virtio/drivers/tlsnic"
UNBIND, BIND = (f"{FIND} && echo ${{device##*/}} >{what}" for what in ("unbind", "bind"))
STUCK = 20  # seconds within which a guest must be done with a small thing, whatever a device does


def unbind(bed: Bed) -> None:
    """Take the device from the driver."""
    bed.agent.run(["sh", "-c", UNBIND], timeout=STUCK)


def bind(bed: Bed) -> None:
    """Give it back."""
    bed.agent.run(["sh", "-c", BIND], timeout=STUCK)
    configure_guest(bed.agent)


def rebind(bed: Bed) -> None:
    """The driver meets the device anew."""
    unbind(bed)
    bind(bed)


def grows(bed: Bed, name: str, before: int, by: int = 1) -> None:
    """Until a counter of the driver has grown by so much, or more."""
    wait_until(lambda: bed.ethtool()[name] >= before + by, f"{name} grows")
