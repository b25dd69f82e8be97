"""What the synthetic driver posts: chains whose descriptors and buffers stay, so that the driver costs next to nothing.

Chain i of a work lies at position i of its ring, lap after lap; between two laps only those bytes change that must
(TCP sequence numbers, handles). Chains look as the Linux driver makes them: the headers in one buffer, then fragments
of up to 32 KiB (net/core/sock.c: SKB_FRAG_PAGE_ORDER), in an indirect table.

Every text comes from `text`, so whoever looks at the frames knows what must be in them.
"""

from __future__ import annotations

import random
from array import array
from struct import Struct
from typing import Final, Protocol

from nicdev import abi

NEXT, WRITE, INDIRECT = 1, 2, 4  # VIRTQ_DESC_F_*
TEXT: Final = 16384
SEALED: Final = 5 + 8 + TEXT + 16
TSO: Final = 45 * 1448  # TCP payload of the largest packet that fits 65535 bytes of IP at an MSS of 1448
FRAGMENT: Final = 32768
KEYS: Final = [random.Random(f"key {i}").randbytes(16) for i in range(64)]
SALT: Final = b"salt"
GENERATION: Final = 7
START_SEQ: Final = 0xFFFF0000  # wraps soon
_TABLE: Final = 128  # bytes of an indirect table, 8 descriptors
_HEADERS: Final = 256
_DESC: Final = Struct("<QIHH")
_U32, _BE32 = Struct("<I"), Struct(">I")
_BLOCK: Final = random.Random("text").randbytes(1 << 20) * 2
_SLOT_AT: Final = abi.VNET_HDR_LEN + 4  # in a packet's first buffer
_FRAME_AT: Final = abi.VNET_HDR_LEN + abi.TX_TLS.size
_SOURCE_AT: Final = _FRAME_AT + 14 + 8 + 12  # last four bytes of an IPv6 source address
_ADD_AT: Final = abi.VNET_HDR_LEN + abi.COMMAND.size
_OK: Final = abi.REPLY.pack(abi.Status.OK, abi.REPLY.size)


def text(number: int) -> bytes:
    """The text of record `number` of a work, TEXT bytes."""
    at = number * 7919 * 16 % (len(_BLOCK) // 2)
    return _BLOCK[at : at + TEXT]


def framed(number: int) -> bytes:
    """Record `number` of a work as the kernel hands it to the NIC; the tag's place holds rubbish."""
    return b"\x17\x03\x03" + (SEALED - 5).to_bytes(2, "big") + number.to_bytes(8, "big") + text(number) + b"\xee" * 16


def tcp_headers(family: int, payload: int, sport: int = 40000, dport: int = 443) -> bytes:
    """Ethernet, IP and TCP headers (with timestamps) of a segment with `payload` bytes; checksums are the NIC's."""
    tcp = Struct(">HHIIBBHHH").pack(sport, dport, 0, 1, 8 << 4, 0x18, 500, 0, 0) + bytes.fromhex("0101080a") + bytes(8)
    if family == 4:
        addresses = bytes((198, 51, 100, 2, 198, 51, 100, 1))
        ip = Struct(">BBHHHBBH").pack(0x45, 0, 20 + len(tcp) + payload, 0, 0x4000, 64, 6, 0) + addresses
    else:
        address = bytes.fromhex("20010db8") + bytes(12)
        ip = Struct(">IHBB").pack(6 << 28, len(tcp) + payload, 6, 64) + address + address[:-1] + b"\1"
    return b"\x52\x54\0\0\0\1" + b"\x52\x54\0\0\0\2" + (b"\x08\x00" if family == 4 else b"\x86\xdd") + ip + tcp


def vnet_header(family: int, headers: int, flags: int = 0) -> bytes:
    """virtio_net_hdr of a packet that TSO is to cut to 1448 bytes; `headers` is the length of tcp_headers."""
    return Struct("<BBHHHHH").pack(flags | 1, 1 if family == 4 else 4, headers, 1448, headers - 32, 16, 0)


class Work(Protocol):
    """Chains for one ring; number n lies at descriptor n % num."""

    size: int  # bytes of memory
    written: int  # bytes that the device writes into each chain
    posted: int  # chains so far

    def descriptor(self, index: int) -> tuple[int, int, int]:
        """Address, length and flags of descriptor `index`."""

    def prepare(self, first: int, count: int) -> None:
        """Write what changes in the chains number `first` and following."""

    def returned(self, first: int, count: int) -> None:
        """The device has used them. AssertionError if it did not do what it should."""


class Chains:
    """Buffers in `ram` from guest address `at` on: an indirect table and a header buffer per chain, then `more`."""

    written = 0

    def __init__(self, ram: memoryview, at: int, num: int, more: int) -> None:
        self.ram = ram
        self.num = num
        self.posted = 0
        self._headers_at = at + _TABLE * num
        self.data_at = -(-(self._headers_at + _HEADERS * num) // 4096) * 4096
        self.size = self.data_at + more - at
        self._at = at
        self._used = [0] * num  # descriptors in each table

    def header_at(self, index: int) -> int:
        """Guest address of a chain's first buffer, of _HEADERS bytes."""
        return self._headers_at + _HEADERS * index

    def table(self, index: int, buffers: list[tuple[int, int, int]]) -> None:
        """Write an indirect table of (address, length, flags)."""
        self._used[index] = len(buffers)
        for n, (address, length, flags) in enumerate(buffers):
            follows = NEXT if n + 1 < len(buffers) else 0
            where = self._at + _TABLE * index + _DESC.size * n
            _DESC.pack_into(self.ram, where, address, length, flags | follows, n + 1 if follows else 0)

    def descriptor(self, index: int) -> tuple[int, int, int]:
        """The indirect table of a chain."""
        return self._at + _TABLE * index, _DESC.size * self._used[index], INDIRECT

    def put(self, index: int, head: bytes, address: int = 0, length: int = 0) -> None:
        """Make a chain of `head` and `length` bytes at `address`, cut where pages of FRAGMENT bytes end."""
        at = self.header_at(index)
        self.ram[at : at + len(head)] = head
        buffers = [(at, len(head), 0)]
        while length:
            n = min(length, FRAGMENT - (address - self.data_at) % FRAGMENT)
            buffers.append((address, n, 0))
            address, length = address + n, length - n
        self.table(index, buffers)

    def prepare(self, first: int, count: int) -> None:
        """Nothing changes."""

    def returned(self, first: int, count: int) -> None:
        """Nothing to see."""


class Plain(Chains):
    """Frames of 64 bytes (UDP), one descriptor each."""

    FRAME: Final = (
        b"\x52\x54\0\0\0\1" b"\x52\x54\0\0\0\2" b"\x08\x00"
        + Struct(">BBHHHBBH").pack(0x45, 0, 50, 0, 0x4000, 64, 17, 0xE650) + bytes((198, 51, 100, 2, 198, 51, 100, 1))
        + Struct(">HHHH").pack(40000, 9, 30, 0) + bytes(22)
    )  # fmt: skip

    def __init__(self, ram: memoryview, at: int, num: int) -> None:
        super().__init__(ram, at, num, 0)
        for index in range(num):
            self.put(index, bytes(abi.VNET_HDR_LEN) + self.FRAME)

    def descriptor(self, index: int) -> tuple[int, int, int]:
        """The frame itself."""
        return self.header_at(index), abi.VNET_HDR_LEN + len(self.FRAME), 0


class Hello(Chains):
    """HELLO, after which the device gives verdicts on what it receives."""

    def __init__(self, ram: memoryview, at: int, num: int) -> None:
        super().__init__(ram, at, num, 0)
        ethertype = abi.HELLO_ETHERTYPE.to_bytes(2, "big")
        hello = abi.HELLO.pack(abi.HELLO_DST, bytes(6), ethertype, abi.ABI_VERSION, abi.HELLO_MAGIC, 1, 0)
        for index in range(num):
            self.put(index, bytes((abi.HDR_F_EXT,)) + bytes(abi.VNET_HDR_LEN - 1) + hello)


class Stream(Chains):
    """One flow (slot 0): whole records one after the other, in packets of `payload` bytes; a lap ends with a record.

    A lap has `packets`. A ring that holds several laps shows the same payload with other sequence numbers.
    """

    def __init__(self, ram: memoryview, at: int, num: int, payload: int, packets: int) -> None:
        self.records, self._lap = stream_lap(packets, payload)
        super().__init__(ram, at, num, self._lap + FRAGMENT)
        data = ram[self.data_at : self.data_at + self._lap]
        for number in range(self.records):
            data[number * SEALED : (number + 1) * SEALED] = framed(number)
        ext = abi.TX_TLS.pack(abi.ExtType.TX_TLS, 0, abi.TX_TLS.size, 0, GENERATION, 0, 0, 0)
        self._offsets = range(0, self._lap, payload)
        for index in range(num):
            offset = self._offsets[index % packets]
            length = min(payload, self._lap - offset)
            headers = tcp_headers(4, length)
            head = vnet_header(4, len(headers), abi.HDR_F_EXT) + ext + headers
            self.put(index, head, self.data_at + offset, length)
        self._seq_at = [self.header_at(index) + _FRAME_AT + 34 + 4 for index in range(num)]

    def prepare(self, first: int, count: int) -> None:
        """The sequence numbers move on by a lap."""
        ram, num, offsets, pack = self.ram, self.num, self._offsets, _BE32.pack_into
        for number in range(first, first + count):
            lap, index = divmod(number, len(offsets))
            pack(ram, self._seq_at[number % num], (START_SEQ + lap * self._lap + offsets[index]) & 0xFFFFFFFF)


def stream_lap(packets: int, payload: int) -> tuple[int, int]:
    """Records and bytes of a lap of `packets` of `payload` bytes; the last one may be shorter."""
    records = packets * payload // SEALED
    assert (packets - 1) * payload < records * SEALED, "a whole packet would be left over"
    return records, records * SEALED


class Flows(Chains):
    """Packets of one record; number n belongs to the flow in slot order[n % len(order)]. `records` is shared by works.

    Flow and source address name each other; the flow's record k begins at START_SEQ + k * SEALED.
    """

    def __init__(self, ram: memoryview, at: int, num: int, order: list[int], records: array[int]) -> None:
        super().__init__(ram, at, num, num * FRAGMENT)
        self._order = order
        self._records = records
        ext = abi.TX_TLS.pack(abi.ExtType.TX_TLS, 0, abi.TX_TLS.size, 0, GENERATION, 0, 0, 0)
        headers = tcp_headers(6, SEALED)
        head = vnet_header(6, len(headers), abi.HDR_F_EXT) + ext + headers
        for index in range(num):
            address = self.data_at + FRAGMENT * index
            ram[address : address + SEALED] = framed(index)
            self.put(index, head, address, SEALED)

    def prepare(self, first: int, count: int) -> None:
        """Each packet gets its flow, and that flow's next sequence number."""
        ram, num, order, records = self.ram, self.num, self._order, self._records
        many, seq_at = len(order), _FRAME_AT + 14 + 40 + 4
        for number in range(first, first + count):
            slot = order[number % many]
            at = self.header_at(number % num)
            _U32.pack_into(ram, at + _SLOT_AT, slot)
            _BE32.pack_into(ram, at + _SOURCE_AT, slot)
            _BE32.pack_into(ram, at + seq_at, (START_SEQ + records[slot] * SEALED) & 0xFFFFFFFF)
            records[slot] += 1


class Commands(Chains):
    """CTX_ADD in a direction, or CTX_DEL (None), of slots 0, 1, ...; chain i has key i % keys."""

    written = len(_OK)

    def __init__(self, ram: memoryview, at: int, num: int, direction: abi.Direction | None, keys: int) -> None:
        super().__init__(ram, at, num, len(_OK) * num)
        self._adds_rx = direction is abi.Direction.RX
        opcode = abi.Opcode.CTX_DEL if direction is None else abi.Opcode.CTX_ADD
        for index in range(num):
            body = b"" if direction is None else ctx_add(direction, KEYS[index % keys])
            command = abi.COMMAND.pack(abi.ExtType.COMMAND, opcode, abi.COMMAND.size + len(body), 0, GENERATION)
            head = bytes((abi.HDR_F_EXT,)) + bytes(abi.VNET_HDR_LEN - 1) + command + body
            self.put(index, head)
            reply = (self.data_at + len(_OK) * index, len(_OK), WRITE)
            self.table(index, [(self.header_at(index), len(head), 0), reply])

    def prepare(self, first: int, count: int) -> None:
        """The next slots; an rx context's flow differs by its remote address."""
        ram, num = self.ram, self.num
        for number in range(first, first + count):
            at = self.header_at(number % num)
            _U32.pack_into(ram, at + _SLOT_AT, number)
            if self._adds_rx:
                _BE32.pack_into(ram, at + _ADD_AT + _REMOTE_AT, number)

    def returned(self, first: int, count: int) -> None:
        """Each reply is there, and says OK."""
        for number in range(first, first + count):
            at = self.data_at + len(_OK) * (number % self.num)
            assert self.ram[at : at + len(_OK)] == _OK, f"command {number}: {bytes(self.ram[at : at + len(_OK)])!r}"
            self.ram[at : at + len(_OK)] = bytes(len(_OK))


_REMOTE_AT: Final = abi.CTX_ADD.size - 16


def ctx_add(direction: abi.Direction, key: bytes) -> bytes:
    """Body of CTX_ADD: TLS 1.2 AES-128-GCM from record 0 at START_SEQ on."""
    local, remote = (bytes((198, 51, 100, last)) + bytes(12) for last in (2, 1))
    return abi.CTX_ADD.pack(
        direction, 4, abi.TlsVersion.TLS_1_2, abi.Cipher.AES_GCM_128, 0, abi.RxPersonality.IDEAL, START_SEQ,
        16, 8, 4, 8, bytes(8), SALT, bytes(8), key, 40000, 443, local, remote,
    )  # fmt: skip
