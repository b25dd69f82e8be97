"""Fixed TLS 1.2 keys of one connection, in the form that the guest's tool, the raw peer and the decoder take."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Final

KEY_SIZES: Final = {"aes-128-gcm": 16, "aes-256-gcm": 32}


@dataclass(frozen=True)
class DirectionKeys:
    """As in the kernel's tls12_crypto_info: `iv` is the first record's explicit nonce, `rec_seq` its number."""

    key: bytes
    salt: bytes
    iv: bytes
    rec_seq: int = 0

    def as_json(self) -> dict[str, Any]:
        """Bytes in hexadecimal."""
        return {"key": self.key.hex(), "salt": self.salt.hex(), "iv": self.iv.hex(), "rec_seq": self.rec_seq}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> DirectionKeys:
        """Inverse of as_json. Raises KeyError, ValueError."""
        key, salt, iv = (bytes.fromhex(value[name]) for name in ("key", "salt", "iv"))
        return cls(key, salt, iv, int(value.get("rec_seq", 0)))


@dataclass(frozen=True)
class FlowKeys:
    """`tx` is guest to wire, `rx` wire to guest, on both sides."""

    cipher: str
    tx: DirectionKeys
    rx: DirectionKeys

    @classmethod
    def from_seed(cls, cipher: str, seed: str, rec_seq: int = 0) -> FlowKeys:
        """Keys that depend on `cipher` and `seed` only. Nonces do not start at `rec_seq`, so mixing them up shows."""
        size = KEY_SIZES[cipher]

        def direction(name: str) -> DirectionKeys:
            material = hashlib.shake_256(f"tlsnic keys {cipher} {seed} {name}".encode()).digest(size + 11)
            # a zero first byte: no record count of ours makes the nonce wrap
            return DirectionKeys(material[:size], material[size : size + 4], b"\0" + material[size + 4 :], rec_seq)

        return cls(cipher, direction("tx"), direction("rx"))

    def as_job(self, *directions: str) -> dict[str, Any]:
        """The entries `cipher` and `keys` of a job; only `directions` when some are named."""
        chosen = directions or ("tx", "rx")
        return {"cipher": self.cipher, "keys": {name: getattr(self, name).as_json() for name in chosen}}
