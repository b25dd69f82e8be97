"""What a device can lie about in an rx ring, and by a tx ring: one function per lie, named as tests name it.

An honest device has done its work; a lie changes what the driver will find in guest memory, or in the used ring, before
it is told. Each returns whether it could be told on this occasion: about a verdict, for one, there must be one.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Final

from nicdev import abi
from nicdev.wire import vnet
from tests.support.deliveries import EXT, Delivery, Handle

LEN_AT: Final = EXT + 2
MORE_THAN_ANY_BUFFER: Final = (1 << 16, 1 << 31, (1 << 32) - 1)
RX_QUESTIONS: Final = (
    abi.RxTlsFlag.RESYNC_REQ,
    abi.RxTlsFlag.RESYNC_START,
    abi.RxTlsFlag.RESYNC_END,
    abi.RxTlsFlag.RESYNC_CANCEL,
)
Lie = Callable[[Delivery, Random], bool]


# -- how much there is -------------------------------------------------------------------------------------------------


def _length_zero(it: Delivery, rng: Random) -> bool:
    it.set_length(0)
    return True


def _length_short(it: Delivery, rng: Random) -> bool:
    it.set_length(rng.randrange(1, EXT))
    return True


def _length_no_frame(it: Delivery, rng: Random) -> bool:
    it.head[0] &= ~abi.HDR_F_EXT
    it.set_length(EXT + rng.randrange(14))
    return True


def _length_long(it: Delivery, rng: Random) -> bool:
    it.set_length(rng.choice(MORE_THAN_ANY_BUFFER))
    return True


def _length_beyond(it: Delivery, rng: Random) -> bool:
    """What lies behind the frame in its buffer is old."""
    it.set_length(it.length() + rng.randrange(1, 200))
    return True


def _length_cut(it: Delivery, rng: Random) -> bool:
    if it.length() < 100:
        return False
    it.set_length(rng.randrange(100, it.length()))
    return True


def _length_later(it: Delivery, rng: Random) -> bool:
    if len(it.used) < 2:
        return False
    it.set_length(rng.choice((0, *MORE_THAN_ANY_BUFFER)), rng.randrange(1, len(it.used)))
    return True


def _buffers(*numbers: int) -> Lie:
    def lie(it: Delivery, rng: Random) -> bool:
        it.set_header(num_buffers=rng.choice(numbers))
        return True

    return lie


def _buffers_more(it: Delivery, rng: Random) -> bool:
    most = 17
    if len(it.used) >= most:
        return False
    it.set_header(num_buffers=rng.randrange(len(it.used) + 1, most + 1))
    return True


# -- the virtio_net_hdr ------------------------------------------------------------------------------------------------


def _header_gso_type(it: Delivery, rng: Random) -> bool:
    it.set_header(gso_type=rng.choice((2, 6, 7, 0x7F)), gso_size=1000)
    return True


def _header_gso_size(it: Delivery, rng: Random) -> bool:
    it.set_header(gso_type=rng.choice((1, 4)), gso_size=0)
    return True


def _header_checksum(it: Delivery, rng: Random) -> bool:
    flags = it.head[0] | vnet.VIRTIO_NET_HDR_F_NEEDS_CSUM
    start, offset = rng.choice(((0xFFFF, 16), (0xFFF0, 0xFFFF), (34, 0xFFFF)))
    it.set_header(flags=flags, csum_start=start, csum_offset=offset)
    return True


def _header_plausible(it: Delivery, rng: Random) -> bool:
    """Nothing that can be seen to be wrong: sizes of segments."""
    it.set_header(gso_type=1, gso_size=rng.choice((1, 7, 1448, 0xFFFF)), hdr_len=rng.choice((0, 1, 0xFFFF)))
    return True


def _header_noise(it: Delivery, rng: Random) -> bool:
    """All but num_buffers at random, which makes an extension or hides one, too."""
    it.head[:10] = rng.randbytes(10)
    return True


# -- extensions --------------------------------------------------------------------------------------------------------


def _extension_type(it: Delivery, rng: Random) -> bool:
    it.head[0] |= abi.HDR_F_EXT
    it.head[EXT] = rng.choice((0, 1, 2, 3, 0x7F, 0x80, 0x84, 0xFF))
    return True


def _extension_cut(it: Delivery, rng: Random) -> bool:
    """The buffer ends within the extension."""
    it.head[0] |= abi.HDR_F_EXT
    it.head[EXT] = rng.choice((abi.ExtType.HELLO_REPLY, abi.ExtType.RX_TLS, abi.ExtType.EVENT))
    it.set_length(EXT + rng.randrange(abi.RX_TLS.size))
    return True


def _extension_len(*lengths: int) -> Lie:
    def lie(it: Delivery, rng: Random) -> bool:
        if not it.mark(0, (0, 0)):
            return False
        it.head[LEN_AT : LEN_AT + 2] = rng.choice(lengths).to_bytes(2, "little")
        return True

    return lie


# -- verdicts and questions --------------------------------------------------------------------------------------------

_DECRYPTED: Final = int(abi.RxTlsFlag.DECRYPTED)


def _verdict_unknown(it: Delivery, rng: Random) -> bool:
    return it.mark(_DECRYPTED, (rng.choice((1 << 16, 1 << 31, (1 << 32) - 1)), rng.getrandbits(32)))


def _verdict_generation(it: Delivery, rng: Random) -> bool:
    live = it.handles.any_of(rng, abi.Direction.RX)
    if live is None:
        return False
    slot, generation = live
    return it.mark(_DECRYPTED, (slot, generation + rng.choice((-1, 1, 1 << 20)) & 0xFFFF_FFFF))


def _verdict_tx(it: Delivery, rng: Random) -> bool:
    handle = it.handles.any_of(rng, abi.Direction.TX)
    return handle is not None and it.mark(_DECRYPTED, handle)


def _verdict_closed(it: Delivery, rng: Random) -> bool:
    return bool(it.handles.closed) and it.mark(_DECRYPTED, rng.choice(it.handles.closed))


def _question_flags(rng: Random) -> int:
    """One question, or several at once."""
    return sum(int(flag) for flag in rng.sample(RX_QUESTIONS, rng.randrange(1, 5)))


def _question(it: Delivery, rng: Random) -> bool:
    """About a live context, beside what is true of the frame; of places that it may have, had or never has."""
    said = it.verdict()
    if said is None:
        return False
    seq = rng.choice((said.resync_seq, 0, rng.getrandbits(32), 0xFFFF_FFFF))
    length = rng.choice((0, 1, 0xFFFF, 0x10000, 0xFFFF_FFFF))
    return it.mark(said.flags & _DECRYPTED | _question_flags(rng), (said.slot, said.generation), seq, length)


def _question_elsewhere(it: Delivery, rng: Random) -> bool:
    """About contexts that are none, or not rx, on a frame that is not theirs."""
    if it.extension():
        return False
    tx = it.handles.any_of(rng, abi.Direction.TX)
    handle = rng.choice([(rng.getrandbits(32), rng.getrandbits(32)), tx or (0, 0), *it.handles.closed[-3:]])
    return it.mark(_question_flags(rng), handle, rng.getrandbits(32), rng.getrandbits(32))


def _question_forgotten(it: Delivery, rng: Random) -> bool:
    """The first attempt of a context opens, and is never heard of again: all frames are somebody else's."""
    said = it.verdict()
    if said is None or said.flags & _DECRYPTED:
        return False
    handle = (said.slot, said.generation)
    if said.flags & abi.RxTlsFlag.RESYNC_START and handle not in it.handles.asked:
        it.handles.asked.add(handle)
        return True
    return it.mark(0, (0xFFFF_FFFF, 0))


# -- messages ----------------------------------------------------------------------------------------------------------

_ALONE: Final = vnet.VnetHdr(flags=abi.HDR_F_EXT, num_buffers=1).pack()


def _event(it: Delivery, code: int, handle: Handle, rng: Random) -> bool:
    number = rng.getrandbits(32)
    return it.inject(_ALONE + abi.EVENT.pack(abi.ExtType.EVENT, code, abi.EVENT.size, *handle, number, number))


def _event_stale(it: Delivery, rng: Random) -> bool:
    """Known codes and others, about contexts that are none."""
    code = rng.choice((0, 1, 2, 4, 255))
    return _event(it, code, rng.choice([(rng.getrandbits(32), rng.getrandbits(32)), *it.handles.closed[-3:]]), rng)


def _event_live(*codes: int) -> Lie:
    def lie(it: Delivery, rng: Random) -> bool:
        handle = it.handles.any_of(rng, rng.choice(list(abi.Direction)))
        return handle is not None and _event(it, rng.choice(codes), handle, rng)

    return lie


def _event_config(it: Delivery, rng: Random) -> bool:
    return _event(it, abi.EventCode.CONFIG_CHANGED, (0, 0), rng)


def _absurd_hello(nonce: int, boot_id: int, rng: Random) -> bytes:
    """A HELLO_REPLY in which everything that the driver has to go by is out of proportion."""
    return abi.HELLO_REPLY.pack(
        abi.ExtType.HELLO_REPLY, 0xFF, abi.HELLO_REPLY.size, abi.ABI_VERSION, nonce, boot_id, 0xFFFF_FFFF, 0xFFFF_FFFF,
        0xFFFF_FFFF, 0xFFFF, rng.choice((0, 3, 255)), rng.choice((0, 5, 255)), b"\xff" * 16,
    )  # fmt: skip


def _hello_unasked(it: Delivery, rng: Random) -> bool:
    return it.inject(_ALONE + _absurd_hello(rng.choice((0, rng.getrandbits(64))), rng.getrandbits(64), rng))


def _hello(it: Delivery) -> abi.HelloReply | None:
    if it.extension() != abi.ExtType.HELLO_REPLY:
        return None
    return abi.HelloReply._make(abi.HELLO_REPLY.unpack_from(it.head, EXT))


def _hello_absurd(it: Delivery, rng: Random) -> bool:
    said = _hello(it)
    if said is None:
        return False
    it.head[EXT : EXT + abi.HELLO_REPLY.size] = _absurd_hello(said.nonce, said.boot_id, rng)
    return True


def _hello_reborn(it: Delivery, rng: Random) -> bool:
    """Says that it lost its contexts, every time."""
    said = _hello(it)
    if said is None:
        return False
    abi.HELLO_REPLY.pack_into(it.head, EXT, *said._replace(boot_id=rng.getrandbits(64)))
    return True


# -- rings -------------------------------------------------------------------------------------------------------------


def _ring_id(it: Delivery, rng: Random) -> bool:
    number = rng.choice((it.ring_size, 0xFFFF, 0xFFFF_FFFF))
    it.used[0] = it.used[0] & ~0xFFFF_FFFF | number
    return True


def _ring_twice(it: Delivery, rng: Random) -> bool:
    it.used.append(it.used[-1])
    return True


DELIVERY_LIES: Final[dict[str, Lie]] = {
    "length zero": _length_zero,
    "length less than a header": _length_short,
    "length without a frame": _length_no_frame,
    "length more than the buffer": _length_long,
    "length beyond the frame": _length_beyond,
    "length within the frame": _length_cut,
    "length of a later buffer": _length_later,
    "no buffers": _buffers(0),
    "too many buffers": _buffers(18, 0xFFFF),
    "more buffers than there are": _buffers_more,
    "gso type": _header_gso_type,
    "gso size": _header_gso_size,
    "checksum outside": _header_checksum,
    "segments of any size": _header_plausible,
    "header of noise": _header_noise,
    "extension type": _extension_type,
    "extension cut": _extension_cut,
    "extension too small": _extension_len(*range(abi.RX_TLS.size)),
    "extension beyond the buffer": _extension_len(0x8000, 0xFFFF),
    "extension into the frame": _extension_len(*range(abi.RX_TLS.size + 1, 2 * abi.RX_TLS.size)),
    "verdict of an unknown context": _verdict_unknown,
    "verdict of another generation": _verdict_generation,
    "verdict of a tx context": _verdict_tx,
    "verdict of a closed context": _verdict_closed,
    "question": _question,
    "question elsewhere": _question_elsewhere,
    "question forgotten": _question_forgotten,
    "event about nobody": _event_stale,
    "event of a drop": _event_live(abi.EventCode.TX_DROPPED),
    "event of no context": _event_live(abi.EventCode.UNKNOWN_CONTEXT),
    "event of a change": _event_config,
    "hello unasked": _hello_unasked,
    "hello absurd": _hello_absurd,
    "hello reborn": _hello_reborn,
    "rx id": _ring_id,
    "rx id twice": _ring_twice,
}
TX_RING_LIES: Final = ("tx id", "tx id twice")  # told by the ring itself
