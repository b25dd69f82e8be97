"""What a TLS context is made from: the checked, typed form of the CTX_ADD command.

Theory of operation: `params_from_ctx_add` is the one gate between the driver's command and the engine. It tells what is
not well formed (BAD_REQUEST) from what is well formed but not ours (UNSUPPORTED); behind it every length fits its
cipher, and no code tests one again. Secrets are bytearrays, so that they can be wiped, and never show in a repr.

Servers open connections by the ten thousand a second, so this is made to be quick: numbers become enum members by a
look into a dict (30 ns; calling the enum takes 300), and the result is a tuple.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Final, NamedTuple

from nicdev.abi import AddFlag, Cipher, CtxAdd, Direction, RxPersonality, Status, TlsVersion
from nicdev.errors import CommandError
from nicdev.tls.aead import AeadKey
from nicdev.tls.record import RecordFormat

Endpoint = tuple[bytes, int]  # address of 4 or 16 bytes, port in host order

_DIRECTIONS: Final = {int(direction): direction for direction in Direction}
_VERSIONS: Final = {int(version): version for version in TlsVersion}
_CIPHERS: Final = {int(cipher): cipher for cipher in Cipher}
_RX_PERSONALITIES: Final = {int(personality): personality for personality in RxPersonality}
_ADDRESS_LEN: Final = {4: 4, 6: 16}
_NO_SYNC: Final = int(AddFlag.NO_SYNC)
_RX: Final = Direction.RX
_IDEAL: Final = RxPersonality.IDEAL
_LENGTHS: Final = {  # of key, salt, iv and record number
    Cipher.AES_GCM_128: (16, 4, 8, 8),
    Cipher.AES_GCM_256: (32, 4, 8, 8),
    Cipher.CHACHA20_POLY1305: (32, 0, 12, 8),
}


class ContextParams(NamedTuple):
    """One flow in one direction. `local` is the guest. start_seq: TCP sequence number where record rec_seq starts."""

    direction: Direction
    family: int  # 4 or 6; v4-mapped sockets are 4
    tls_version: TlsVersion
    cipher: Cipher
    start_seq: int
    rec_seq: int
    salt: bytearray
    iv: bytearray
    key: bytearray
    local: Endpoint
    remote: Endpoint
    no_sync: bool = False  # start_seq and rec_seq mean nothing: wait for a resync
    rx_personality: RxPersonality = RxPersonality.IDEAL  # of an rx context

    def __repr__(self) -> str:
        return f"ContextParams({self.describe()})"

    def crypto(self) -> tuple[RecordFormat, AeadKey]:
        """Record format and key of the context; they share the secrets' memory."""
        explicit_nonce = self.tls_version is TlsVersion.TLS_1_2 and self.cipher is not Cipher.CHACHA20_POLY1305
        fixed_iv = self.salt if explicit_nonce else self.salt + self.iv
        # what the guest sends as a record is one: its kernel lets programs choose any type (TLS_SET_RECORD_TYPE)
        any_type = self.direction is Direction.TX and self.tls_version is TlsVersion.TLS_1_2
        return RecordFormat(self.tls_version, self.cipher, fixed_iv, any_type), AeadKey(self.cipher, self.key)

    def wipe(self) -> None:
        """Overwrite the secrets."""
        self.salt[:] = bytes(len(self.salt))
        self.iv[:] = bytes(len(self.iv))
        self.key[:] = bytes(len(self.key))

    def describe(self) -> dict[str, object]:
        """The part of a context's description that never changes; no secrets."""
        return {
            "dir": self.direction.name.lower(),
            "cipher": self.cipher.name.lower(),
            "version": self.tls_version.name.lower(),
            "local": _text(self.local),
            "remote": _text(self.remote),
        }


def _text(end: Endpoint) -> str:
    address = ip_address(end[0])
    return f"{address}:{end[1]}" if address.version == 4 else f"[{address}]:{end[1]}"


def params_from_ctx_add(add: CtxAdd) -> ContextParams:
    """Check a CTX_ADD body. Raises CommandError(BAD_REQUEST), or UNSUPPORTED for what we lack."""
    (number, family, version, suite, flags, behaviour, start_seq, key_len, iv_len, salt_len, rec_seq_len,
     rec_seq, salt, iv, key, local_port, remote_port, local_addr, remote_addr) = add  # fmt: skip
    tls_version = _VERSIONS.get(version)
    cipher = _CIPHERS.get(suite)
    if tls_version is None or cipher is None:
        raise CommandError(Status.UNSUPPORTED, f"version {version:#x}, cipher {suite}")
    direction = _DIRECTIONS.get(number)
    if direction is None:
        raise CommandError(Status.BAD_REQUEST, f"direction {number}")
    rx_personality = _RX_PERSONALITIES.get(behaviour) if direction is _RX else _IDEAL
    if rx_personality is None:
        raise CommandError(Status.UNSUPPORTED, f"rx personality {behaviour}")
    address_len = _ADDRESS_LEN.get(family)
    if address_len is None:
        raise CommandError(Status.BAD_REQUEST, f"address family {family}")
    if flags & ~_NO_SYNC:
        raise CommandError(Status.BAD_REQUEST, f"unknown flags {flags:#x}")
    lengths = (key_len, salt_len, iv_len, rec_seq_len)
    if lengths != _LENGTHS[cipher]:
        raise CommandError(Status.BAD_REQUEST, f"lengths of key, salt, iv, record number: {lengths}")
    if not (local_port and remote_port):
        raise CommandError(Status.BAD_REQUEST, "port 0")
    return ContextParams(
        direction,
        family,
        tls_version,
        cipher,
        start_seq,
        int.from_bytes(rec_seq, "big"),
        bytearray(salt[:salt_len]),
        bytearray(iv[:iv_len]),
        bytearray(key[:key_len]),
        (local_addr[:address_len], local_port),
        (remote_addr[:address_len], remote_port),
        flags != 0,
        rx_personality,
    )
