"""virtio_net_hdr: layout and the lies that are refused."""

from __future__ import annotations

import pytest

from nicdev.errors import FrameError
from nicdev.stats import Counter
from nicdev.wire.frame import MAX_FRAME
from nicdev.wire.vnet import VNET_HDR, VnetHdr, split


def check(hdr: VnetHdr, frame_len: int) -> None:
    """Look at a chain with this header and a frame of so many bytes."""
    chain = bytearray(hdr.pack() + bytes(frame_len))
    header, frame = split(memoryview(chain), VNET_HDR.size)
    assert header == hdr._replace(flags=hdr.flags & 1).pack()
    assert len(frame) == frame_len


def test_layout() -> None:
    raw = bytes.fromhex("01 84 0201 0403 0605 0807 0a09")
    assert VNET_HDR.size == 12
    hdr = VnetHdr.unpack_from(b"xx" + raw, 2)
    assert hdr == VnetHdr(1, 0x84, 0x0102, 0x0304, 0x0506, 0x0708, 0x090A)
    assert hdr.pack() == raw
    assert VnetHdr().pack() == bytes(12)


@pytest.mark.parametrize(
    ("hdr", "frame_len"),
    [
        (VnetHdr(), 14),
        (VnetHdr(hdr_len=100), 100),
        (VnetHdr(flags=1, csum_start=34, csum_offset=16), 52),
        (VnetHdr(flags=2, csum_start=65535, csum_offset=65535), 60),  # not NEEDS_CSUM: not looked at
        (VnetHdr(gso_size=1448), 60),  # no gso_type: not looked at
        (VnetHdr(flags=1, gso_type=1, hdr_len=54, gso_size=1448, csum_start=34, csum_offset=16), 65549),
        (VnetHdr(flags=1, gso_type=0x81, gso_size=1, csum_start=34, csum_offset=16), 65549),
        (VnetHdr(flags=1, gso_type=4, hdr_len=1, gso_size=1, csum_start=54, csum_offset=16), 65553),
        (VnetHdr(flags=1, gso_type=0x84, gso_size=65535, csum_start=54, csum_offset=16), 100),
    ],
)
def test_good(hdr: VnetHdr, frame_len: int) -> None:
    check(hdr, frame_len)
    # One byte less, where the frame was just long enough, is refused.
    least = max(14, hdr.hdr_len, hdr.csum_start + hdr.csum_offset + 2 if hdr.flags & 1 else 0)
    with pytest.raises(FrameError):
        check(hdr, least - 1)


@pytest.mark.parametrize(
    ("hdr", "frame_len"),
    [
        (VnetHdr(), 0),
        (VnetHdr(), 13),
        (VnetHdr(hdr_len=61), 60),
        (VnetHdr(hdr_len=65535), 60),
        (VnetHdr(flags=1, csum_start=34, csum_offset=25), 60),
        (VnetHdr(flags=1, csum_start=61), 60),
        (VnetHdr(flags=1, csum_start=65535, csum_offset=65535), 65549),
        (VnetHdr(flags=1, csum_start=0, csum_offset=16), 60),
        (VnetHdr(flags=1, csum_start=13, csum_offset=16), 60),
        (VnetHdr(flags=1, gso_type=1, gso_size=0, csum_start=34, csum_offset=16), 1000),
        (VnetHdr(gso_type=1, gso_size=100, csum_start=34, csum_offset=16), 1000),
        (VnetHdr(flags=1, gso_type=0x80, gso_size=100, csum_start=34, csum_offset=16), 1000),
        *(
            (VnetHdr(flags=1, gso_type=gso_type, gso_size=100, csum_start=34, csum_offset=16), 1000)
            for gso_type in (2, 3, 5, 6, 0x40, 0x7F, 0x83, 0xFF)
        ),
    ],
)
def test_refused(hdr: VnetHdr, frame_len: int) -> None:
    with pytest.raises(FrameError) as caught:
        check(hdr, frame_len)
    assert caught.value.counter is Counter.TX_DROP_BAD_HEADER


def test_a_frame_has_a_largest_size() -> None:
    check(VnetHdr(), MAX_FRAME)
    with pytest.raises(FrameError) as caught:
        check(VnetHdr(), MAX_FRAME + 1)
    assert caught.value.counter is Counter.TX_DROP_TOO_BIG


def test_what_lies_before_the_frame_is_not_part_of_it() -> None:
    chain = memoryview(bytearray(VnetHdr(hdr_len=14).pack() + b"extension" + bytes(14)))
    assert split(chain, 12 + 9)[1] == bytes(14)
    with pytest.raises(FrameError):
        split(chain, 12 + 10)
