"""The guest's memory as the front end hands it over, with fds that are integers: mapped, replaced, taken away."""

from __future__ import annotations

import pytest

from tests.support.fake_host import FILE_SIZE
from tests.support.vhost_session import ADD_REG, REM_REG, SET_MEM_TABLE, USER, Session, region, table, u64


def test_ring_follows_its_memory(session: Session) -> None:
    """SET_MEM_TABLE under a running ring: same addresses, other mapping, same place in the ring."""
    session.negotiate()
    queue = session.queue(1)
    session.start(1, queue)
    ring = session.device.rings[1]
    queue.add([(0x40000, 1)], [])
    queue.publish()
    ring.pop()
    assert not session.refused(SET_MEM_TABLE, table(region(), region(FILE_SIZE, 4096, USER - 4096)), fds=2)
    assert session.device.rings[1] is ring
    assert ring.base == 1
    assert len(session.host.mapped) == 2


@pytest.mark.parametrize("by_table", [True, False])
def test_ring_pauses_while_its_memory_is_gone(session: Session, by_table: bool) -> None:
    """QEMU replaces a region by removing and adding it, under running rings."""
    session.negotiate(memory=by_table)
    if not by_table:
        session.send(ADD_REG, u64(0) + region(), fds=1)
    queue = session.queue(1)
    session.start(1, queue)
    queue.add([(0x40000, 1)], [])
    queue.publish()
    chain = session.device.rings[1].pop()
    assert chain is not None
    session.device.rings[1].push(chain[0], 0)
    session.device.rings[1].publish()
    if by_table:
        assert not session.refused(SET_MEM_TABLE, table())
    else:
        assert not session.refused(REM_REG, u64(0) + region(offset=999))
    assert session.device.rings == {}
    assert session.host.mapped == []
    assert not session.refused(ADD_REG, u64(0) + region(), fds=1)
    assert session.device.rings[1].base == 1
    assert session.stop(1) == 1


@pytest.mark.parametrize(
    "payload", [region(guest=4096), region(user=USER + 4096), region(size=FILE_SIZE - 1), region(guest=1 << 63)]
)
def test_removing_what_is_not_there(session: Session, payload: bytes) -> None:
    session.negotiate()
    assert session.refused(REM_REG, u64(0) + payload)
    assert len(session.host.mapped) == 1


def test_removal_may_bring_an_fd(session: Session) -> None:
    session.negotiate()
    assert not session.refused(REM_REG, u64(0) + region(), fds=1)
    assert session.host.open == set()


def test_as_many_slots_as_promised(session: Session) -> None:
    session.negotiate(memory=False)
    for i in range(509):
        assert not session.refused(ADD_REG, u64(0) + region(4096 * i, 4096, USER + 4096 * i), fds=1)
    assert session.refused(ADD_REG, u64(0) + region(4096 * 509, 4096, USER + 4096 * 509), fds=1)
    assert len(session.host.mapped) == 509


def test_bad_table_leaves_the_old_one(session: Session) -> None:
    session.negotiate()
    session.start(1, session.queue(1))
    ring = session.device.rings[1]
    before = list(session.host.mapped)
    for bad, fds in (
        (table(region(), region()), 2),
        (table(region(), region(1 << 40, FILE_SIZE, 0, 1)), 2),
        (table(region()), 2),
        (table(region()), 0),
        (table(region(size=0)), 1),
    ):
        assert session.refused(SET_MEM_TABLE, bad, fds)
        assert session.host.mapped == before
        assert session.device.rings[1] is ring
