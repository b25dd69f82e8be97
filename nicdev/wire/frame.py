"""Where things are in an Ethernet frame that carries TCP.

Theory of operation: `parse` reads the headers once, front to back, and returns offsets into the frame and the values
that a flow lookup and the TLS engine need. It is the only parser of the device: whoever has a `Frame` never looks at a
length field again. What it does not understand in full it refuses with None, since None is always safe: the frame is
then an ordinary one, passed on as it is.

Refused on purpose, besides damaged frames: VLAN tags and tunnels (kernel sockets over them are not offloaded here);
fragments, also atomic ones; BIG TCP, whose length field is 0; source routes not yet at their end, whose addresses are
not those of the socket; AH and ESP, whose contents we must not change.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

ETH_HLEN: Final = 14
MAX_FRAME: Final = ETH_HLEN + 65535 + 4  # 64 KiB, more no segmentation asks for, and a VLAN tag
ETH_P_IP: Final = 0x0800
ETH_P_IPV6: Final = 0x86DD
IPPROTO_HOPOPTS: Final = 0
IPPROTO_TCP: Final = 6
IPPROTO_ROUTING: Final = 43
IPPROTO_DSTOPTS: Final = 60
IPV6_HLEN: Final = 40
TCP_HLEN: Final = 20
TCP_CSUM_OFFSET: Final = 16  # of the checksum in the TCP header

TCP_FIN: Final = 0x01
TCP_PSH: Final = 0x08
TCP_CWR: Final = 0x80

_MAX_EXTENSIONS: Final = 8  # of an IPv6 header; a hostile chain must not cost more than this
PLAIN_IPV4: Final = 0x45  # first byte of an IPv4 header without options
_FRAGMENT: Final = 0x3FFF  # of the fragment word only "don't fragment" and the reserved bit may be set
_MIN_FRAME: Final = ETH_HLEN + 20 + TCP_HLEN

# All big-endian, as on the wire.
# From the Ethertype on, where the IP header has no options: Ethertype, then as in _IPV4 and _TCP
_ETH_IPV4_TCP: Final = Struct(">HBxHxxHxBxx4s4sHHIxxxxBB")
_IPV4: Final = Struct(">BxHxxHxBxx4s4s")  # version and IHL, total length, fragment, protocol, addresses
_IPV6: Final = Struct(">IHBx16s16s")  # version to flow label, payload length, next header, addresses
_TCP: Final = Struct(">HHIxxxxBB")  # ports, sequence number, data offset, flags


class Frame(NamedTuple):
    """A whole TCP segment in a frame: offsets in bytes from the frame's start, numbers in host order."""

    family: int  # 4 or 6
    l3: int  # IP header
    l4: int  # TCP header
    payload: int  # TCP payload
    end: int  # of the IP packet; Ethernet padding may follow
    src: bytes  # 4 or 16 bytes
    dst: bytes
    sport: int
    dport: int
    seq: int
    tcp_flags: int  # FIN to CWR


_frame = tuple.__new__  # a Frame from all its fields, at a quarter of the price of calling the class


def parse(frame: memoryview | bytearray) -> Frame | None:
    """Offsets and addresses of an unfragmented TCP segment directly in Ethernet, else None. Never raises.

    RFC 791, RFC 8200, RFC 9293. No checksum is verified here (see checksum.verify_tcp).
    """
    size = len(frame)
    if size < _MIN_FRAME:
        return None
    ethertype, version_ihl, total, fragment, protocol, src, dst, sport, dport, seq, data_offset, flags = (
        _ETH_IPV4_TCP.unpack_from(frame, 12)
    )
    if ethertype == ETH_P_IP and version_ihl == PLAIN_IPV4:  # nearly all traffic: what follows knows it in one look
        payload, end = _MIN_FRAME - TCP_HLEN + 4 * (data_offset >> 4), ETH_HLEN + total
        whole = protocol == IPPROTO_TCP and not fragment & _FRAGMENT
        if whole and _MIN_FRAME <= payload <= end <= size:
            return _frame(Frame, (4, ETH_HLEN, ETH_HLEN + 20, payload, end, src, dst, sport, dport, seq, flags))
        return None
    return _parse_options(frame, size, ethertype)


def _parse_options(frame: memoryview | bytearray, size: int, ethertype: int) -> Frame | None:
    """`parse` for IPv6, and IPv4 with options."""
    if ethertype == ETH_P_IP:
        version_ihl, total, fragment, protocol, src, dst = _IPV4.unpack_from(frame, ETH_HLEN)
        family, l4, end = 4, ETH_HLEN + 4 * (version_ihl & 0x0F), ETH_HLEN + total
        whole_tcp = protocol == IPPROTO_TCP and not fragment & _FRAGMENT
        understood = version_ihl >> 4 == 4 and l4 >= ETH_HLEN + 20 and whole_tcp
    elif ethertype == ETH_P_IPV6 and size >= ETH_HLEN + IPV6_HLEN + TCP_HLEN:
        version, length, protocol, src, dst = _IPV6.unpack_from(frame, ETH_HLEN)
        family, l4, end = 6, ETH_HLEN + IPV6_HLEN, ETH_HLEN + IPV6_HLEN + length
        understood = version >> 28 == 6
        if protocol != IPPROTO_TCP:
            l4 = _skip_extensions(frame, protocol, min(end, size))
    else:
        return None
    if not understood or not l4 or end > size or l4 + TCP_HLEN > end:
        return None
    sport, dport, seq, data_offset, flags = _TCP.unpack_from(frame, l4)
    payload = l4 + 4 * (data_offset >> 4)
    if l4 + TCP_HLEN <= payload <= end:
        return _frame(Frame, (family, ETH_HLEN, l4, payload, end, src, dst, sport, dport, seq, flags))
    return None


def _skip_extensions(frame: memoryview | bytearray, protocol: int, end: int) -> int:
    """Offset of the TCP header behind IPv6 extension headers of which `protocol` is the first, or 0."""
    at = ETH_HLEN + IPV6_HLEN
    for position in range(_MAX_EXTENSIONS):
        if at + 8 > end:
            return 0
        if protocol == IPPROTO_ROUTING:
            if frame[at + 3]:  # segments left
                return 0
        elif protocol == IPPROTO_HOPOPTS:
            if position:  # RFC 8200 section 4.1: only directly behind the IPv6 header
                return 0
        elif protocol != IPPROTO_DSTOPTS:
            return 0
        protocol = frame[at]
        at += 8 + 8 * frame[at + 1]
        if protocol == IPPROTO_TCP:
            return at
    return 0
