"""A NIC without rings, and what goes into it: chains as a driver writes them, frames by scapy, records by AESGCM."""

from __future__ import annotations

import struct
from itertools import count

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from scapy.layers.inet import IP, TCP

from nicdev import abi
from nicdev.control import Control, Identity
from nicdev.nic import Nic, Packet
from nicdev.stats import Stats
from nicdev.tls.table import ContextTable
from nicdev.virtio.features import OFFERED
from tests.support.ether import ETH

GUEST, PEER = "198.51.100.2", "198.51.100.1"
KEY, SALT = bytes(range(16)), b"salt"
START = 1000
NEEDS_CSUM = struct.pack("<BBHHHHH", 1, 0, 54, 0, 34, 16, 0)
PLAIN = bytes(12)


def make_nic(**identity: object) -> Nic:
    stats = Stats()
    table = ContextTable(8)
    boots = count(100)
    nic = Nic(stats, table, Control(Identity("1.2", **identity), table, stats), lambda: next(boots))  # type: ignore[arg-type]
    nic.features = OFFERED
    return nic


def hello(flags: int = 0, nonce: int = 7, magic: bytes = abi.HELLO_MAGIC, version: int = abi.ABI_VERSION) -> bytearray:
    ext = abi.HELLO.pack(abi.HELLO_DST, b"\x02\0\0\0\0\1", b"\x88\xb5", version, magic, nonce, flags)
    return bytearray(bytes((abi.HDR_F_EXT,)) + bytes(11) + ext)


def command(opcode: int, slot: int = 0, generation: int = 1, body: bytes = b"", lie: int = 0) -> bytearray:
    header = abi.COMMAND.pack(abi.ExtType.COMMAND, opcode, abi.COMMAND.size + len(body) + lie, slot, generation)
    return bytearray(bytes((abi.HDR_F_EXT,)) + bytes(11) + header + body)


def ctx_add(
    direction: abi.Direction,
    flags: int = 0,
    key_len: int = 16,
    rx_personality: int = abi.RxPersonality.IDEAL,
    port: int = 4000,
) -> bytes:
    addresses = (bytes([198, 51, 100, 2]) + bytes(12), bytes([198, 51, 100, 1]) + bytes(12))
    return abi.CTX_ADD.pack(
        direction, 4, 0x0303, 51, flags, rx_personality, START, key_len, 8, 4, 8,
        bytes(8), SALT, bytes(8), KEY, port, 443, *addresses,
    )  # fmt: skip


def sent(outcome: Packet | bytes) -> Packet | None:
    return outcome if isinstance(outcome, Packet) else None


def reply(outcome: Packet | bytes) -> bytes:
    assert isinstance(outcome, bytes), "a packet left"
    return outcome


def status(outcome: Packet | bytes) -> int:
    return abi.Reply._make(abi.REPLY.unpack_from(reply(outcome))).status


def add(nic: Nic, direction: abi.Direction, slot: int = 0, generation: int = 1, **fields: int) -> None:
    body = ctx_add(direction, **fields)
    assert status(nic.transmit(0, command(abi.Opcode.CTX_ADD, slot, generation, body))) == abi.Status.OK


def record(text: bytes, number: int = 0, sealed: bool = False) -> bytes:
    """One TLS 1.2 AES-GCM record, in clear with an unwritten tag or sealed."""
    header = struct.pack(">BHH", 23, 0x0303, 8 + len(text) + 16)
    explicit = struct.pack(">Q", number + 1000)
    if not sealed:
        return header + explicit + text + b"\xee" * 16
    aad = struct.pack(">QBHH", number, 23, 0x0303, len(text))
    return header + explicit + AESGCM(KEY).encrypt(SALT + explicit, text, aad)


def segment(payload: bytes, seq: int = START, outgoing: bool = True) -> bytes:
    ends = (GUEST, PEER, 4000, 443) if outgoing else (PEER, GUEST, 443, 4000)
    src, dst, sport, dport = ends
    frame = ETH / IP(src=src, dst=dst) / TCP(sport=sport, dport=dport, seq=seq, flags="PA") / payload
    return bytes(frame)


def marked(frame: bytes, slot: int = 0, generation: int = 1, header: bytes = NEEDS_CSUM, **ext: int) -> bytearray:
    fields = {"flags": 0, "len": 32, "prefix_len": 0, "resync_seq": 0, "resync_rcd_sn": 0} | ext
    packed = abi.TX_TLS.pack(
        abi.ExtType.TX_TLS, fields["flags"], fields["len"], slot, generation,
        fields["prefix_len"], fields["resync_seq"], fields["resync_rcd_sn"],
    )  # fmt: skip
    return bytearray(bytes((header[0] | abi.HDR_F_EXT,)) + header[1:] + packed + frame)


def messages(nic: Nic, kind: abi.ExtType) -> list[bytes]:
    return [m[12:] for m in nic.messages if m[12] == kind]


def receive(nic: Nic, frame: bytes, header: bytes = PLAIN) -> tuple[bytes, bytes]:
    """Header with extension, and the frame that the guest gets."""
    buffer = bytearray(frame)
    packets = nic.receive(memoryview(bytearray(header)), memoryview(buffer))
    assert len(packets) == 1
    return bytes(packets[0][1].header), bytes(packets[0][1].frame)
