"""The network's end of an 802.3ad bond, where the kernel has no bonding: python -m tests.guest.lacp INTERFACE...

Answers every LACPDU with agreement: one system, one aggregator, everything collected and distributed, short timeouts
(IEEE 802.1AX, 6.4). The frames themselves are a bridge's business.
"""

from __future__ import annotations

import selectors
import socket
import sys
from collections.abc import Sequence
from typing import Final

from scapy.contrib.lacp import LACP, SlowProtocol
from scapy.layers.l2 import Ether

ETHERTYPE: Final = 0x8809
GROUP: Final = "01:80:c2:00:00:02"
SYSTEM: Final = "02:00:00:00:00:01"
AGREED: Final = 0x3F  # activity, short timeout, aggregation, synchronization, collecting, distributing


def answer(received: bytes, port: int) -> bytes | None:
    """The frame that agrees to what a frame proposes; None if it is no LACPDU."""
    frame = Ether(received)
    if LACP not in frame:
        return None
    proposed = frame[LACP]
    reply = LACP(
        actor_system=SYSTEM,
        actor_system_priority=1,
        actor_key=1,
        actor_port_priority=1,
        actor_port_number=port,
        actor_state=AGREED,
        partner_system=proposed.actor_system,
        partner_system_priority=proposed.actor_system_priority,
        partner_key=proposed.actor_key,
        partner_port_priority=proposed.actor_port_priority,
        partner_port_number=proposed.actor_port_number,
        partner_state=proposed.actor_state,
    )
    return bytes(Ether(dst=GROUP, src=SYSTEM, type=ETHERTYPE) / SlowProtocol() / reply)


def main(interfaces: Sequence[str]) -> None:
    """Until killed."""
    selector = selectors.DefaultSelector()
    for port, interface in enumerate(interfaces, 1):
        link = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE))
        link.bind((interface, ETHERTYPE))
        selector.register(link, selectors.EVENT_READ, port)
    while True:
        for key, _ in selector.select():
            link = key.fileobj  # type: ignore[assignment]
            try:
                reply = answer(link.recv(2048), key.data)
                if reply:
                    link.send(reply)
            except OSError:  # the link is down just now
                continue


if __name__ == "__main__":
    main(sys.argv[1:])
