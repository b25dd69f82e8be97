"""The interface between guest driver and device: every number of it, and nothing else.

`driver/tlsnic_abi.h` is this file's twin; tests/abi compiles a probe and compares every size, offset and constant.
docs/device.md is the specification in prose. Multi-byte fields are little-endian unless a name ends in `_be`.

The interface travels in band. A chain or receive buffer starts with the 12-byte virtio_net_hdr of a VERSION_1 device;
where its `flags` hold HDR_F_EXT, an *extension* follows it at once, whose first byte is its type:

    tx ring   HELLO     discovery; shaped like an Ethernet frame, so any other NIC sends it harmlessly
              TX_TLS    a packet to encrypt: extension, record prefix (prefix_len bytes, may be none), Ethernet frame
              COMMAND   a command; the chain's device-writable part takes the reply
    rx ring   HELLO_REPLY, EVENT   no frame follows
              RX_TLS    verdict and resync request about the frame that follows

Nothing from the wire can carry HDR_F_EXT, since the header is written by the device, never received. Fields are
added at the end of a structure (its `len` tells), never moved; what a reader does not know it skips, reserved bytes
are zero.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final, NamedTuple

ABI_VERSION: Final = 2  # two that speak different ones do not speak
HDR_F_EXT: Final = 0x80  # in virtio_net_hdr.flags
VNET_HDR_LEN: Final = 12
HELLO_ETHERTYPE: Final = 0x88B5  # big-endian on the wire; IEEE 802 local experimental
HELLO_DST: Final = b"\x01\x80\xc2\x00\x00\x0e"  # nearest bridge: never forwarded (IEEE 802.1Q table 8-1)
HELLO_MAGIC: Final = b"TLSNICEX"
MAX_RECORD_PREFIX: Final = 5 + 8 + 16384 + 256 + 16  # bytes of a TX_TLS prefix at most
MAX_TCP_PAYLOAD: Final = 65535


class ExtType(IntEnum):
    """First byte of an extension."""

    HELLO = 0x01  # also the first byte of HELLO_DST
    TX_TLS = 0x02
    COMMAND = 0x03
    HELLO_REPLY = 0x81
    RX_TLS = 0x82
    EVENT = 0x83


class Opcode(IntEnum):
    """Of a COMMAND."""

    CTX_ADD = 1
    CTX_DEL = 2
    RX_RESYNC = 3
    GET_STATS = 4
    GET_STAT_NAMES = 5


class Status(IntEnum):
    """First field of a reply."""

    OK = 0
    TABLE_FULL = 1
    BAD_REQUEST = 2
    UNSUPPORTED = 3
    EXISTS = 4
    STALE = 5  # no such context: unknown slot or another generation
    REFUSED = 6  # well-formed, and not done: see docs/device.md


class EventCode(IntEnum):
    """What an EVENT tells."""

    TX_DROPPED = 1  # a marked packet of this context was dropped; reason = index of the counter
    UNKNOWN_CONTEXT = 2  # a handle the device does not hold: say hello again and re-create
    CONFIG_CHANGED = 3  # personality, limits or capabilities changed: say hello again
    ADD_REFUSED = 4  # a posted CTX_ADD changed nothing; reason = the Status that a reply would have had


class Direction(IntEnum):
    """Values of the kernel's enum tls_offload_ctx_dir."""

    RX = 0
    TX = 1


class Cipher(IntEnum):
    """Values of TLS_CIPHER_* in the kernel's uapi/linux/tls.h."""

    AES_GCM_128 = 51
    AES_GCM_256 = 52
    CHACHA20_POLY1305 = 54


class TlsVersion(IntEnum):
    """Values of TLS_1_x_VERSION in the kernel's uapi/linux/tls.h."""

    TLS_1_2 = 0x0303
    TLS_1_3 = 0x0304


class CipherCap(IntFlag):
    """Bits of hello_reply.ciphers."""

    TLS_1_2_AES_GCM_128 = 1 << 0
    TLS_1_2_AES_GCM_256 = 1 << 1
    TLS_1_2_CHACHA20_POLY1305 = 1 << 2
    TLS_1_3_AES_GCM_128 = 1 << 3
    TLS_1_3_AES_GCM_256 = 1 << 4
    TLS_1_3_CHACHA20_POLY1305 = 1 << 5


class Cap(IntFlag):
    """Bits of hello_reply.caps."""

    TX = 1 << 0
    RX = 1 << 1
    POSTED_ADD = 1 << 2  # CTX_ADD may come without room for a reply


class TxPersonality(IntEnum):
    """How the driver is to answer a tx packet out of order."""

    REBUILD = 1
    NEXT_RECORD = 2


class RxPersonality(IntEnum):
    """How rx contexts find their place again."""

    DRIVER_REQ = 1
    DRIVER_REQ_ASYNC = 2
    CORE_NEXT_HINT = 3
    IDEAL = 4


class HelloFlag(IntFlag):
    """Bits of hello.flags."""

    RESET = 1 << 0  # a new driver instance: delete every context first


class TxTlsFlag(IntFlag):
    """Bits of tx_tls.flags."""

    RESYNC = 1 << 0  # resync_seq, resync_rcd_sn and prefix_len are valid


class AddFlag(IntFlag):
    """Bits of ctx_add.add_flags."""

    NO_SYNC = 1 << 0  # start_seq and rec_seq are unknown: wait for a resync


class RxTlsFlag(IntFlag):
    """Bits of rx_tls.flags."""

    DECRYPTED = 1 << 0  # every TLS byte of the frame that follows was decrypted; framing left in place
    RESYNC_REQ = 1 << 1  # driver-req: is resync_seq a record start, and which?
    RESYNC_START = 1 << 2  # driver-req-async: an attempt opens; range resync_seq, resync_len
    RESYNC_END = 1 << 3  # driver-req-async: the guess is resync_seq
    RESYNC_CANCEL = 1 << 4  # driver-req-async: the attempt is abandoned
    ERROR = 1 << 5  # not decrypted because of an error (authentication, malformed record)


class Hello(NamedTuple):
    """tx: discovery, an Ethernet frame to look at. 60 bytes."""

    dst: bytes
    src: bytes
    ethertype_be: bytes
    version: int
    magic: bytes
    nonce: int
    flags: int


class HelloReply(NamedTuple):
    """rx: what the device is."""

    type: int
    flags: int
    len: int
    version: int
    nonce: int
    boot_id: int
    caps: int
    ciphers: int
    max_contexts: int
    stat_count: int
    tx_personality: int
    rx_personality: int
    device_version: bytes


class TxTls(NamedTuple):
    """tx: a packet to encrypt."""

    type: int
    flags: int
    len: int
    slot: int
    generation: int
    prefix_len: int
    resync_seq: int
    resync_rcd_sn: int


class CommandHeader(NamedTuple):
    """tx: first 16 bytes of every command; len covers header and body."""

    type: int
    opcode: int
    len: int
    slot: int
    generation: int


class CtxAdd(NamedTuple):
    """Body of CTX_ADD. local is the guest. IPv4 addresses are in the first 4 bytes. rec_seq as on the wire."""

    dir: int
    family: int
    tls_version: int
    cipher: int
    add_flags: int
    rx_personality: int  # rx: the one that the driver goes by with this context
    start_seq: int
    key_len: int
    iv_len: int
    salt_len: int
    rec_seq_len: int
    rec_seq: bytes
    salt: bytes | memoryview
    iv: bytes | memoryview
    key: bytes | memoryview
    local_port: int
    remote_port: int
    local_addr: bytes
    remote_addr: bytes


class RxResync(NamedTuple):
    """Body of RX_RESYNC: the record that starts at tcp_seq has number rcd_sn."""

    tcp_seq: int
    rcd_sn: int


class Reply(NamedTuple):
    """Device-writable part of a command; `len` counts this header and what follows."""

    status: int
    len: int


class RxTls(NamedTuple):
    """rx: verdict and resync request about the frame that follows."""

    type: int
    flags: int
    len: int
    slot: int
    generation: int
    resync_seq: int
    resync_len: int
    records: int  # records completed in this packet
    payload: int  # bytes of TLS plaintext in this packet


class Event(NamedTuple):
    """rx: something the driver should know; no frame follows."""

    type: int
    code: int
    len: int
    slot: int
    generation: int
    reason: int
    value: int


# One Struct per structure, field for field; padding is explicit (x).
HELLO = Struct("<6s6s2sH8sQI24x")
HELLO_REPLY = Struct("<BBHH2xQQIIIHBB16s8x")
TX_TLS = Struct("<BBHIIIIxxxxQ")
COMMAND = Struct("<BBHII4x")
CTX_ADD = Struct("<BBHHBBIBBBB8s4s12s32sHH4x16s16s")
RX_RESYNC = Struct("<I4xQ")
REPLY = Struct("<II")
RX_TLS = Struct("<BBHIIIIHxxIxxxx")
EVENT = Struct("<BBHIIIQ8x")

_SECRETS_AT: Final = 24  # of CTX_ADD: salt, iv, key
_CTX_ADD_PUBLIC: Final = Struct("<BBHHBBIBBBB8s48xHH4x16s16s")

STAT_NAME_LEN: Final = 32  # bytes per name in a GET_STAT_NAMES reply, NUL-padded ASCII


def unpack_ctx_add(body: memoryview) -> CtxAdd:
    """The body of CTX_ADD (CTX_ADD.size bytes), its secrets as views of `body`: no copy that nobody can wipe."""
    public = _CTX_ADD_PUBLIC.unpack(body)
    salt = body[_SECRETS_AT : _SECRETS_AT + 4]
    iv = body[_SECRETS_AT + 4 : _SECRETS_AT + 16]
    key = body[_SECRETS_AT + 16 : _SECRETS_AT + 48]
    return tuple.__new__(CtxAdd, (*public[:12], salt, iv, key, *public[12:]))
