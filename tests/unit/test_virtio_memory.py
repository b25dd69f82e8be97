"""GuestMemory: every address and length against a model of which byte lies where."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nicdev.errors import GuestMemoryError, RingError
from nicdev.virtio.memory import GuestMemory, Region

TOP = 1 << 64


def region(guest: int, user: int, size: int, fill: int = 0) -> Region:
    return Region(guest, user, size, memoryview(bytearray([fill]) * size))


@pytest.fixture
def memory() -> GuestMemory:
    # The first two follow one another for the guest, but neither in user addresses nor in ours.
    return GuestMemory([region(0x1000, 0x9000, 0x1000, 1), region(0x2000, 0x5000, 0x800, 2), region(0x4000, 0, 16, 3)])


@pytest.mark.parametrize(
    ("addr", "length", "want"),
    [
        (0x1000, 1, [b"\1"]),
        (0x1000, 0x1000, [b"\1" * 0x1000]),
        (0x1FFF, 2, [b"\1", b"\2"]),
        (0x1000, 0x1800, [b"\1" * 0x1000, b"\2" * 0x800]),
        (0x400F, 1, [b"\3"]),
    ],
)
def test_views(memory: GuestMemory, addr: int, length: int, want: list[bytes]) -> None:
    assert [bytes(view) for view in memory.views(addr, length)] == want


@pytest.mark.parametrize(
    ("addr", "length"),
    [
        (0x1000, 0),
        (0x1000, -1),
        (0, 1),
        (0xFFF, 2),
        (0x27FF, 2),
        (0x1000, 0x1801),
        (0x4000, 17),
        (0x4010, 1),
        (TOP - 1, 1),
        (TOP - 1, 2),
        (TOP - 0x1000, 0x3000),
        (0x1000, TOP - 1),
        (TOP, 1),
        (0, 0xFFFFFFFF),
    ],
)
def test_views_outside(memory: GuestMemory, addr: int, length: int) -> None:
    with pytest.raises(GuestMemoryError):
        memory.views(addr, length)


def test_views_write_through(memory: GuestMemory) -> None:
    first, second = memory.views(0x1FFE, 4)
    first[:], second[:] = b"ab", b"cd"
    assert [bytes(view) for view in memory.views(0x1FFE, 4)] == [b"ab", b"cd"]


@pytest.mark.parametrize(("addr", "length", "fill"), [(0x9000, 0x1000, 1), (0x57FF, 1, 2), (0, 16, 3)])
def test_user_view(memory: GuestMemory, addr: int, length: int, fill: int) -> None:
    assert bytes(memory.user_view(addr, length)) == bytes([fill]) * length


@pytest.mark.parametrize(
    ("addr", "length"), [(0x8FFF, 1), (0x9FFF, 2), (0x5800, 1), (0, 17), (TOP - 1, 1), (TOP - 8, 16), (0x1000, 1)]
)
def test_user_view_outside(memory: GuestMemory, addr: int, length: int) -> None:
    with pytest.raises(GuestMemoryError):
        memory.user_view(addr, length)


@pytest.mark.parametrize(
    "regions",
    [
        pytest.param([region(0, 0, 16), region(15, 100, 16)], id="guest overlap by one"),
        pytest.param([region(0, 0, 16), region(100, 15, 16)], id="user overlap by one"),
        pytest.param([region(0, 0, 16), region(0, 0, 16)], id="twice the same"),
        pytest.param([region(0, 0, 64), region(16, 100, 16)], id="inside"),
        pytest.param([region(TOP - 8, 0, 16)], id="past the end, guest"),
        pytest.param([region(0, TOP - 8, 16)], id="past the end, user"),
        pytest.param([region(0, 0, 0)], id="empty"),
        pytest.param([Region(0, 0, 16, memoryview(bytearray(15)))], id="mapped short"),
    ],
)
def test_impossible_tables(regions: list[Region]) -> None:
    with pytest.raises(GuestMemoryError):
        GuestMemory(regions)


def test_last_byte_of_64_bits() -> None:
    memory = GuestMemory([region(TOP - 16, TOP - 16, 16, 7)])
    assert bytes(memory.views(TOP - 1, 1)[0]) == b"\7"
    assert bytes(memory.user_view(TOP - 16, 16)) == b"\7" * 16


def test_no_memory_at_all() -> None:
    with pytest.raises(RingError):
        GuestMemory().views(0, 1)


@given(
    sizes=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=6),
    addr=st.integers(0, 400),
    length=st.integers(1, 200),
)
def test_against_a_model(sizes: list[tuple[int, int]], addr: int, length: int) -> None:
    """Regions with gaps in between: the views hold exactly the model's bytes, or there is an error."""
    model: dict[int, int] = {}
    regions: list[Region] = []
    at = 0
    for gap, size in sizes:
        at += gap
        data = bytearray((at + i) % 251 for i in range(size))
        model.update(enumerate(data, at))
        regions.append(Region(at, 1000 * len(regions), size, memoryview(data)))
        at += size
    memory = GuestMemory(regions)
    wanted = [model.get(addr + i) for i in range(length)]
    if None in wanted:
        with pytest.raises(GuestMemoryError):
            memory.views(addr, length)
    else:
        assert list(b"".join(memory.views(addr, length))) == wanted
