"""The negotiation, message by message, with fds that are integers. Numbers are those of the vhost-user document."""

from __future__ import annotations

import itertools
import struct

import pytest

from nicdev.errors import RingError
from nicdev.stats import Counter
from tests.support.vhost_session import (
    ALL_PROTOCOL,
    CALL,
    ENABLE,
    ERR,
    F_MQ,
    F_PROTOCOL,
    F_VERSION_1,
    GET_BASE,
    GET_FEATURES,
    GET_PROTOCOL,
    GET_STATUS,
    KICK,
    MTU,
    PAIRS,
    QUEUE_NUM,
    RESET_DEVICE,
    RESET_OWNER,
    SET_FEATURES,
    SET_OWNER,
    SET_STATUS,
    SLOTS,
    USUAL,
    VRING_ADDR,
    VRING_BASE,
    VRING_NUM,
    Session,
    state,
    u64,
)

# -- questions -----------------------------------------------------------------------------------------------------


def test_answers(session: Session) -> None:
    session.negotiate()
    (features,) = struct.unpack("=Q", session.send(GET_FEATURES))
    assert features & USUAL == USUAL
    for absent in (5, 16, 17, 21, 26, 33, 34, 40):  # MAC, STATUS, CTRL_VQ, ANNOUNCE, LOG_ALL, IOMMU, PACKED, RESET
        assert not features & 1 << absent
    assert session.send(GET_PROTOCOL) == u64(ALL_PROTOCOL)
    assert session.send(QUEUE_NUM) == u64(PAIRS), "in queue pairs"
    assert session.send(SLOTS) == u64(509)
    assert session.send(GET_STATUS) == u64(0)
    assert session.send(GET_BASE, state(3, 0)) == state(3, 0), "of a vring that was never set up"


def test_questions_before_anything_else(session: Session) -> None:
    """QEMU asks before SET_OWNER, and GET_QUEUE_NUM needs only that MQ is offered."""
    for request in (GET_FEATURES, GET_PROTOCOL, QUEUE_NUM):
        assert len(session.send(request)) == 8
    assert session.send(SET_OWNER) == b""


# -- queues --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations((VRING_NUM, VRING_ADDR, KICK, ENABLE))))
def test_runs_as_soon_as_it_can_in_any_order(session: Session, order: tuple[int, ...]) -> None:
    session.negotiate()
    queue = session.queue(1, start=7)
    messages = {
        VRING_NUM: (state(1, 16), 0),
        VRING_ADDR: (session.address(1, queue), 0),
        KICK: (u64(1), 1),
        ENABLE: (state(1, 1), 0),
    }
    session.send(VRING_BASE, state(1, 7))
    for request in order:
        assert session.device.rings == {}
        assert not session.refused(request, *messages[request])
    assert list(session.device.rings) == [1]
    assert session.device.rings[1].base == 7
    assert session.stop(1) == 7


def test_all_queues_of_two_pairs(session: Session) -> None:
    """Pair by pair, with SET_FEATURES repeated while the first runs, as QEMU does."""
    session.negotiate(USUAL | F_MQ)
    queues = [session.queue(i) for i in range(4)]
    for pair in range(2):
        assert not session.refused(SET_FEATURES, u64(USUAL | F_MQ))
        for i in (2 * pair, 2 * pair + 1):
            session.start(i, queues[i])
    assert sorted(session.device.rings) == [0, 1, 2, 3]
    assert session.device.features == [(USUAL | F_MQ) & ~F_PROTOCOL]
    for i, queue in enumerate(queues):
        queue.add([(0x40000, 5)], [])
        queue.publish()
        chain = session.device.rings[i].pop()
        assert chain is not None
        session.device.rings[i].push(chain[0], 0)
        session.device.rings[i].publish()
        assert session.stop(i) == 1


def test_negotiated_ring_features_reach_the_ring(session: Session) -> None:
    session.negotiate(F_PROTOCOL | F_VERSION_1)
    queue = session.queue(1, event_idx=False)
    session.start(1, queue)
    queue.add([(0x40000, 5)], [], table_addr=0x50000)
    queue.publish()
    with pytest.raises(RingError):
        session.device.rings[1].pop()


def test_enabled_without_a_message_when_there_is_none(session: Session) -> None:
    session.negotiate(F_VERSION_1)
    queue = session.queue(0, event_idx=False)
    session.send(VRING_NUM, state(0, 16))
    session.send(VRING_ADDR, session.address(0, queue))
    session.send(KICK, u64(0), fds=1)
    assert list(session.device.rings) == [0]


def test_enabled_before_it_exists(session: Session) -> None:
    """QEMU enables queues when the driver accepts MQ, long before DRIVER_OK, even before SET_FEATURES."""
    assert session.send(ENABLE, state(2, 1)) == b""
    session.negotiate()
    session.start(2, session.queue(2))
    assert list(session.device.rings) == [2]


def test_call_fd_replaced_while_running(session: Session) -> None:
    session.negotiate()
    session.start(0, session.queue(0))
    ring, (kick, call, _) = session.device.rings[0], session.device.fds[0]
    session.send(CALL, u64(0), fds=1)
    assert session.device.rings[0] is ring, "the same ring goes on"
    assert session.device.fds[0][0] == kick
    new = session.device.fds[0][1]
    assert new != call
    assert session.host.signals[-1] == new, "in case a signal was lost between the two"
    session.send(CALL, u64(0 | 1 << 8))
    assert session.device.fds[0][1] == -1, "no fd: the driver polls"
    session.send(ERR, u64(0), fds=1)
    assert session.device.fds[0][2] in session.host.open


def test_stopped_queue_needs_a_new_kick(session: Session) -> None:
    session.negotiate()
    queue = session.queue(1)
    session.start(1, queue)
    for _ in range(3):
        queue.add([(0x40000, 1)], [])
    queue.publish()
    session.device.rings[1].pop()
    assert session.stop(1) == 1
    assert session.device.rings == {}
    assert session.stop(1) == 1, "asked again, the same"
    session.send(ENABLE, state(1, 0))
    session.send(ENABLE, state(1, 1))
    session.send(CALL, u64(1), fds=1)
    assert session.device.rings == {}
    session.send(KICK, u64(1), fds=1)
    assert session.device.rings[1].base == 1


def test_disabled_tx_is_discarded_and_rx_left_alone(session: Session) -> None:
    session.negotiate()
    rx, tx = session.queue(0), session.queue(1)
    session.start(0, rx)
    session.start(1, tx)
    for queue, chain in ((rx, ([], [(0x40000, 64)])), (tx, ([(0x40000, 64)], []))):
        for _ in range(3):
            queue.add(*chain)
        queue.publish()
    tx.want_signal()
    before = len(session.host.signals)
    for index in (0, 1):
        session.send(ENABLE, state(index, 0))
    assert session.device.rings == {}
    assert [written for _, written in tx.collect()] == [0, 0, 0]
    assert len(session.host.signals) == before + 1
    assert session.stats[Counter.TX_DROP_QUEUE_DOWN] == 3
    tx.add([(0x40000, 64)], [])
    tx.publish()
    for index in (0, 1):
        session.send(ENABLE, state(index, 1))
    assert len(tx.collect()) == 1, "what came meanwhile is not sent later"
    assert session.device.rings[1].pop() is None
    assert rx.collect() == []
    assert session.device.rings[0].pop() is not None


def test_first_enable_discards_nothing(session: Session) -> None:
    """A VM that was paused goes on with the packets that were waiting."""
    session.negotiate()
    tx = session.queue(1)
    tx.add([(0x40000, 64)], [])
    tx.publish()
    session.start(1, tx)
    assert session.device.rings[1].pop() is not None


def test_broken_ring_needs_reset(session: Session) -> None:
    session.negotiate()
    queue = session.queue(1)
    session.start(1, queue)
    session.send(SET_STATUS, u64(0xF))
    queue.set_avail_idx(1000)
    with pytest.raises(RingError):
        session.device.rings[1].pop()
    assert session.send(GET_STATUS) == u64(0x4F)
    starts = session.device.starts
    session.send(CALL, u64(1), fds=1)
    session.send(ENABLE, state(1, 0))
    session.send(ENABLE, state(1, 1))
    assert session.device.starts == starts, "a broken ring does not come back by itself"
    session.send(SET_STATUS, u64(0))
    assert session.send(GET_STATUS) == u64(0)
    session.send(SET_FEATURES, u64(USUAL))
    session.start(1, session.queue(1))
    assert list(session.device.rings) == [1]


# -- driver instances ----------------------------------------------------------------------------------------------


def test_other_base_means_another_driver(session: Session) -> None:
    session.negotiate()
    for index in (0, 1):
        session.start(index, session.queue(index, start=5), base=5)
    assert [session.stop(0), session.stop(1)] == [5, 5]
    assert session.device.resets == []
    for index in (0, 1):
        session.start(index, session.queue(index, start=5), base=5)
    assert session.device.resets == [], "the same driver goes on"
    assert [session.stop(0), session.stop(1)] == [5, 5]
    for index in (0, 1):
        session.start(index, session.queue(index))
    assert session.device.resets == ["new driver"], "once for all queues"


@pytest.mark.parametrize(("request_", "payload"), [(SET_STATUS, u64(0)), (RESET_DEVICE, b"")])
def test_resets(session: Session, request_: int, payload: bytes) -> None:
    session.negotiate()
    session.send(SET_STATUS, u64(0xF))
    session.start(0, session.queue(0))
    session.start(1, session.queue(1))
    assert not session.refused(request_, payload)
    assert session.device.rings == {}
    assert len(session.device.resets) == 1
    assert session.device.features[-1] == 0
    assert session.send(GET_STATUS) == u64(0)
    assert len(session.host.mapped) == 1, "memory stays"
    session.send(SET_FEATURES, u64(USUAL))
    session.start(0, session.queue(0))
    assert len(session.device.resets) == 1
    assert list(session.device.rings) == [0]


@pytest.mark.parametrize("status_first", [True, False], ids=["QEMU 7.2", "QEMU 10"])
def test_pause_and_go_on(session: Session, status_first: bool) -> None:
    """Both reset the status when a VM is paused, one before it asks for the bases; the rings go on where they were."""
    session.negotiate()
    queue = session.queue(1)
    session.start(1, queue)
    queue.add([(0x40000, 1)], [])
    queue.add([(0x40000, 1)], [])
    queue.publish()
    ring = session.device.rings[1]
    chain = ring.pop()
    assert chain is not None
    ring.push(chain[0], 0)
    ring.publish()
    if status_first:
        session.send(SET_STATUS, u64(0))
        assert session.stop(1) == 1
    else:
        assert session.stop(1) == 1
        session.send(SET_STATUS, u64(0))
    session.send(SET_FEATURES, u64(USUAL))
    session.start(1, queue, base=1)
    assert session.device.resets == ["driver reset"]
    assert session.device.rings[1].pop() is not None
    assert session.device.rings[1].pop() is None


def test_reset_owner_is_ignored(session: Session) -> None:
    session.negotiate()
    session.start(0, session.queue(0))
    session.send(RESET_OWNER)
    assert list(session.device.rings) == [0]
    assert session.device.resets == []


def test_mtu(session: Session) -> None:
    session.negotiate()
    for mtu, good in (
        (0, False),
        (67, False),
        (68, True),
        (1500, True),
        (65535, True),
        (65536, False),
        (1 << 63, False),
    ):
        assert session.refused(MTU, u64(mtu)) is not good
    assert session.device.mtu == [68, 1500, 65535]
