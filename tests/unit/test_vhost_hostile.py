"""A front end that breaks the rules: refused, counted, nothing leaked, and the next lawful one is served.

About 1,100 generated messages, each sent both with and without REPLY_ACK; the bug classes are those that other
back-ends had to fix: sizes, fd counts, indexes that fit only when truncated, sums that overflow 64 bits, repeats,
and every order.
"""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Iterator

import pytest

from nicdev.errors import ProtocolError, RingError
from nicdev.stats import Counter
from nicdev.vhost import message
from nicdev.vhost.message import Header
from tests.support.fake_host import FILE_SIZE
from tests.support.vhost_session import (
    ADD_REG,
    ALL_PROTOCOL,
    CALL,
    ENABLE,
    ERR,
    GET_BASE,
    GET_FEATURES,
    GET_PROTOCOL,
    GET_STATUS,
    KICK,
    MTU,
    P_REPLY_ACK,
    P_SLOTS,
    P_STATUS,
    PAIRS,
    QUESTIONS,
    QUEUE_NUM,
    REM_REG,
    RESET_DEVICE,
    RESET_OWNER,
    SET_FEATURES,
    SET_MEM_TABLE,
    SET_OWNER,
    SET_PROTOCOL,
    SET_STATUS,
    SLOTS,
    USER,
    USUAL,
    VRING_ADDR,
    VRING_BASE,
    VRING_NUM,
    Session,
    region,
    state,
    table,
    u64,
)

NOT_THERE = 2 * PAIRS  # the first vring index that does not exist
ADDRESS = struct.pack("=IIQQQQ", 1, 0, USER, USER + 0x2000, USER + 0x1000, 0)
# Every request with a payload that is good once everything is negotiated, and the fds it must bring.
GOOD: dict[int, tuple[bytes, int]] = {
    GET_FEATURES: (b"", 0),
    SET_FEATURES: (u64(USUAL), 0),
    SET_OWNER: (b"", 0),
    RESET_OWNER: (b"", 0),
    SET_MEM_TABLE: (table(region()), 1),
    VRING_NUM: (state(1, 16), 0),
    VRING_ADDR: (ADDRESS, 0),
    VRING_BASE: (state(1, 0), 0),
    GET_BASE: (state(1, 0), 0),
    KICK: (u64(1), 1),
    CALL: (u64(1), 1),
    ERR: (u64(1), 1),
    GET_PROTOCOL: (b"", 0),
    SET_PROTOCOL: (u64(ALL_PROTOCOL), 0),
    QUEUE_NUM: (b"", 0),
    ENABLE: (state(1, 1), 0),
    MTU: (u64(1500), 0),
    RESET_DEVICE: (b"", 0),
    SLOTS: (b"", 0),
    ADD_REG: (u64(0) + region(1 << 40, 4096, 4096), 1),
    REM_REG: (u64(0) + region(), 0),
    SET_STATUS: (u64(1), 0),
    GET_STATUS: (b"", 0),
}
INDEXED_BY_STATE = (VRING_NUM, VRING_BASE, GET_BASE, ENABLE)
INDEXED_BY_FILE = (KICK, CALL, ERR)
EDGES = (0, 1, 4095, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1)


@pytest.fixture(params=[ALL_PROTOCOL, ALL_PROTOCOL & ~P_REPLY_ACK], ids=["ack", "no ack"])
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    session = Session()
    session.negotiate(protocol=request.param)
    yield session
    session.close()


def test_the_good_ones_are_good(session: Session) -> None:
    for request, (payload, fds) in GOOD.items():
        assert not session.refused(request, payload, fds), request


@pytest.mark.parametrize("request_", GOOD)
def test_wrong_payload_size(session: Session, request_: int) -> None:
    payload, fds = GOOD[request_]
    sizes = {0, 1, 7, len(payload) - 1, len(payload) + 1, len(payload) + 8, 2 * len(payload), 272, 4096} - {
        len(payload)
    }
    for size in sorted(size for size in sizes if size >= 0):
        assert session.refused(request_, (payload + bytes(4096))[:size], fds), size
    assert session.device.starts == 0
    assert session.device.mtu == []


@pytest.mark.parametrize("request_", GOOD)
def test_wrong_number_of_fds(session: Session, request_: int) -> None:
    payload, fds = GOOD[request_]
    allowed = {0, 1} if request_ == REM_REG else {fds}
    for count in {0, 1, 2, 3, 8, 32, 253} - allowed:
        assert session.refused(request_, payload, count), count
    assert session.host.open == set()


@pytest.mark.parametrize("bits", [0, 2, 3, 4 | 1])
@pytest.mark.parametrize("request_", GOOD)
def test_wrong_version_or_reply_bit(session: Session, request_: int, bits: int) -> None:
    assert session.refused(request_, *GOOD[request_], flags=bits)


@pytest.mark.parametrize("index", [NOT_THERE, 0x10000, 0x10001, 0xFF, 0x100, 0xFFFF, 0x8000_0001, 0xFFFF_FFFF])
def test_vring_index(session: Session, index: int) -> None:
    """Never truncated, never used before it was compared."""
    for request in INDEXED_BY_STATE:
        assert session.refused(request, state(index, 1))
    assert session.refused(VRING_ADDR, struct.pack("=I", index) + ADDRESS[4:])
    for request in INDEXED_BY_FILE:
        if index != 0x100:  # vring 0 without an fd, but with one
            assert session.refused(request, u64(index), 1)
        assert session.refused(request, u64(index | 1 << 9), 1)
        assert session.refused(request, u64(index | 1 << 63), 1)


@pytest.mark.parametrize("request_", INDEXED_BY_FILE)
def test_event_fd_and_its_flag_disagree(session: Session, request_: int) -> None:
    assert session.refused(request_, u64(1), 0)
    assert session.refused(request_, u64(1 | 1 << 8), 1)


def test_kick_without_an_fd_would_mean_polling(session: Session) -> None:
    assert session.refused(KICK, u64(1 | 1 << 8))


@pytest.mark.parametrize("request_", INDEXED_BY_FILE)
def test_fd_that_is_no_event(session: Session, request_: int) -> None:
    fd = session.host.new_fd()
    session.host.bad_events.add(fd)
    header = Header(request_, 9, 8)
    try:
        assert session.backend.handle(header, u64(1), [fd])[12:] == u64(1)
    except ProtocolError:
        assert not session.ack
    assert session.host.open == set()


@pytest.mark.parametrize("num", [0, 3, 15, 17, 32769, 65535, 65536, 65536 + 16, 0xFFFF_FFFF])
def test_queue_size(session: Session, num: int) -> None:
    assert session.refused(VRING_NUM, state(1, num))


@pytest.mark.parametrize("base", [65536, 65537, 0xFFFF_FFFF])
def test_base(session: Session, base: int) -> None:
    assert session.refused(VRING_BASE, state(1, base))


@pytest.mark.parametrize("value", [2, 3, 256, 65536, 0x10001, 0xFFFF_FFFF])
def test_enable_with_something_else(session: Session, value: int) -> None:
    assert session.refused(ENABLE, state(1, value))


@pytest.mark.parametrize("status", [256, 1 << 32, (1 << 64) - 1])
def test_status(session: Session, status: int) -> None:
    assert session.refused(SET_STATUS, u64(status))


@pytest.mark.parametrize("bit", [b for b in range(64) if not USUAL & 1 << b])
def test_feature_that_was_not_offered(session: Session, bit: int) -> None:
    (offered,) = struct.unpack("=Q", session.send(GET_FEATURES))
    assert session.refused(SET_FEATURES, u64(USUAL | 1 << bit)) is not bool(offered & 1 << bit)


@pytest.mark.parametrize("bit", [b for b in range(64) if not ALL_PROTOCOL & 1 << b])
def test_protocol_feature_that_was_not_offered(session: Session, bit: int) -> None:
    assert session.refused(SET_PROTOCOL, u64(ALL_PROTOCOL | 1 << bit))


@pytest.mark.parametrize("size", EDGES)
@pytest.mark.parametrize("request_", [SET_MEM_TABLE, ADD_REG])
def test_region_arithmetic(session: Session, request_: int, size: int) -> None:
    """Every pair of edge values: accepted only where the region lies in its file and in 64 bits."""
    assert not session.refused(REM_REG, u64(0) + region())
    for other in EDGES:
        for where, payload in (
            ("offset", region(0, size, 0, other)),
            ("guest", region(other, size, 0, 0)),
            ("user", region(0, size, other, 0)),
        ):
            in_file = size + (other if where == "offset" else 0) <= FILE_SIZE
            good = size > 0 and in_file and other + size <= 1 << 64
            whole = table(payload) if request_ == SET_MEM_TABLE else u64(0) + payload
            assert session.refused(request_, whole, 1) is not good, (where, other)
            if good:
                assert not session.refused(REM_REG, u64(0) + payload)
    assert session.host.mapped == []


@pytest.mark.parametrize("count", [2, 8, 9, 255, 65536, 65537, 0xFFFF_FFFF])
def test_number_of_regions_lies(session: Session, count: int) -> None:
    assert session.refused(SET_MEM_TABLE, struct.pack("=II", count, 0) + region(), min(count, 8))


def test_overlapping_regions(session: Session) -> None:
    for second in (region(FILE_SIZE - 1, 4096, 0), region(1 << 40, 4096, USER + FILE_SIZE - 1)):
        assert session.refused(ADD_REG, u64(0) + second, 1)
    assert len(session.host.mapped) == 1


def test_repeated_region_is_counted(session: Session) -> None:
    """QEMU 7.2 adds and removes every region once per queue pair."""
    assert not session.refused(ADD_REG, u64(0) + region(), 1)
    assert len(session.host.mapped) == 1
    assert not session.refused(REM_REG, u64(0) + region())
    assert len(session.host.mapped) == 1
    assert not session.refused(REM_REG, u64(0) + region())
    assert session.host.mapped == []
    assert session.refused(REM_REG, u64(0) + region())


@pytest.mark.parametrize(
    ("descriptor", "available", "used"),
    [
        (USER + 8, USER + 0x1000, USER + 0x2000),
        (USER, USER + 0x1001, USER + 0x2000),
        (USER, USER + 0x1000, USER + 0x2002),
        (USER + FILE_SIZE, USER + 0x1000, USER + 0x2000),
        (USER + FILE_SIZE - 16, USER + 0x1000, USER + 0x2000),
        (USER, USER + FILE_SIZE - 4, USER + 0x2000),
        (USER, USER + 0x1000, USER + FILE_SIZE - 4),
        (0, 0x1000, 0x2000),
        ((1 << 64) - 16, USER + 0x1000, USER + 0x2000),
        (USER, (1 << 64) - 2, USER + 0x2000),
        (USER, USER + 0x1000, (1 << 64) - 4),
    ],
)
def test_ring_addresses(session: Session, descriptor: int, available: int, used: int) -> None:
    """Refused at once, or when the ring would start; then forgotten, so that nothing starts by and by."""
    for request in (VRING_NUM, KICK, ENABLE):
        assert not session.refused(request, *GOOD[request])
    assert session.refused(VRING_ADDR, struct.pack("=IIQQQQ", 1, 0, descriptor, used, available, 0))
    assert not session.refused(CALL, u64(1), 1)
    assert session.device.starts == 0
    assert not session.refused(VRING_ADDR, ADDRESS)
    assert session.device.starts == 1


def test_reconfigured_while_running(session: Session) -> None:
    session.start(1, session.queue(1))
    ring = session.device.rings[1]
    for request, payload in (
        (VRING_NUM, state(1, 32)),
        (VRING_BASE, state(1, 4)),
        (SET_FEATURES, u64(USUAL & ~(1 << 29))),
    ):
        assert session.refused(request, payload)
    assert session.device.rings[1] is ring
    assert session.device.resets == []


@pytest.mark.parametrize("request_", [r for r in range(70) if r not in GOOD] + [255, 65536 + 5, 0xFFFF_FFFF])
def test_unknown_request(session: Session, request_: int) -> None:
    """Wanted an answer: refused. Else ignored; its fds are closed either way."""
    assert session.refused(request_, bytes(100), 3) is session.ack
    assert session.stats[Counter.VHOST_UNKNOWN_MESSAGES] == 1
    assert session.host.open == set()


@pytest.mark.parametrize("request_", [SLOTS, ADD_REG, REM_REG, SET_STATUS, GET_STATUS])
def test_not_negotiated(request_: int) -> None:
    session = Session()
    session.negotiate(protocol=ALL_PROTOCOL & ~(P_SLOTS | P_STATUS))
    assert session.refused(request_, *GOOD[request_])
    session.close()


@pytest.mark.parametrize("request_", QUESTIONS)
def test_a_bad_question_is_never_acknowledged(request_: int) -> None:
    """Its answer has another shape than an ack; the front end would take the one for the other."""
    session = Session()
    session.negotiate()
    with pytest.raises(ProtocolError):
        session.send(request_, bytes(3))
    session.close()


@pytest.mark.parametrize("request_", GOOD)
def test_first_message_of_all(request_: int) -> None:
    """Before features, owner or memory: refused or harmless."""
    session = Session()
    session.refused(request_, *GOOD[request_])
    assert session.device.starts == 0
    session.close()


@pytest.mark.parametrize("request_", GOOD)
def test_a_thousand_times(session: Session, request_: int) -> None:
    session.start(0, session.queue(0))
    payload, fds = GOOD[request_]
    most_open, most_mapped = len(session.host.open) + 2, len(session.host.mapped) + 1
    for _ in range(1000):
        session.refused(request_, payload, fds)
        assert len(session.host.open) <= most_open
        assert len(session.host.mapped) <= most_mapped


@pytest.mark.parametrize("seed", range(40))
def test_any_order(seed: int) -> None:
    """Good and damaged messages in any order: only ProtocolError comes out; FakeHost and FakeDevice keep the books."""
    rng = random.Random(seed)
    session = Session()
    if seed % 2:
        session.negotiate()
    for _ in range(400):
        request = rng.choice(list(GOOD))
        payload, fds = GOOD[request]
        if rng.random() < 0.5 and len(payload) >= 4:
            payload = struct.pack("=I", rng.randint(0, NOT_THERE)) + payload[4:]
        if rng.random() < 0.3 and payload:
            at = rng.randrange(len(payload))
            payload = payload[:at] + bytes([rng.choice((0, 1, 0x10, 0xFF))]) + payload[at + 1 :]
        if rng.random() < 0.1:
            fds = rng.randint(0, 3)
        session.refused(request, payload, fds)
        for ring in session.device.rings.values():
            with contextlib.suppress(RingError):  # a base that the empty ring contradicts
                assert ring.pop() is None
    session.close()


@pytest.mark.parametrize("size", [0, 11, 13, 24])
def test_header_is_12_bytes(size: int) -> None:
    with pytest.raises(struct.error):
        message.decode_header(bytes(size))


@pytest.mark.parametrize("pairs", [0, -1, 129])
def test_number_of_queue_pairs(pairs: int) -> None:
    session = Session()
    with pytest.raises(ValueError, match="queue pairs"):
        type(session.backend)(session.host, session.device, session.stats, queue_pairs=pairs)
    session.close()
