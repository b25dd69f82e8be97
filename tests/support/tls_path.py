"""A sender, a path with disorder, a receiving kernel: what becomes of records that a NIC decrypts.

`Kernel` is TCP reassembly and net/tls/tls_device.c in one: it keeps for every byte one of the copies that arrived, with
its mark, and takes the stream record by record. All marked: taken as it is, nothing is checked. None: decrypted and
authenticated. Mixed: marked parts are encrypted again with the record's own nonce, then the same.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher as Ciphering
from cryptography.hazmat.primitives.ciphers import algorithms, modes

from nicdev.abi import Cipher, TlsVersion
from tests.support.tls_oracle import Suite


def _nonce(suite: Suite, number: int, head: bytes) -> bytes:
    if suite.explicit:
        return suite.salt + head[5:13]
    return bytes(a ^ b for a, b in zip(suite.salt + suite.iv, number.to_bytes(12, "big"), strict=True))


def crypt(suite: Suite, nonce: bytes, text: bytes) -> bytes:
    """XOR with the key stream of the whole text."""
    if suite.cipher is Cipher.CHACHA20_POLY1305:
        stream = Ciphering(algorithms.ChaCha20(suite.key, (1).to_bytes(4, "little") + nonce), None).encryptor()
    else:
        stream = Ciphering(algorithms.AES(suite.key), modes.CTR(nonce + (2).to_bytes(4, "big"))).encryptor()
    return stream.update(text)


@dataclass
class Kernel:
    """The receiver. `later` decides whether a copy that arrives replaces one that is waiting."""

    suite: Suite
    number: int
    length: int  # of the stream
    data: bytearray = field(init=False)
    have: bytearray = field(init=False)  # 0 missing, 1 unmarked, 2 marked
    at: int = 0  # start of the next record
    texts: list[tuple[int, bytes]] = field(default_factory=list)  # place and text of what was accepted
    offloaded: int = 0
    mixed: int = 0
    dead: bool = False  # EBADMSG
    headers: list[tuple[int, int]] = field(default_factory=list)  # place and number of each record begun
    read: int = 0  # bytes in sequence

    def __post_init__(self) -> None:
        self.data = bytearray(self.length + 65536)
        self.have = bytearray(self.length + 65536)

    def take(self, at: int, payload: bytes | bytearray, marked: bool, later: bool = False) -> None:
        """A packet. What was read already is never replaced."""
        mark = 2 if marked else 1
        end = at + len(payload)
        low = max(at, self.at)
        if not later:
            here = self.have.find(0, low, end)
            while here >= 0:
                taken = [next_ for next_ in (self.have.find(1, here, end), self.have.find(2, here, end)) if next_ >= 0]
                stop = min(taken, default=end)
                self._put(here, stop, payload[here - at : stop - at], mark)
                here = self.have.find(0, stop, end)
        elif low < end:
            self._put(low, end, payload[low - at :], mark)
        self._consume()

    def _put(self, low: int, high: int, part: bytes | bytearray, mark: int) -> None:
        self.data[low:high] = part
        self.have[low:high] = bytes((mark,)) * (high - low)

    def _consume(self) -> None:
        while not self.dead:
            head = bytes(self.data[self.at : self.at + self.suite.prefix])
            if 0 in self.have[self.at : self.at + 5]:
                return
            if not self.headers or self.headers[-1][0] != self.at:
                self.headers.append((self.at, self.number))
            size = 5 + int.from_bytes(head[3:5], "big")
            if head[1:3] != b"\x03\x03" or not self.suite.prefix + 16 <= size <= 16384 + 5 + 256:
                self.dead = True
                return
            if 0 in self.have[self.at : self.at + size]:
                return
            self._record(size)

    def _record(self, size: int) -> None:
        suite, start = self.suite, self.at
        record = bytes(self.data[start : start + size])
        marks = self.have[start : start + size]
        nonce = _nonce(suite, self.number, record)
        text_at, text_end = suite.prefix, size - 16
        if 1 not in marks:
            self.offloaded += 1
            text = record[text_at:text_end]
        else:
            sealed = bytearray(record[text_at:])
            if 2 in marks:
                self.mixed += 1
                again = crypt(suite, nonce, bytes(sealed[:-16]))
                index = marks.find(2, text_at, text_end)
                while index >= 0:
                    stop = marks.find(1, index, text_end)
                    stop = text_end if stop < 0 else stop
                    sealed[index - text_at : stop - text_at] = again[index - text_at : stop - text_at]
                    index = marks.find(2, stop, text_end)
            try:
                text = suite.aead().decrypt(nonce, bytes(sealed), self._aad(record, text_end - text_at))
            except InvalidTag:
                self.dead = True
                return
        self.texts.append((start, text))
        self.number += 1
        self.at = start + size

    def _aad(self, record: bytes, size: int) -> bytes:
        if self.suite.version is TlsVersion.TLS_1_3:
            return record[:5]
        return self.number.to_bytes(8, "big") + record[:3] + size.to_bytes(2, "big")


@dataclass(frozen=True)
class Path:
    """What happens to segments: rates, and after how many others a lost one is sent again."""

    window: int = 64
    loss: float = 0.0
    reorder: float = 0.0
    mss: int = 1448


def disorder(rng: random.Random, length: int, path: Path) -> Iterator[tuple[int, int]]:
    """Segments of a stream as they arrive: a lost one a window later, one out of order a few later."""
    waiting: list[tuple[int, int]] = []  # time, offset; what comes late
    time = offset = 0
    while offset < length or waiting:
        due = min(waiting, default=None)
        again = due is not None and (due[0] <= time or offset >= length)
        if due is not None and again:
            waiting.remove(due)
            at = due[1]
        else:
            at = offset
            offset += path.mss
        time += 1
        if rng.random() < path.loss:
            waiting.append((time + path.window, at))
        elif not again and rng.random() < path.reorder:
            waiting.append((time + rng.randrange(2, 8), at))
        else:
            yield at, min(at + path.mss, length)
