"""A packet as the fault director hands it on, and pieces of a large one.

Theory of operation: a piece is one segment of wire size, or neighbours that stay together. These leave as the whole
came, to be segmented to the same gso_size by whoever takes them, and give the same segments then.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from nicdev.wire import segment, vnet
from nicdev.wire.frame import TCP_CSUM_OFFSET, Frame

MAX_PIECES: Final = 2048  # that a packet is cut into; one that would make more stays whole
PLAIN: Final = bytes(vnet.VNET_HDR.size)
_GSO_TYPES: Final = {4: vnet.VIRTIO_NET_HDR_GSO_TCPV4, 6: vnet.VIRTIO_NET_HDR_GSO_TCPV6}


class Parcel(NamedTuple):
    """A packet: 12-byte virtio_net_hdr and frame; the frame is writable."""

    header: bytes | memoryview
    frame: memoryview


class Whole:
    """A packet that may be taken apart."""

    __slots__ = ("_partial", "cut", "length", "parcel", "parsed", "step")

    def __init__(self, parcel: Parcel, parsed: Frame | None, cut: bool, partial: bool) -> None:
        """`cut`: to gso_size, if it has one; `partial`: what the whole left open in TCP's checksum, pieces do too."""
        header = parcel.header
        self.parcel = parcel
        self.parsed = parsed  # None: no TCP
        self.length = parsed.end - parsed.payload if parsed is not None else 0  # bytes of TCP payload
        self.step = self.length or 1  # bytes of payload per segment
        self.cut = False
        self._partial = partial
        if cut and header[1] and parsed is not None:
            gso_size = vnet.VNET_HDR.unpack_from(header)[3]
            if gso_size and self.length <= MAX_PIECES * gso_size:
                self.step, self.cut = gso_size, True

    def payload(self, low: int, high: int) -> memoryview:
        """Bytes `low` to `high` of the payload."""
        at = self.parsed.payload if self.parsed is not None else 0
        return self.parcel.frame[at + low : at + high]

    def piece(self, low: int, high: int) -> Parcel:
        """Bytes `low` to `high` of the payload, both at a cut or an end, as a packet of its own."""
        f, gso_size = self.parsed, self.step
        if not self.cut or f is None:
            return self.parcel
        flags = start = offset = gso_type = hdr_len = 0
        if self._partial and self.parcel.header[0] & vnet.VIRTIO_NET_HDR_F_NEEDS_CSUM:
            flags, start, offset = vnet.VIRTIO_NET_HDR_F_NEEDS_CSUM, f.l4, TCP_CSUM_OFFSET
        frame = segment.part(self.parcel.frame, f, low, high, gso_size, partial=bool(flags))
        if high - low > gso_size:  # the type is the frame's, whatever the whole claims; ECN says that CWR is set
            gso_type = _GSO_TYPES[f.family] | (0 if low else self.parcel.header[1] & vnet.VIRTIO_NET_HDR_GSO_ECN)
            hdr_len = f.payload
        else:
            gso_size = 0
        return Parcel(vnet.VNET_HDR.pack(flags, gso_type, hdr_len, gso_size, start, offset, 0), memoryview(frame))
