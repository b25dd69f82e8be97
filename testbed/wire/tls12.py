"""TLS 1.2 with AES-GCM as an eavesdropper who has the keys reads it: RFC 5246, RFC 5288, RFC 5289, NSS key log
files.

Written from the documents and for the test bed only. It shares nothing with the NIC and nothing with the raw
peer, so that no mistake of theirs can hide here.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

RECORD_HEADER: Final = struct.Struct(">BBBH")
CHANGE_CIPHER_SPEC: Final = 20
HANDSHAKE: Final = 22
APPLICATION_DATA: Final = 23
CONTENT_TYPES: Final = (20, 21, 22, 23, 24)
MAX_FRAGMENT: Final = (1 << 14) + 2048
NONCE: Final = 8
OVERHEAD: Final = NONCE + 16  # explicit nonce and tag
CLIENT_HELLO: Final = 1
SERVER_HELLO: Final = 2
# cipher suite: (name as in flowkeys, key size in bytes, hash of the PRF)
SUITES: Final = {
    0x009C: ("aes-128-gcm", 16, "sha256"),
    0x009D: ("aes-256-gcm", 32, "sha384"),
    0xC02B: ("aes-128-gcm", 16, "sha256"),
    0xC02C: ("aes-256-gcm", 32, "sha384"),
    0xC02F: ("aes-128-gcm", 16, "sha256"),
    0xC030: ("aes-256-gcm", 32, "sha384"),
}


class Secret(NamedTuple):
    """What decrypts one direction, from its byte `start` on, where record `rec_seq` begins."""

    cipher: str
    key: bytes
    salt: bytes
    rec_seq: int
    start: int


class Record(NamedTuple):
    """Place of one record in its stream: header at `start`, fragment from `body` to `end`."""

    kind: int
    start: int
    body: int
    end: int


class NotTls(Exception):
    """Bytes that cannot be a TLS 1.2 record; `offset` is where."""

    def __init__(self, offset: int, header: bytes) -> None:
        super().__init__(f"no TLS record header at byte {offset}: {header.hex()}")
        self.offset = offset


def records(data: bytearray, start: int) -> Iterator[Record]:
    """Complete records of a stream from byte `start` on. Raises NotTls where the chain of headers breaks."""
    unpack = RECORD_HEADER.unpack_from
    while len(data) - start >= RECORD_HEADER.size:
        kind, major, minor, length = unpack(data, start)
        # a ClientHello may carry version 3.1
        if kind not in CONTENT_TYPES or major != 3 or minor not in (1, 3) or length > MAX_FRAGMENT:
            raise NotTls(start, bytes(data[start : start + RECORD_HEADER.size]))
        body = start + RECORD_HEADER.size
        if body + length > len(data):
            return
        yield Record(kind, start, body, body + length)
        start = body + length


def additional_data(number: int, data: bytearray, record: Record) -> bytes:
    """seq_num || type || version || length of the plaintext."""
    length = record.end - record.body - OVERHEAD
    return number.to_bytes(8, "big") + data[record.start : record.start + 3] + length.to_bytes(2, "big")


def prf(hash_name: str, secret: bytes, label: bytes, seed: bytes, size: int) -> bytes:
    """The TLS 1.2 pseudorandom function (RFC 5246, section 5): `size` bytes."""
    chain, output = label + seed, b""
    while len(output) < size:
        chain = hmac.digest(secret, chain, hash_name)
        output += hmac.digest(secret, chain + label + seed, hash_name)
    return output[:size]


def read_keylog(text: str) -> dict[bytes, bytes]:
    """Client random to master secret: the CLIENT_RANDOM lines of an NSS key log file."""
    secrets: dict[bytes, bytes] = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "CLIENT_RANDOM":
            secrets[bytes.fromhex(words[1])] = bytes.fromhex(words[2])
    return secrets


@dataclass
class Hello:
    """What a side's part of the handshake tells before its encryption begins."""

    kind: int
    random: bytes
    suite: int | None
    encrypted_from: int | None  # byte offset behind ChangeCipherSpec


def read_hello(data: bytearray) -> Hello | None:
    """The hello of one side and where its encryption begins; None when this is no TLS handshake."""
    messages = bytearray()
    encrypted_from: int | None = None
    try:
        for record in records(data, 0):
            if record.kind == CHANGE_CIPHER_SPEC:
                encrypted_from = record.end
                break
            if record.kind != HANDSHAKE:
                return None
            messages += data[record.body : record.end]
    except NotTls:
        return None
    if len(messages) < 39 or messages[0] not in (CLIENT_HELLO, SERVER_HELLO):
        return None
    random, suite = bytes(messages[6:38]), None
    if messages[0] == SERVER_HELLO:
        behind_session = 39 + messages[38]
        suite = int.from_bytes(messages[behind_session : behind_session + 2], "big")
    return Hello(messages[0], random, suite, encrypted_from)


def derive(hellos: Iterable[Hello], keylog: dict[bytes, bytes]) -> dict[int, Secret]:
    """Secrets of the side that said CLIENT_HELLO and of the one that said SERVER_HELLO. Raises ValueError."""
    sides = {hello.kind: hello for hello in hellos}
    if sides.keys() != {CLIENT_HELLO, SERVER_HELLO}:
        raise ValueError("only half of the handshake was seen")
    client, server = sides[CLIENT_HELLO], sides[SERVER_HELLO]
    if server.suite not in SUITES:
        raise ValueError(f"cipher suite {server.suite:#06x} is not one of TLS 1.2 AES-GCM")
    if client.random not in keylog:
        raise ValueError("the key log has no secret for this session")
    cipher, size, hash_name = SUITES[server.suite]
    block = prf(hash_name, keylog[client.random], b"key expansion", server.random + client.random, 2 * size + 8)
    secrets: dict[int, Secret] = {}
    for index, side in enumerate((client, server)):
        if side.encrypted_from is not None:
            key = block[index * size : (index + 1) * size]
            salt = block[2 * size + 4 * index : 2 * size + 4 * index + 4]
            secrets[side.kind] = Secret(cipher, key, salt, 0, side.encrypted_from)
    return secrets
