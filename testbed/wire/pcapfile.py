"""Frames of a capture file: classic pcap, as tcpdump writes it, and pcapng through python-pcapng."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pcapng import FileScanner, blocks

from testbed.errors import BedError

LINKTYPE_ETHERNET: Final = 1
PCAPNG_MAGIC: Final = 0x0A0D0D0A
# magic as read in little-endian: microseconds or nanoseconds, and the byte order of everything else
PCAP_ORDERS: Final = {0xA1B2C3D4: "<", 0xA1B23C4D: "<", 0xD4C3B2A1: ">", 0x4D3CB2A1: ">"}
FILE_HEADER: Final = 24


class CaptureError(BedError):
    """A capture that cannot be trusted: not a capture file, not Ethernet, frames cut or lost."""


def frames(path: Path, interface: str | None = None) -> Iterator[memoryview]:
    """Every frame, whole; of a pcapng file only those of `interface`, if one is named. Raises CaptureError."""
    with open(path, "rb") as file:
        magic = int.from_bytes(file.read(4), "little")
    if magic == PCAPNG_MAGIC:
        return _pcapng(path, interface)
    if magic in PCAP_ORDERS:
        return _pcap(path, PCAP_ORDERS[magic])
    raise CaptureError(f"{path} is no capture file")


def _pcap(path: Path, order: str) -> Iterator[memoryview]:
    with open(path, "rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))  # lives as long as a frame is in use
    if len(data) < FILE_HEADER or struct.unpack_from(order + "I", data, 20)[0] & 0xFFFF != LINKTYPE_ETHERNET:
        raise CaptureError(f"{path} is not a capture of an Ethernet interface")
    header = struct.Struct(order + "IIII")
    position = FILE_HEADER
    while position < len(data):
        if position + header.size > len(data):
            raise CaptureError(f"{path} ends in the middle of a frame")
        _, _, captured, length = header.unpack_from(data, position)
        position += header.size
        if captured < length or position + captured > len(data):
            raise CaptureError(f"{path}: a frame of {length} bytes is not there whole")
        yield data[position : position + captured]
        position += captured


def _pcapng(path: Path, interface: str | None) -> Iterator[memoryview]:
    with open(path, "rb") as file:
        for block in FileScanner(file):
            if not isinstance(block, blocks.EnhancedPacket):
                continue
            source = block.interface
            if interface is not None and source.options.get("if_name") != interface:
                continue
            if source.link_type != LINKTYPE_ETHERNET or block.captured_len < block.packet_len:
                raise CaptureError(f"{path}: a frame that is not Ethernet, or not whole")
            yield memoryview(block.packet_data)
