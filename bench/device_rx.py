"""TLS records from the wire into mergeable rx buffers: a port that hands over prepared frames as a tap would.

Frames are what a peer on the same host sends: up to 65160 bytes of TCP payload whole, checksums not yet made. A record
can be opened once only, so the frames of one lap (2 MB of records) are played to many flows, one after the other, that
differ in their address and share their key; after each run their contexts are made anew.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Final

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bench.device_tx import ROUNDS, gbit, measured
from bench.evp import Evp
from bench.registry import Group, Measured, Session, ratios
from bench.rig import RX, Rig, Run, Shape
from bench.work import KEYS, SALT, SEALED, START_SEQ, TEXT, TSO, stream_lap, tcp_headers, text, vnet_header
from nicdev import abi
from nicdev.edge.loop import Loop
from nicdev.edge.port import Port
from nicdev.edge.port_faulty import FaultyPort
from nicdev.stats import Counter
from testbed.errors import BedError

PACKETS: Final = 32
BURST: Final = 64  # frames that a tap port reads at a time
RX_RING: Final = 1024
FLOWS: Final = 32
_SOURCE_AT: Final = 26
_SOURCE: Final = struct.Struct(">I")


def sealed_lap(packets: int, payload: int) -> list[tuple[bytes, bytes]]:
    """Header and frame of each packet of a lap, from record 0 on; made without the engine."""
    records, size = stream_lap(packets, payload)
    aead, wire = AESGCM(KEYS[0]), bytearray()
    for number in range(records):
        nonce = number.to_bytes(8, "big")
        aad = nonce + b"\x17\x03\x03" + TEXT.to_bytes(2, "big")
        wire += b"\x17\x03\x03" + (SEALED - 5).to_bytes(2, "big") + nonce
        wire += aead.encrypt(SALT + nonce, text(number), aad)
    frames = []
    for offset in range(0, size, payload):
        length = min(payload, size - offset)
        headers = bytearray(tcp_headers(4, length, 443, 40000))
        headers[30:34] = bytes((198, 51, 100, 2))
        headers[38:42] = ((START_SEQ + offset) & 0xFFFFFFFF).to_bytes(4, "big")
        frames.append((vnet_header(4, len(headers)), bytes(headers + wire[offset : offset + length])))
    return frames


class Player(Port):
    """Hands `frames` to the device for one flow after the other, at most BURST at a time, each in the same buffer."""

    def __init__(
        self, loop: Loop, frames: Sequence[tuple[bytes, bytes]], flows: range, done: Callable[[], None]
    ) -> None:
        super().__init__()
        self.marks: list[tuple[int, int]] = []
        self._loop = loop
        self._frames = frames
        self._left = ((flow, header, frame) for flow in flows for header, frame in frames)
        self._buffer = memoryview(bytearray(1 << 16))
        self._header = memoryview(bytearray(12))
        self._given = 0
        self._done = done
        loop.soon(self._give)

    def _give(self) -> None:
        receiver, buffer, lap = self.receiver, self._buffer, len(self._frames)
        for _ in range(BURST):
            if self._given == lap * len(self.marks):
                self.marks.append((self._given, time.perf_counter_ns()))
            found = next(self._left, None)
            if found is None:
                self._finish()
                return
            flow, self._header[:], frame = found
            size = len(frame)
            buffer[:size] = frame
            _SOURCE.pack_into(buffer, _SOURCE_AT, flow)
            self._given += 1
            if not receiver(self._header, buffer[:size]):
                return  # resume goes on
        self._loop.soon(self._give)

    def _finish(self) -> None:
        done, self._done = self._done, lambda: None
        done()

    def resume(self) -> None:
        """The device can take more."""
        self._loop.soon(self._give)


class RxArm:
    """Prepared frames into the rx queue of a rig of its own; what arrived is compared after every run."""

    def __init__(self, stack: ExitStack, packets: int, payload: int) -> None:
        self._frames = sealed_lap(packets, payload)
        self._records, _ = stream_lap(packets, payload)
        shape = Shape(256, {"commands": {"keys": 1}, "hello": {}}, rx_buffers=RX_RING, max_contexts=1 << 17)
        self.rig = stack.enter_context(Rig(shape))
        self.rig.run("hello", 1)

    def add(self, count: int) -> None:
        """Contexts for the next flows."""
        self.rig.run("add_rx", count)

    def renew(self, count: int) -> None:
        """Delete the contexts of the first flows and make them again."""
        for work in ("delete", "add_rx"):
            self.rig.again(work)
            self.rig.run(work, count)

    def run(self, flows: range) -> Run:
        """Play all frames to each of these flows, whose contexts have received nothing yet."""
        players: list[Player] = []

        def port(loop: Loop) -> Port:
            players.append(Player(loop, self._frames, flows, lambda: self.rig.tell({"stop": True})))
            return FaultyPort(loop, players[0], self.rig.nic)

        before = list(self.rig.nic.stats.values)
        given = len(flows) * len(self._frames)
        self.rig.posted[Counter.RX_WIRE_PACKETS] += given
        run = self.rig.serve({"receive": True, "count": given}, port, self.rig.rings[RX])
        for counter, count in ((Counter.RX_TLS_PACKETS, given), (Counter.RX_TLS_RECORDS, len(flows) * self._records)):
            if (counted := self.rig.nic.stats[counter] - before[counter]) != count:
                raise BedError(f"{counter.name.lower()} is {counted}, not {count}")
        self._check(flows[-1])
        return run._replace(marks=players[0].marks)

    def _check(self, flow: int) -> None:
        """The last lap lies in the buffers, decrypted and marked. Raises BedError."""
        data = b""
        need = [-(-(abi.VNET_HDR_LEN + abi.RX_TLS.size + len(frame)) // 4096) for _, frame in self._frames]
        for buffers, (_, frame) in zip(need, self._frames, strict=True):
            packet = b"".join(self._take(sum(need), buffers, len(data) == 0))
            header, ext = packet[: abi.VNET_HDR_LEN], abi.RxTls._make(abi.RX_TLS.unpack_from(packet, abi.VNET_HDR_LEN))
            told = (header[0] & abi.HDR_F_EXT, ext.flags, ext.slot, int.from_bytes(header[10:12], "little"))
            if told != (abi.HDR_F_EXT, abi.RxTlsFlag.DECRYPTED, flow, buffers):
                raise BedError(f"a packet arrived with {told}")
            payload = packet[abi.VNET_HDR_LEN + abi.RX_TLS.size + 66 :]
            if len(payload) != len(frame) - 66:
                raise BedError(f"{len(payload)} bytes of payload arrived, not {len(frame) - 66}")
            data += payload
        for number in range(self._records):
            if data[number * SEALED + 13 : number * SEALED + 13 + TEXT] != text(number):
                raise BedError(f"record {number} was not decrypted to what it was")

    def _take(self, back: int, count: int, first: bool) -> Iterator[bytes]:
        """The contents of `count` used buffers, read as a driver does; `first`: from `back` buffers ago on."""
        num, desc_at, _, used_at = self.rig.layouts[RX]
        memory = self.rig.memory
        if first:
            (idx,) = struct.unpack_from("<H", memory, used_at + 2)
            self._at = idx - back
        for _ in range(count):
            head, written = struct.unpack_from("<II", memory, used_at + 4 + 8 * (self._at % num))
            (address,) = struct.unpack_from("<Q", memory, desc_at + 16 * head)
            yield bytes(memory[address : address + written])
            self._at += 1


def measure(session: Session) -> Iterator[Measured]:
    """Opened records, hot; beside the same libcrypto by itself, which seals as fast as it opens."""
    evp, tries, calls = Evp(TEXT), session.scaled(50, 3), session.scaled(400, 20)
    flows = range(session.scaled(FLOWS, 2))
    runs, alone = [], []
    with ExitStack() as stack:
        arm = RxArm(stack, PACKETS, TSO)
        arm.add(len(flows))
        for number in range(session.rounds(ROUNDS)):
            if number:
                arm.renew(len(flows))
            alone.append(8e-9 * max(evp.rate(calls) for _ in range(tries)))
            runs.append(arm.run(flows))
    bits = [gbit(max(run.pieces), TSO) for run in runs]
    details = {"cipher": "AES-128-GCM", "record_bytes": TEXT, "personality": "ideal"}
    yield Measured("device_crypto_rx_over_evp", "ratio", ratios(bits, alone), details=details)
    yield measured("device_crypto_rx_gbit", "Gbit/s", runs, lambda rate: gbit(rate, TSO))


GROUP: Final = Group("device-rx", "device", "TLS records from a port into an rx ring", measure)
