"""TCP segments that `parse` does not see but a guest might: in fragments, behind VLAN tags, in tunnels.

Theory of operation: in both versions of IP, source and destination address lie side by side, and so they do in the
inner packet of every tunnel that does not encrypt. So a frame can only hold a segment between two addresses if these
bytes occur in it; where they are those of an ordinary packet that is not TCP, a second time.
"""

from __future__ import annotations

from typing import Final

from nicdev.wire.frame import ETH_HLEN, ETH_P_IP, ETH_P_IPV6, IPPROTO_TCP

IPPROTO_UDP: Final = 17
IPPROTO_ICMPV6: Final = 58
_IPV4_PROTOCOL: Final = ETH_HLEN + 9
_IPV4_ADDRESSES: Final = ETH_HLEN + 12
_IPV6_NEXT_HEADER: Final = ETH_HLEN + 6
_IPV6_ADDRESSES: Final = ETH_HLEN + 8


def hides_tcp(frame: memoryview | bytes, pair: tuple[bytes, bytes]) -> bool:
    """Whether a frame for which `parse` gave None may hold a TCP segment to pair[0] from pair[1] (4 or 16 bytes)."""
    data = bytes(frame)
    addresses = pair[1] + pair[0]
    at = data.find(addresses)
    if at < 0:
        return False
    ethertype = int.from_bytes(data[12:ETH_HLEN], "big")
    plain = (ethertype == ETH_P_IP and at == _IPV4_ADDRESSES and data[_IPV4_PROTOCOL] != IPPROTO_TCP) or (
        ethertype == ETH_P_IPV6 and at == _IPV6_ADDRESSES and data[_IPV6_NEXT_HEADER] in (IPPROTO_UDP, IPPROTO_ICMPV6)
    )
    return not plain or data.find(addresses, at + len(addresses)) >= 0
