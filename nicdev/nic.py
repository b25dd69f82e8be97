"""The NIC: what happens to one chain from the guest and to one frame from the wire.

Theory of operation. Everything here is bytes in, bytes out; queues.py brings chains and takes results, the ports
carry frames.

tx  `transmit` gets a copy of one tx chain (the device's own copy: frags in guest memory are shared with the guest's
    retransmit queue and page cache, so nothing is ever encrypted in place there). The virtio_net_hdr says whether an
    extension follows. A plain frame goes out as it is. A TX_TLS frame is encrypted in place in the copy; every
    reason not to is an exception, so there is no path on which a marked frame could be returned unencrypted. A
    COMMAND returns its reply. A HELLO queues its answer.
rx  `receive` gets one frame in a writable buffer. If its 4-tuple has an rx context and its checksum holds, the
    context may decrypt it, and the guest gets another frame (see tls/scratch); an RX_TLS extension carries the verdict.
    What the guest's driver did not negotiate (partial checksums, large frames) is undone here, so every port may hand
    over whatever it has.

Messages to the driver wait in `messages` until a buffer of rx queue 0 is free. A driver that has not said HELLO gets
no extension at all: it would take one for a frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from nicdev import abi
from nicdev.control import Control
from nicdev.errors import FrameError, TxDrop
from nicdev.messages import Messages
from nicdev.observer import Observer, View, remark
from nicdev.stats import Counter, Stats
from nicdev.tls.rx import RxResult
from nicdev.tls.table import ContextTable
from nicdev.tls.tx import Resync
from nicdev.virtio import features
from nicdev.wire import checksum, segment, vnet
from nicdev.wire.frame import MAX_FRAME, Frame, parse
from nicdev.wire.steering import Steering
from nicdev.wire.vnet import split

MAX_CHAIN: Final = abi.VNET_HDR_LEN + 256 + abi.MAX_RECORD_PREFIX + MAX_FRAME
MAX_SEGMENTS: Final = 2048  # of a frame that the guest does not take whole: 64 KiB at an MSS of 32

# Hot numbers as plain ints: an enumeration's attribute costs more than the addition, `&` with a flag ten times that.
_TX_PACKETS, _TX_BYTES = int(Counter.TX_PACKETS), int(Counter.TX_BYTES)
_TX_TLS_PACKETS, _TX_TLS_BYTES = int(Counter.TX_TLS_PACKETS), int(Counter.TX_TLS_BYTES)
_TX_TLS_RECORDS, _RX_WIRE_PACKETS = int(Counter.TX_TLS_RECORDS), int(Counter.RX_WIRE_PACKETS)
_RX_TLS_PACKETS, _RX_TLS_BYTES = int(Counter.RX_TLS_PACKETS), int(Counter.RX_TLS_BYTES)
_RX_TLS_RECORDS, _RX_TLS_PASSED = int(Counter.RX_TLS_RECORDS), int(Counter.RX_TLS_PASSED)
_TX_TLS, _TX_TLS_LEN, _RESYNC = int(abi.ExtType.TX_TLS), abi.TX_TLS.size, int(abi.TxTlsFlag.RESYNC)
_RX_TLS, _RX_TLS_LEN, _DECRYPTED = int(abi.ExtType.RX_TLS), abi.RX_TLS.size, int(abi.RxTlsFlag.DECRYPTED)

_VNET_HDR_LEN, _HDR_F_EXT = int(abi.VNET_HDR_LEN), int(abi.HDR_F_EXT)

_ORDINARY: Final = RxResult()[4:]  # all but whether, and what, was decrypted
_RX_FLAGS: Final = vnet.VIRTIO_NET_HDR_F_NEEDS_CSUM | vnet.VIRTIO_NET_HDR_F_DATA_VALID
_NEEDS_SEGMENTING = {
    vnet.VIRTIO_NET_HDR_GSO_TCPV4: features.VIRTIO_NET_F_GUEST_TSO4,
    vnet.VIRTIO_NET_HDR_GSO_TCPV6: features.VIRTIO_NET_F_GUEST_TSO6,
}


class Packet(NamedTuple):
    """A frame on its way: `header` is the 12-byte virtio_net_hdr with its extension, if any."""

    header: bytes | memoryview
    frame: memoryview


_new = tuple.__new__  # of the hot paths: a NamedTuple from all its fields, at a third of the price of calling the class
_NOTHING: Final = b""


def _resync_fields(result: RxResult) -> tuple[int, int]:
    """resync_seq and resync_len of a verdict; it holds one question at most."""
    if result.opened is not None:
        return result.opened
    for seq in (result.ask, result.guess):
        if seq is not None:
            return seq, 0
    return 0, 0


class Nic:
    """One NIC: contexts, counters and the two packet paths. `boot_ids` yields a fresh random u64 per reset."""

    def __init__(self, stats: Stats, table: ContextTable, control: Control, boot_ids: Callable[[], int]) -> None:
        self.stats = stats
        self.table = table
        self.control = control
        self.messages = Messages(stats)
        self._features = 0
        self._steers = False
        self.observer: Observer | None = None
        self._packet_id = 0
        self._boot_ids = boot_ids
        self._boot_id = boot_ids()
        self._greeted = False  # the driver has said HELLO, in our version
        self._interrupted = False  # reset while a driver that had said HELLO was there
        self._heard = True
        self._steering = Steering()

    @property
    def features(self) -> int:
        """What the driver accepted, virtio feature bits."""
        return self._features

    @features.setter
    def features(self, accepted: int) -> None:
        self._features = accepted
        self._steers = bool(accepted & features.VIRTIO_NET_F_MQ)

    # -- life ---------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """A new driver or none: every context and key goes, and nobody has said HELLO."""
        self._forget_contexts()
        self._interrupted = self._greeted or self._interrupted
        self._greeted = False
        self._heard = True
        self._steering.clear()

    @property
    def greeted(self) -> bool:
        """Whether the driver has said HELLO, in our version."""
        return self._greeted

    @property
    def heard(self) -> bool:
        """Whether the driver, if one is there, has said HELLO since CONFIG_CHANGED."""
        return self._heard

    def resumed(self) -> None:
        """The rings go on where they stopped: it was no new driver after all (QEMU resets a device that it pauses)."""
        if self._interrupted:
            self.event(abi.EventCode.CONFIG_CHANGED)

    def _forget_contexts(self) -> None:
        self.stats.add(Counter.CTX_DELETED, self.table.clear())
        self.messages.clear()
        self._boot_id = self._boot_ids()

    # -- tx -----------------------------------------------------------------------------------------------------------

    def transmit(self, queue: int, chain: bytearray, posted: bool = False) -> Packet | bytes:
        """Handle one tx chain; `chain` is the device's copy of its readable part and is overwritten.

        Returns a packet for the wire, or what is to be written into the chain's writable part, which may be nothing.
        `posted`: the chain has no such part.
        """
        try:
            size = len(chain) - _VNET_HDR_LEN
            if size < 0:
                raise FrameError(Counter.TX_DROP_BAD_HEADER)
            if chain[0] & _HDR_F_EXT:
                return self._extension(queue, memoryview(chain), posted)
            stats = self.stats.values
            stats[_TX_PACKETS] += 1
            stats[_TX_BYTES] += size
            header, frame = split(memoryview(chain), _VNET_HDR_LEN)
            if self._steers:
                self._steering.transmitted(queue, frame)
            if self.observer is not None:
                self._observe("tx", View.HOST, frame, "")
                self._observe("tx", View.WIRE, frame, "", same=True)
            return _new(Packet, (header, frame))
        except (FrameError, TxDrop) as drop:
            self.stats.add(drop.counter)
            return _NOTHING

    def _observe(self, direction: str, view: View, frame: memoryview | bytes, comment: str, same: bool = False) -> None:
        """Show a view to the observer; `same` packet as the last one shown, or a new one."""
        if self.observer is not None:
            self._packet_id += not same
            self.observer.packet(self._packet_id, view, direction, bytes(frame), comment)

    def _extension(self, queue: int, chain: memoryview, posted: bool) -> Packet | bytes:
        kind = chain[abi.VNET_HDR_LEN] if len(chain) > abi.VNET_HDR_LEN else 0
        if kind == _TX_TLS:
            return self._transmit_tls(queue, chain)
        if kind == abi.ExtType.COMMAND:
            command = chain[abi.VNET_HDR_LEN :]
            reply = self.control.execute(command, posted)
            if posted:
                self._tell_add_refused(command, reply)
            return reply
        if kind == abi.ExtType.HELLO:
            self._hello(chain[abi.VNET_HDR_LEN :])
            return _NOTHING
        raise FrameError(Counter.TX_DROP_BAD_EXTENSION)

    def _transmit_tls(self, queue: int, chain: memoryview) -> Packet:
        stats = self.stats.values
        stats[_TX_PACKETS] += 1
        if len(chain) < _VNET_HDR_LEN + _TX_TLS_LEN:
            raise TxDrop(Counter.TX_DROP_BAD_EXTENSION)
        ext = _new(abi.TxTls, abi.TX_TLS.unpack_from(chain, _VNET_HDR_LEN))
        _, flags, ext_len, _, _, prefix_len, resync_seq, rcd_sn = ext
        prefix_at = _VNET_HDR_LEN + ext_len
        frame_at = prefix_at + prefix_len
        resync = None
        if flags or prefix_len:
            if flags != _RESYNC or prefix_len > abi.MAX_RECORD_PREFIX:
                raise TxDrop(Counter.TX_DROP_BAD_EXTENSION)
            resync = Resync(resync_seq, rcd_sn, chain[prefix_at:frame_at])
        if ext_len < _TX_TLS_LEN:
            raise TxDrop(Counter.TX_DROP_BAD_EXTENSION)
        stats[_TX_BYTES] += max(0, len(chain) - frame_at)
        if self.observer is not None:
            self._observe("tx", View.HOST, chain[frame_at:], f"slot={ext.slot} gen={ext.generation} tx")
        try:
            header, frame = split(chain, frame_at)
            parsed = self._encrypt(ext, frame, resync)
        except (FrameError, TxDrop) as drop:
            self._tell_tx_drop(ext, drop.counter, chain[frame_at:])
            raise
        if not header[0]:  # no NEEDS_CSUM
            checksum.fill_tcp(frame, parsed)
        if self._steers:
            self._steering.transmitted(queue, frame)
        if self.observer is not None:
            about = f"slot={ext.slot} gen={ext.generation} tx encrypted"
            self._observe("tx", View.WIRE, frame, about, same=True)
        return _new(Packet, (header, frame))

    def _encrypt(self, ext: abi.TxTls, frame: memoryview, resync: Resync | None) -> Frame:
        """Encrypt the TCP payload of `frame` in place, or raise TxDrop."""
        context = self.table.get_tx(ext.slot, ext.generation)
        parsed = parse(frame)
        if parsed is None or parsed.payload == parsed.end:
            raise TxDrop(Counter.TX_DROP_NOT_TCP)
        self.control.faults.before_tx(ext.slot, ext.generation, context)
        result = context.encrypt(parsed.seq, frame[parsed.payload : parsed.end], resync)
        stats = self.stats.values
        stats[_TX_TLS_PACKETS] += 1
        stats[_TX_TLS_BYTES] += parsed.end - parsed.payload
        stats[_TX_TLS_RECORDS] += result.records
        if resync is not None:
            stats[Counter.TX_TLS_RESYNC] += 1
        return parsed

    def _tell_tx_drop(self, ext: abi.TxTls, counter: Counter, frame: memoryview) -> None:
        unknown = (Counter.TX_DROP_UNKNOWN_CONTEXT, Counter.TX_DROP_STALE_CONTEXT, Counter.TX_DROP_WRONG_DIRECTION)
        code = abi.EventCode.UNKNOWN_CONTEXT if counter in unknown else abi.EventCode.TX_DROPPED
        parsed = parse(frame)
        self.event(code, ext.slot, ext.generation, counter, parsed.seq if parsed else 0)

    def _tell_add_refused(self, command: memoryview, reply: bytes) -> None:
        """What the reply to a posted command would have said, if it is a CTX_ADD that was refused."""
        status, _ = abi.REPLY.unpack_from(reply)
        if status == abi.Status.OK or len(command) < abi.COMMAND.size:
            return
        _, opcode, _, slot, generation = abi.COMMAND.unpack_from(command)
        if opcode == abi.Opcode.CTX_ADD:
            self.event(abi.EventCode.ADD_REFUSED, slot, generation, status)

    # -- messages -----------------------------------------------------------------------------------------------------

    def event(self, code: abi.EventCode, slot: int = 0, generation: int = 0, reason: int = 0, value: int = 0) -> None:
        """Tell the driver; see Messages."""
        if code is abi.EventCode.CONFIG_CHANGED:
            self._heard = not (self._greeted or self._interrupted)
        self.messages.event(code, slot, generation, reason, value)

    def _hello(self, ext: memoryview) -> None:
        if len(ext) < abi.HELLO.size:
            raise FrameError(Counter.TX_DROP_BAD_EXTENSION)
        hello = abi.Hello._make(abi.HELLO.unpack_from(ext))
        if (hello.dst, hello.magic) != (abi.HELLO_DST, abi.HELLO_MAGIC):
            raise FrameError(Counter.TX_DROP_BAD_EXTENSION)
        self.stats.add(Counter.HELLOS)
        if hello.flags & abi.HelloFlag.RESET:
            self._forget_contexts()
        self._greeted = hello.version == abi.ABI_VERSION  # what speaks another version takes no extension of ours
        self._interrupted = False
        self._heard = True
        self.messages.hello_reply(self.control.hello_reply(hello.nonce, self._boot_id))

    # -- rx -----------------------------------------------------------------------------------------------------------

    def receive(self, header: memoryview, frame: memoryview) -> list[tuple[int, Packet]]:
        """Handle one frame from the wire in a writable buffer; return packets for the guest, each with its queue pair.

        More than one only where the driver does not take a large frame whole. `header` is a virtio_net_hdr (12 bytes).
        """
        self.stats.values[_RX_WIRE_PACKETS] += 1
        header[0] &= _RX_FLAGS  # nothing from a port can look like an extension
        parsed = parse(frame)
        if parsed is None:
            return self._received(0, header, frame, None)
        queue = self._steering.queue(parsed)
        if header[1] and not self._features & _NEEDS_SEGMENTING.get(header[1] & 0x7F, 0):
            try:
                pieces = self._segments(header, frame, parsed)
            except FrameError as drop:
                self.stats.add(drop.counter)
                return []
            received: list[tuple[int, Packet]] = []
            for piece in pieces:
                for _, packet in self._received(queue, *piece, parse(piece[1])):
                    # a copy: the next piece is decrypted where this one was
                    received.append((queue, Packet(packet.header, memoryview(bytes(packet.frame)))))
            return received
        return self._received(queue, header, frame, parsed)

    def _received(
        self, queue: int, header: memoryview, frame: memoryview, parsed: Frame | None
    ) -> list[tuple[int, Packet]]:
        """One packet with its verdict, in a list that is empty if the guest must not get it."""
        if self.observer is not None:
            self._observe("rx", View.WIRE, frame, "")
        packet = self._verdict(header, frame, parsed)
        if packet is None:
            self.stats.add(Counter.RX_DROP_INCONSISTENT)
            return []
        if self.observer is not None:
            self._observe("rx", View.HOST, packet.frame, remark(packet.header), same=True)
        return [(queue, packet)]

    @staticmethod
    def _segments(header: memoryview, frame: memoryview, parsed: Frame) -> list[tuple[memoryview, memoryview]]:
        gso_size = vnet.VNET_HDR.unpack_from(header)[3]
        if parsed.end - parsed.payload > MAX_SEGMENTS * gso_size:
            raise FrameError(Counter.RX_DROP_TOO_BIG)
        plain = memoryview(bytes(abi.VNET_HDR_LEN))
        return [(plain, memoryview(piece)) for piece in segment.segment(frame, parsed, gso_size)]

    def _plain_header(self, header: memoryview, frame: memoryview) -> bytes | memoryview:
        """The header for a frame handed over as it is; completes its checksum where the driver cannot."""
        if not header[0] & vnet.VIRTIO_NET_HDR_F_NEEDS_CSUM or self.features & features.VIRTIO_NET_F_GUEST_CSUM:
            return header
        _, _, _, _, start, offset, _ = vnet.VNET_HDR.unpack_from(header)
        if start + offset + 2 <= len(frame):
            checksum.finish_partial(frame, start, offset)
        return bytes(abi.VNET_HDR_LEN)

    def _verdict(self, header: memoryview, frame: memoryview, parsed: Frame | None) -> Packet | None:
        """The packet as the guest gets it, None if it must not get it."""
        if parsed is None and self.table.hides(frame):
            return None
        hit = None
        if parsed is not None and self._greeted and parsed.payload < parsed.end:
            hit = self.table.lookup_rx(parsed.dst, parsed.dport, parsed.src, parsed.sport)
        plain = self._plain_header(header, frame)
        if hit is None or parsed is None:
            return _new(Packet, (plain, frame))
        if not header[0] & _RX_FLAGS and not checksum.verify_tcp(frame, parsed):
            self.stats.add(Counter.RX_TLS_BAD_CSUM)
            return _new(Packet, (plain, frame))
        slot, generation, _ = hit
        result = self.control.faults.decrypt(hit, parsed, frame[parsed.payload : parsed.end])
        if result.drop:
            return None
        flags = self._count_rx(result, parsed)
        records = result.records & 0xFFFF
        resync = _resync_fields(result)
        extension = abi.RX_TLS.pack(_RX_TLS, flags, _RX_TLS_LEN, slot, generation, *resync, records, result.plaintext)
        marked = bytes((plain[0] | _HDR_F_EXT,)) + plain[1:] + extension
        if result.text is not None:
            frame = self.table.scratch.frame(frame, parsed.payload, parsed.end)
        return _new(Packet, (marked, frame))

    def _count_rx(self, result: RxResult, parsed: Frame) -> int:
        """Count one verdict; return its RxTlsFlag bits."""
        stats = self.stats.values
        if result.decrypted:
            stats[_RX_TLS_PACKETS] += 1
            stats[_RX_TLS_BYTES] += parsed.end - parsed.payload
            stats[_RX_TLS_RECORDS] += result.records
        else:
            stats[_RX_TLS_PASSED] += 1
        if result[4:] == _ORDINARY:
            return _DECRYPTED if result.decrypted else 0
        stats[Counter.RX_TLS_AUTH_FAIL] += result.auth_failed
        stats[Counter.RX_TLS_LOST_SYNC] += result.lost_sync
        stats[Counter.RX_TLS_RESYNCED] += result.resynced
        flags = _DECRYPTED if result.decrypted else 0
        if result.error:
            flags |= int(abi.RxTlsFlag.ERROR)
        for given, counter, flag in (
            (result.ask is not None, Counter.RX_TLS_ASKED, abi.RxTlsFlag.RESYNC_REQ),
            (result.opened is not None, Counter.RX_TLS_RESYNC_STARTED, abi.RxTlsFlag.RESYNC_START),
            (result.guess is not None, Counter.RX_TLS_RESYNC_GUESSED, abi.RxTlsFlag.RESYNC_END),
            (result.cancelled, Counter.RX_TLS_RESYNC_CANCELLED, abi.RxTlsFlag.RESYNC_CANCEL),
        ):
            if given:
                stats[counter] += 1
                flags |= int(flag)
        return flags
