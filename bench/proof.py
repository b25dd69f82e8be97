"""Whether what left is TLS: frames opened by the test bed's own decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bench.work import KEYS, SALT, SEALED, START_SEQ, text
from testbed.errors import BedError
from testbed.wire import tls12

_TCP_AT: Final = {4: 34, 6: 54}
_ETHERTYPES: Final = {b"\x08\x00": 4, b"\x86\xdd": 6}


def tcp_of(frame: bytes) -> tuple[int, int, bytes]:
    """Flow (last four bytes of the source address), sequence number and payload of a frame of bench/work.py."""
    at = _TCP_AT[_ETHERTYPES[frame[12:14]]]
    source = frame[26:30] if at == 34 else frame[34:38]
    payload = frame[at + 4 * (frame[at + 12] >> 4) :]
    return int.from_bytes(source, "big"), int.from_bytes(frame[at + 4 : at + 8], "big"), payload


def opened(data: bytes, first: int, key: bytes) -> list[bytes]:
    """Texts of the whole records that `data` begins with, of which the first has number `first`. Raises BedError."""
    aead, buffer = AESGCM(key), bytearray(data)
    texts = []
    try:
        for number, record in enumerate(tls12.records(buffer, 0), first):
            body = record.body + tls12.NONCE
            nonce = SALT + buffer[record.body : body]
            aad = tls12.additional_data(number, buffer, record)
            texts.append(aead.decrypt(bytes(nonce), bytes(buffer[body : record.end]), aad))
    except (tls12.NotTls, InvalidTag) as error:
        raise BedError(f"record {first + len(texts)} is not what it must be: {error!r}") from error
    return texts


def check_stream(frames: Sequence[bytes], lap: int, records: int) -> None:
    """The frames are the first of lap number `lap` of a bench.work.Stream with `records` to a lap. Raises BedError."""
    first, data = lap * records, b""
    for frame in frames:
        _, seq, payload = tcp_of(frame)
        _same(seq, (START_SEQ + first * SEALED + len(data)) & 0xFFFFFFFF, "sequence number")
        data += payload
    texts = opened(data, first, KEYS[0])
    _same(len(texts), len(data) // SEALED, "number of records")
    _same(bool(texts), True, "whether there are any")
    for number, found in enumerate(texts):
        _same(found, text(number), f"text of record {number}")


def check_flows(frames: Sequence[bytes]) -> None:
    """The frames are of bench.work.Flows: one record each, of any flow. Raises BedError."""
    for frame in frames:
        slot, seq, payload = tcp_of(frame)
        number = (seq - START_SEQ) * pow(SEALED, -1, 1 << 32) % (1 << 32)
        found = opened(payload, number, KEYS[slot % len(KEYS)])
        _same(found, [text(int.from_bytes(payload[5:13], "big"))], f"text of a record of flow {slot}")


def _same(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise BedError(f"what left is wrong: {what}")
