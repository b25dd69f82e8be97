"""struct virtio_net_hdr_v1: the header before every packet of a VERSION_1 virtio-net device (virtio 1.2, 5.1.6).

Theory of operation: the guest's header is a set of claims about its frame. `split` proves those that later code relies
on, once, so that nothing behind it tests them again. A tap device takes the same header and refuses the same lies.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from nicdev.errors import FrameError
from nicdev.stats import Counter
from nicdev.wire.frame import ETH_HLEN, MAX_FRAME

VIRTIO_NET_HDR_F_NEEDS_CSUM: Final = 1
VIRTIO_NET_HDR_F_DATA_VALID: Final = 2
VIRTIO_NET_HDR_F_RSC_INFO: Final = 4

VIRTIO_NET_HDR_GSO_NONE: Final = 0
VIRTIO_NET_HDR_GSO_TCPV4: Final = 1
VIRTIO_NET_HDR_GSO_UDP: Final = 3
VIRTIO_NET_HDR_GSO_TCPV6: Final = 4
VIRTIO_NET_HDR_GSO_UDP_L4: Final = 5
VIRTIO_NET_HDR_GSO_ECN: Final = 0x80  # beside a TCP type

VNET_HDR: Final = Struct("<BBHHHHH")  # little-endian, field for field as below
_unpack, _HEADER = VNET_HDR.unpack_from, slice(VNET_HDR.size)
_GSO_OFFERED: Final = (VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6)  # HOST_TSO4, HOST_TSO6


class VnetHdr(NamedTuple):
    """struct virtio_net_hdr_v1. Offsets count from the start of the frame, which follows the header."""

    flags: int = 0
    gso_type: int = VIRTIO_NET_HDR_GSO_NONE
    hdr_len: int = 0  # a hint, never relied upon
    gso_size: int = 0  # bytes of TCP payload per segment
    csum_start: int = 0
    csum_offset: int = 0  # from csum_start
    num_buffers: int = 0

    @classmethod
    def unpack_from(cls, buffer: memoryview | bytearray | bytes, offset: int = 0) -> VnetHdr:
        """Read the 12 bytes at `offset`; the caller knows that they are there."""
        return cls._make(VNET_HDR.unpack_from(buffer, offset))

    def pack(self) -> bytes:
        """The header's 12 bytes."""
        return VNET_HDR.pack(*self)


def split(chain: memoryview, frame_at: int) -> tuple[memoryview, memoryview]:
    """Header and frame of a tx chain whose frame begins at `frame_at`; the header's 12 bytes are there.

    Raises FrameError (TX_DROP_BAD_HEADER, TX_DROP_TOO_BIG) unless one fits the other. Afterwards: NEEDS_CSUM is the
    only flag that may be set; with it the two checksum bytes lie in the frame, behind the Ethernet header; with a
    gso_type, gso_size is not 0 and NEEDS_CSUM is set, as virtio 1.2, 5.1.6.2.1 demands of the driver.
    """
    flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, _ = _unpack(chain)
    needs_csum = flags & VIRTIO_NET_HDR_F_NEEDS_CSUM
    if flags != needs_csum:
        chain[0] = needs_csum  # the one flag a driver may set
    size = len(chain) - frame_at
    if not ETH_HLEN <= size <= MAX_FRAME:
        counter = Counter.TX_DROP_TOO_BIG if size > MAX_FRAME else Counter.TX_DROP_BAD_HEADER
        raise FrameError(counter, f"frame of {size} bytes")
    if hdr_len > size:
        raise FrameError(Counter.TX_DROP_BAD_HEADER, f"hdr_len {hdr_len} in a frame of {size} bytes")
    if needs_csum and (csum_start < ETH_HLEN or csum_start + csum_offset + 2 > size):
        where = f"csum_start {csum_start}, csum_offset {csum_offset}"
        raise FrameError(Counter.TX_DROP_BAD_HEADER, f"{where} in a frame of {size} bytes")
    if gso_type:
        _check_gso(gso_type, gso_size, needs_csum)
    return chain[_HEADER], chain[frame_at:]


def _check_gso(gso_type: int, gso_size: int, needs_csum: int) -> None:
    """Raises FrameError unless it is a segmentation that was offered, and can be done."""
    if gso_type & ~VIRTIO_NET_HDR_GSO_ECN not in _GSO_OFFERED:
        raise FrameError(Counter.TX_DROP_BAD_HEADER, f"gso_type {gso_type:#x} was not offered")
    if not gso_size:
        raise FrameError(Counter.TX_DROP_BAD_HEADER, "gso_size 0")
    if not needs_csum:
        raise FrameError(Counter.TX_DROP_BAD_HEADER, "segmentation without NEEDS_CSUM")
