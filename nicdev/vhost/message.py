"""The vhost-user wire format: header and payloads, syntax only (QEMU docs/interop/vhost-user.rst, "Message
Specification").

Numbers are in the byte order of the machine. Every decoder takes exactly the bytes of one payload and raises
ProtocolError for any other size; whether a message makes sense is for protocol.py to judge.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final, NamedTuple

from nicdev.errors import ProtocolError

HEADER: Final = Struct("=III")  # request, flags, size of the payload
_U64: Final = Struct("=Q")
_VRING_STATE: Final = Struct("=II")
_VRING_ADDR: Final = Struct("=IIQQQQ")  # index, flags, descriptor, used, available, log
_MEM_HEAD: Final = Struct("=II")  # num regions, padding
_REGION: Final = Struct("=QQQQ")  # guest address, size, user address, mmap offset
_SINGLE_REGION: Final = Struct("=QQQQQ")  # padding and a region

VERSION: Final = 1
VERSION_MASK: Final = 3
REPLY_FLAG: Final = 1 << 2
NEED_REPLY_FLAG: Final = 1 << 3
MAX_PAYLOAD: Final = 4096  # bytes; the largest message we know has 272, what we do not know is read and skipped
MAX_FDS: Final = 8  # VHOST_MEMORY_BASELINE_NREGIONS: SET_MEM_TABLE brings the most
VRING_INDEX_MASK: Final = 0xFF
VRING_NOFD_FLAG: Final = 1 << 8


class Request(IntEnum):
    """Front-end message types that this back-end knows by name."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    NET_SET_MTU = 20
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class ProtocolFeature(IntFlag):
    """VHOST_USER_PROTOCOL_F_* as masks."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    NET_MTU = 1 << 4
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16


class Header(NamedTuple):
    """The 12 bytes before every payload."""

    request: int
    flags: int
    size: int


class VringState(NamedTuple):
    """The index of a vring and a number that belongs to it."""

    vring: int
    num: int


class VringAddr(NamedTuple):
    """Front-end user addresses of a vring's parts; `log` is a guest address."""

    vring: int
    flags: int
    descriptor: int
    used: int
    available: int
    log: int


class VringFile(NamedTuple):
    """Which vring an eventfd is for, and whether there is one."""

    vring: int
    has_fd: bool


class MemoryRegion(NamedTuple):
    """Where a region of guest RAM is: addresses, size and mmap offset in bytes."""

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int


def decode_header(data: bytes | bytearray) -> Header:
    """Header of a message, from exactly 12 bytes."""
    return Header(*HEADER.unpack(data))


def encode_reply(request: int, payload: bytes) -> bytes:
    """A whole reply message to `request`."""
    return HEADER.pack(request, VERSION | REPLY_FLAG, len(payload)) + payload


def encode_u64(value: int) -> bytes:
    """Payload of a u64 reply."""
    return _U64.pack(value)


def encode_vring_state(vring: int, num: int) -> bytes:
    """Payload of the GET_VRING_BASE reply."""
    return _VRING_STATE.pack(vring, num)


def decode_empty(payload: bytes) -> None:
    """Payload of a request that has none."""
    if payload:
        raise ProtocolError(f"{len(payload)} bytes of payload where none is expected")


def decode_u64(payload: bytes) -> int:
    """Payload that is a single u64."""
    (value,) = _unpack(_U64, payload)
    return value


def decode_vring_state(payload: bytes) -> VringState:
    """Payload "vring state description"."""
    return VringState(*_unpack(_VRING_STATE, payload))


def decode_vring_addr(payload: bytes) -> VringAddr:
    """Payload "vring address description"."""
    return VringAddr(*_unpack(_VRING_ADDR, payload))


def decode_vring_file(payload: bytes) -> VringFile:
    """Payload of SET_VRING_KICK, CALL and ERR: index in bits 0-7, "no fd" in bit 8, the others zero."""
    value = decode_u64(payload)
    if value & ~(VRING_INDEX_MASK | VRING_NOFD_FLAG):
        raise ProtocolError(f"reserved bits in vring file word {value:#x}")
    return VringFile(value & VRING_INDEX_MASK, not value & VRING_NOFD_FLAG)


def decode_mem_table(payload: bytes) -> Sequence[MemoryRegion]:
    """Payload "memory regions description", of which only the regions in use are sent."""
    if len(payload) < _MEM_HEAD.size:
        raise ProtocolError(f"memory table of {len(payload)} bytes")
    count, _padding = _MEM_HEAD.unpack_from(payload)
    if count > MAX_FDS or len(payload) != _MEM_HEAD.size + count * _REGION.size:
        raise ProtocolError(f"memory table of {len(payload)} bytes with {count} regions")
    return [MemoryRegion(*fields) for fields in _REGION.iter_unpack(payload[_MEM_HEAD.size :])]


def decode_single_region(payload: bytes) -> MemoryRegion:
    """Payload "single memory region description"."""
    _padding, *fields = _unpack(_SINGLE_REGION, payload)
    return MemoryRegion(*fields)


def _unpack(layout: Struct, payload: bytes) -> tuple[int, ...]:
    if len(payload) != layout.size:
        raise ProtocolError(f"payload of {len(payload)} bytes instead of {layout.size}")
    return layout.unpack(payload)
