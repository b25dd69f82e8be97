"""How fast the libcrypto inside `cryptography` is by itself: what the device's crypto is held against.

The library is linked into cryptography's extension module, which exports none of its functions; their addresses are in
the module's symbol table. A loop in C (evp_loop.c) calls them, so no interpreter is in the figure. Where the table was
stripped there is nothing to call: BedError.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final

import cryptography.hazmat.bindings._rust as module
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from testbed.errors import BedError

SOURCE: Final = Path(__file__).with_name("evp_loop.c")
FUNCTIONS: Final = (  # in the order of struct evp
    "EVP_CIPHER_CTX_new", "EVP_CIPHER_CTX_free", "EVP_aes_128_gcm", "EVP_EncryptInit_ex", "EVP_EncryptUpdate",
    "EVP_EncryptFinal_ex", "EVP_CIPHER_CTX_ctrl",
)  # fmt: skip
EXPORTED: Final = "PyInit__rust"
KEY: Final = bytes(range(16))


def _addresses() -> list[int]:
    """Where FUNCTIONS are in this process. Raises BedError."""
    path = module.__file__
    listed = subprocess.run(["nm", path], capture_output=True, text=True, check=False).stdout
    offsets = {
        name: int(value, 16) for value, _, name in (line.split() for line in listed.splitlines() if line[0] != " ")
    }
    if missing := [name for name in (*FUNCTIONS, EXPORTED) if name not in offsets]:
        raise BedError(f"the symbol table of {path} lacks {', '.join(missing)}: cannot tell how fast its EVP is")
    exported = ctypes.cast(getattr(ctypes.CDLL(path), EXPORTED), ctypes.c_void_p).value
    assert exported is not None
    return [exported - offsets[EXPORTED] + offsets[name] for name in FUNCTIONS]


def _compiled() -> ctypes.CDLL:
    """The loop. Raises BedError."""
    with tempfile.TemporaryDirectory(prefix="tlsnic-bench-") as folder:
        path = Path(folder) / "evp_loop.so"
        command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(path), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BedError(f"{SOURCE.name} does not compile: {done.stderr.strip()}")
        return ctypes.CDLL(str(path))


class Evp:
    """AES-128-GCM by EVP calls on one buffer of `size` bytes."""

    def __init__(self, size: int) -> None:
        """Raises BedError where gcc, nm or the symbol table is missing, or the result is wrong."""
        for program in ("gcc", "nm"):
            if shutil.which(program) is None:
                raise BedError(f"{program} is missing: apt-get install gcc")
        self._functions = (ctypes.c_void_p * len(FUNCTIONS))(*_addresses())
        self._encrypt = _compiled().encrypt
        self._size = size
        self._text = ctypes.create_string_buffer(size)
        self._check()

    def _run(self, count: int, records: bool) -> tuple[bytes, bytes]:
        """Encrypt so many times; the last nonce and tag."""
        iv, tag = ctypes.create_string_buffer(bytes(12), 12), ctypes.create_string_buffer(16)
        done = self._encrypt(self._functions, KEY, iv, self._text, self._size, count, int(records), tag)
        if done != count:
            raise BedError(f"EVP failed after {done} of {count} records")
        return iv.raw, tag.raw

    def _check(self) -> None:
        """What it makes is what the library's own interface makes."""
        clear = self._text.raw
        nonce, tag = self._run(1, records=True)
        if self._text.raw + tag != AESGCM(KEY).encrypt(nonce, clear, bytes(13)):
            raise BedError("the EVP loop encrypts wrongly")

    def rate(self, count: int, records: bool = True) -> float:
        """Bytes per second over `count` texts; without `records` as one long message, as `openssl speed -evp` does."""
        began = time.perf_counter()
        self._run(count, records)
        return count * self._size / (time.perf_counter() - began)


def call_rate(size: int, count: int) -> float:
    """Bytes per second by the library's Python interface, a call per record, nothing allocated."""
    encrypt_into = AESGCM(KEY).encrypt_into
    buffer = memoryview(bytearray(size + 16))
    nonce, aad = bytes(12), bytes(13)
    text = buffer[:size]
    began = time.perf_counter()
    for _ in range(count):
        encrypt_into(nonce, text, aad, buffer)
    return count * size / (time.perf_counter() - began)
