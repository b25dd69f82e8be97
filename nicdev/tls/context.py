"""What a TLS context is made from: the checked, typed form of the CTX_ADD command.

Theory of operation: `params_from_ctx_add` is the one gate between the driver's command and the engine. It tells what is
not well formed (BAD_REQUEST) from what is well formed but not ours (UNSUPPORTED); behind it every length fits its
cipher, and no code tests one again. Secrets are bytearrays, so that they can be wiped, and never show in a repr.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from ipaddress import ip_address
from typing import Final, TypeVar

from nicdev.abi import AddFlag, Cipher, CtxAdd, Direction, RxPersonality, Status, TlsVersion
from nicdev.errors import CommandError
from nicdev.tls.aead import AeadKey
from nicdev.tls.record import RecordFormat

Endpoint = tuple[bytes, int]  # address of 4 or 16 bytes, port in host order

_REC_SEQ_LEN: Final = 8
_ADDRESS_LEN: Final = {4: 4, 6: 16}
_KEY_LEN: Final = {Cipher.AES_GCM_128: 16, Cipher.AES_GCM_256: 32, Cipher.CHACHA20_POLY1305: 32}
_SALT_IV_LEN: Final = {Cipher.AES_GCM_128: (4, 8), Cipher.AES_GCM_256: (4, 8), Cipher.CHACHA20_POLY1305: (0, 12)}

_E = TypeVar("_E", bound=IntEnum)


@dataclass(frozen=True, slots=True, eq=False)
class ContextParams:
    """One flow in one direction. `local` is the guest. start_seq: TCP sequence number where record rec_seq starts."""

    direction: Direction
    family: int  # 4 or 6; v4-mapped sockets are 4
    tls_version: TlsVersion
    cipher: Cipher
    start_seq: int
    rec_seq: int
    salt: bytearray = field(repr=False)
    iv: bytearray = field(repr=False)
    key: bytearray = field(repr=False)
    local: Endpoint
    remote: Endpoint
    no_sync: bool = False  # start_seq and rec_seq mean nothing: wait for a resync
    rx_personality: RxPersonality = RxPersonality.IDEAL  # of an rx context

    def crypto(self) -> tuple[RecordFormat, AeadKey]:
        """Record format and key of the context; they share the secrets' memory."""
        explicit_nonce = self.tls_version is TlsVersion.TLS_1_2 and self.cipher is not Cipher.CHACHA20_POLY1305
        fixed_iv = self.salt if explicit_nonce else self.salt + self.iv
        # what the guest sends as a record is one: its kernel lets programs choose any type (TLS_SET_RECORD_TYPE)
        any_type = self.direction is Direction.TX and self.tls_version is TlsVersion.TLS_1_2
        return RecordFormat(self.tls_version, self.cipher, fixed_iv, any_type), AeadKey(self.cipher, self.key)

    def wipe(self) -> None:
        """Overwrite the secrets."""
        for secret in (self.salt, self.iv, self.key):
            secret[:] = bytes(len(secret))

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
    tls_version = _member(TlsVersion, add.tls_version, Status.UNSUPPORTED)
    cipher = _member(Cipher, add.cipher, Status.UNSUPPORTED)
    direction = _member(Direction, add.dir, Status.BAD_REQUEST)
    rx_personality = RxPersonality.IDEAL
    if direction is Direction.RX:
        rx_personality = _member(RxPersonality, add.rx_personality, Status.UNSUPPORTED)
    address_len = _ADDRESS_LEN.get(add.family, 0)
    _require(bool(address_len), f"address family {add.family}")
    _require(not add.add_flags & ~int(AddFlag.NO_SYNC), f"unknown flags {add.add_flags:#x}")
    _require(add.rec_seq_len == _REC_SEQ_LEN, f"rec_seq_len {add.rec_seq_len}")
    _require(add.key_len == _KEY_LEN[cipher], f"key_len {add.key_len}")
    _require((add.salt_len, add.iv_len) == _SALT_IV_LEN[cipher], f"salt_len {add.salt_len}, iv_len {add.iv_len}")
    _require(bool(add.local_port and add.remote_port), "port 0")
    return ContextParams(
        direction,
        add.family,
        tls_version,
        cipher,
        add.start_seq,
        int.from_bytes(add.rec_seq, "big"),
        bytearray(add.salt[: add.salt_len]),
        bytearray(add.iv[: add.iv_len]),
        bytearray(add.key[: add.key_len]),
        (bytes(add.local_addr[:address_len]), add.local_port),
        (bytes(add.remote_addr[:address_len]), add.remote_port),
        bool(add.add_flags & AddFlag.NO_SYNC),
        rx_personality,
    )


def _member(enum: type[_E], value: int, status: Status) -> _E:
    try:
        return enum(value)
    except ValueError as error:
        raise CommandError(status, f"{enum.__name__} {value:#x}") from error


def _require(condition: bool, detail: str) -> None:
    if not condition:
        raise CommandError(Status.BAD_REQUEST, detail)
