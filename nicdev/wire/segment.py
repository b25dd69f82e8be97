"""TCP segmentation: what a NIC does with a packet larger than the path's MTU.

Theory of operation: every piece gets a copy of all headers, in which only these change: lengths, the IPv4
identification (counts up) and header checksum, the sequence number, flags and the TCP checksum. FIN and PSH belong to
the last byte, so only the last piece keeps them; CWR announces one window reduction, so only the first does (RFC 3168
6.1.2). The result is what the kernel's tcp_gso_segment would have made. Neighbours may also stay together as one piece;
cut later, it gives what they would have been.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from nicdev.wire import checksum
from nicdev.wire.frame import ETH_HLEN, IPV6_HLEN, TCP_CWR, TCP_FIN, TCP_PSH, Frame

_U16: Final = Struct(">H")
_U32: Final = Struct(">I")
_IPV4_LENGTH_ID: Final = Struct(">HH")


def segment(frame: memoryview | bytearray, f: Frame, mss: int, partial: bool = False) -> list[bytearray]:
    """Cut a frame into frames of at most `mss` (>= 1) bytes of TCP payload each, with all checksums complete.

    `partial`: TCP's are left as VIRTIO_NET_HDR_F_NEEDS_CSUM wants them. The input may carry any checksums. Ethernet
    padding is not copied. A frame that is small enough comes back as one.
    """
    length = f.end - f.payload
    return [part(frame, f, low, min(low + mss, length), mss, partial=partial) for low in range(0, length or 1, mss)]


def part(frame: memoryview | bytearray, f: Frame, low: int, high: int, mss: int, *, partial: bool = False) -> bytearray:
    """Of the same pieces, those that hold bytes `low` to `high` of the payload, as one; both lie where it is cut."""
    view = memoryview(frame)
    piece = bytearray(view[: f.payload])
    piece += view[f.payload + low : f.payload + high]
    end = len(piece)
    if f.family == 4:
        identification = _U16.unpack_from(frame, f.l3 + 4)[0] + low // mss
        _IPV4_LENGTH_ID.pack_into(piece, f.l3 + 2, end - ETH_HLEN, identification & 0xFFFF)
        checksum.fill_ipv4_header(piece, f)
    else:
        _U16.pack_into(piece, f.l3 + 4, end - ETH_HLEN - IPV6_HLEN)
    _U32.pack_into(piece, f.l4 + 4, (f.seq + low) & 0xFFFFFFFF)
    if low:
        piece[f.l4 + 13] &= ~TCP_CWR
    if f.payload + high < f.end:
        piece[f.l4 + 13] &= ~(TCP_FIN | TCP_PSH)
    finish = checksum.set_partial if partial else checksum.fill_tcp
    finish(piece, f._replace(end=end))
    return piece
