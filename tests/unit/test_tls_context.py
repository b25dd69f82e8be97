"""CTX_ADD bodies, good and bad; the context table."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest

from nicdev import abi
from nicdev.abi import Cipher, Direction, RxPersonality, Status, TlsVersion
from nicdev.errors import CommandError, TxDrop
from nicdev.stats import Counter
from nicdev.tls.context import ContextParams, params_from_ctx_add
from nicdev.tls.history import Happened
from nicdev.tls.rx import RxContext
from nicdev.tls.table import ContextTable
from nicdev.tls.tx import TxContext
from tests.support.tls_oracle import GCM_1_2, stream

V4 = bytes((10, 0, 0, 2)) + b"\xff" * 12
V6 = bytes(range(16))
GOOD = abi.CtxAdd(
    dir=Direction.TX,
    family=4,
    tls_version=TlsVersion.TLS_1_2,
    cipher=Cipher.AES_GCM_128,
    add_flags=0,
    rx_personality=RxPersonality.CORE_NEXT_HINT,
    start_seq=0xFFFFFFFF,
    key_len=16,
    iv_len=8,
    salt_len=4,
    rec_seq_len=8,
    rec_seq=bytes.fromhex("0102030405060708"),
    salt=b"salt",
    iv=b"iviviviv" + b"\xff" * 4,
    key=b"k" * 16 + b"\xff" * 16,
    local_port=443,
    remote_port=50000,
    local_addr=V4,
    remote_addr=bytes((10, 0, 0, 1)) + bytes(12),
)


def changed(add: abi.CtxAdd, field: str, value: int) -> abi.CtxAdd:
    return abi.CtxAdd(**{**add._asdict(), field: value})


def params(direction: Direction, local_port: int = 443) -> ContextParams:
    return params_from_ctx_add(GOOD._replace(dir=direction, local_port=local_port))


def test_good_command() -> None:
    p = params_from_ctx_add(GOOD)
    assert (p.direction, p.family, p.tls_version, p.cipher) == (
        Direction.TX,
        4,
        TlsVersion.TLS_1_2,
        Cipher.AES_GCM_128,
    )
    assert (p.start_seq, p.rec_seq, p.no_sync) == (0xFFFFFFFF, 0x0102030405060708, False)
    assert (bytes(p.salt), bytes(p.iv), bytes(p.key)) == (b"salt", b"iviviviv", b"k" * 16)
    assert all(isinstance(secret, bytearray) for secret in (p.salt, p.iv, p.key))
    assert p.local == (bytes((10, 0, 0, 2)), 443)
    assert p.remote == (bytes((10, 0, 0, 1)), 50000)


def test_ipv6_and_no_sync() -> None:
    p = params_from_ctx_add(GOOD._replace(family=6, local_addr=V6, remote_addr=V6[::-1], add_flags=1))
    assert p.local == (V6, 443)
    assert p.remote == (V6[::-1], 50000)
    assert p.no_sync


@pytest.mark.parametrize(
    ("version", "cipher", "key_len", "salt_len", "iv_len"),
    [
        (version, cipher, *lengths)
        for version in TlsVersion
        for cipher, lengths in (
            (Cipher.AES_GCM_128, (16, 4, 8)),
            (Cipher.AES_GCM_256, (32, 4, 8)),
            (Cipher.CHACHA20_POLY1305, (32, 0, 12)),
        )
    ],
)
def test_lengths_of_every_suite(version: int, cipher: int, key_len: int, salt_len: int, iv_len: int) -> None:
    good = GOOD._replace(tls_version=version, cipher=cipher, key_len=key_len, salt_len=salt_len, iv_len=iv_len)
    p = params_from_ctx_add(good)
    assert (len(p.key), len(p.salt), len(p.iv)) == (key_len, salt_len, iv_len)
    assert isinstance(TxContext(p), TxContext)
    for field, want in (("key_len", key_len), ("salt_len", salt_len), ("iv_len", iv_len), ("rec_seq_len", 8)):
        for wrong in {0, want - 1, want + 1, 16, 255, 65535} - {want}:
            with pytest.raises(CommandError) as caught:
                params_from_ctx_add(changed(good, field, wrong))
            assert caught.value.status is Status.BAD_REQUEST


@pytest.mark.parametrize(
    ("field", "value", "status"),
    [
        ("dir", 2, Status.BAD_REQUEST),
        ("family", 0, Status.BAD_REQUEST),
        ("family", 10, Status.BAD_REQUEST),
        ("add_flags", 2, Status.BAD_REQUEST),
        ("add_flags", 0x81, Status.BAD_REQUEST),
        ("local_port", 0, Status.BAD_REQUEST),
        ("remote_port", 0, Status.BAD_REQUEST),
        ("tls_version", 0x0302, Status.UNSUPPORTED),
        ("tls_version", 0, Status.UNSUPPORTED),
        ("cipher", 53, Status.UNSUPPORTED),
        ("cipher", 0, Status.UNSUPPORTED),
        ("rx_personality", 0, Status.UNSUPPORTED),
        ("rx_personality", 5, Status.UNSUPPORTED),
    ],
)
def test_bad_fields(field: str, value: int, status: Status) -> None:
    with pytest.raises(CommandError) as caught:
        params_from_ctx_add(changed(GOOD._replace(dir=Direction.RX), field, value))
    assert caught.value.status is status


@pytest.mark.parametrize("personality", RxPersonality)
def test_rx_personality_is_the_drivers_word(personality: RxPersonality) -> None:
    add = GOOD._replace(rx_personality=personality)
    assert params_from_ctx_add(add._replace(dir=Direction.RX)).rx_personality is personality
    params_from_ctx_add(add._replace(rx_personality=0))  # tx has no use for it


def test_secrets_do_not_show() -> None:
    shown = repr(params_from_ctx_add(GOOD))
    assert "salt" not in shown
    assert "iviv" not in shown
    assert "kkkk" not in shown


def refused(table: ContextTable, slot: int, p: ContextParams) -> Status:
    with pytest.raises(CommandError) as caught:
        table.add(slot, 1, p)
    assert not any(p.key)  # whoever is refused is wiped
    return caught.value.status


def test_table_finds_what_was_added() -> None:
    table = ContextTable(4)
    table.add(0, 7, params(Direction.TX))
    table.add(3, 8, params(Direction.RX))
    assert isinstance(table.get_tx(0, 7), TxContext)
    rx = table.get_rx(3, 8)
    assert isinstance(rx, RxContext)
    assert table.lookup_rx(b"\x0a\0\0\x02", 443, b"\x0a\0\0\x01", 50000) == (3, 8, rx)
    assert table.lookup_rx(b"\x0a\0\0\x01", 443, b"\x0a\0\0\x02", 50000) is None
    assert table.lookup_rx(b"\x0a\0\0\x02", 50000, b"\x0a\0\0\x01", 443) is None
    assert table.counts() == {Direction.TX: 1, Direction.RX: 1}
    assert [(slot, generation) for slot, generation, _ in table] == [(0, 7), (3, 8)]


def test_tx_handles() -> None:
    table = ContextTable(4)
    table.add(0, 7, params(Direction.TX))
    table.add(3, 8, params(Direction.RX))
    for slot, generation, counter in (
        (1, 7, Counter.TX_DROP_UNKNOWN_CONTEXT),
        (2**32 - 1, 7, Counter.TX_DROP_UNKNOWN_CONTEXT),
        (0, 8, Counter.TX_DROP_STALE_CONTEXT),
        (3, 7, Counter.TX_DROP_STALE_CONTEXT),
        (3, 8, Counter.TX_DROP_WRONG_DIRECTION),
    ):
        with pytest.raises(TxDrop) as caught:
            table.get_tx(slot, generation)
        assert caught.value.counter is counter


def test_rx_handles_and_delete() -> None:
    table = ContextTable(4)
    table.add(0, 7, params(Direction.TX))
    table.add(3, 8, params(Direction.RX))
    for slot, generation, status in (
        (1, 8, Status.STALE),
        (3, 7, Status.STALE),
        (0, 7, Status.BAD_REQUEST),
    ):
        with pytest.raises(CommandError) as caught:
            table.get_rx(slot, generation)
        assert caught.value.status is status
    with pytest.raises(CommandError) as caught:
        table.delete(3, 7)
    assert caught.value.status is Status.STALE
    assert len(table) == 2


@pytest.mark.conformance(7)
@pytest.mark.conformance(13)
def test_directions_are_independent_and_deleted_contexts_are_wiped() -> None:
    table = ContextTable(4)
    tx, rx = params(Direction.TX), params(Direction.RX)
    table.add(0, 1, tx)
    table.add(1, 1, rx)
    table.delete(0, 1)
    assert not any((*tx.key, *tx.salt, *tx.iv))
    assert any(rx.key)
    assert table.counts() == {Direction.TX: 0, Direction.RX: 1}
    table.delete(1, 1)
    assert not any((*rx.key, *rx.salt, *rx.iv))
    assert table.lookup_rx(b"\x0a\0\0\x02", 443, b"\x0a\0\0\x01", 50000) is None
    assert len(table) == 0


def test_a_slot_used_again_does_not_answer_to_its_old_generation() -> None:
    table = ContextTable(1)
    table.add(0, 1, params(Direction.TX))
    table.delete(0, 1)
    table.add(0, 2, params(Direction.TX))
    with pytest.raises(TxDrop) as caught:
        table.get_tx(0, 1)
    assert caught.value.counter is Counter.TX_DROP_STALE_CONTEXT


@pytest.mark.conformance(7)
@pytest.mark.conformance(8)
def test_refusals() -> None:
    table = ContextTable(3)
    table.add(0, 1, params(Direction.RX))
    assert refused(table, 3, params(Direction.TX)) is Status.BAD_REQUEST
    assert refused(table, 2**32 - 1, params(Direction.TX)) is Status.BAD_REQUEST
    assert refused(table, 0, params(Direction.TX)) is Status.EXISTS
    assert refused(table, 1, params(Direction.RX)) is Status.EXISTS  # the same flow
    table.add(1, 1, params(Direction.RX, local_port=444))
    table.add(2, 1, params(Direction.TX))
    assert refused(table, 2, params(Direction.TX)) is Status.TABLE_FULL
    assert refused(table, 3, params(Direction.TX)) is Status.BAD_REQUEST
    assert len(table) == 3


def test_clear_wipes_everything() -> None:
    table = ContextTable(8)
    all_params = [params(Direction.TX), params(Direction.RX), params(Direction.RX, local_port=444)]
    for slot, p in enumerate(all_params):
        table.add(slot, 1, p)
    context = table.get_rx(1, 1)
    assert table.clear() == 3
    assert not any(any(p.key) for p in all_params)
    assert len(table) == 0
    assert table.counts() == {Direction.TX: 0, Direction.RX: 0}
    assert not context.decrypt(0xFFFFFFFF, memoryview(bytearray(20))).decrypted
    assert table.clear() == 0


def test_no_plaintext_stays_after_clear() -> None:
    """The scratch memory is the table's, and holds the plaintext of the last packets."""
    records = stream(GCM_1_2, [100])
    table = ContextTable(1)
    table.add(0, 1, GCM_1_2.params(Direction.RX, 0, 5))
    assert table.get_rx(0, 1).decrypt(0, memoryview(bytearray(records.wire))).decrypted
    assert any(table.scratch.text)
    table.clear()
    assert not any(table.scratch.text)


def test_a_context_is_wiped_whether_it_was_ever_used_or_not() -> None:
    table = ContextTable(4)
    all_params = [
        params(Direction.TX),
        params(Direction.TX),
        params(Direction.RX),
        params(Direction.RX, local_port=444),
    ]
    for slot, p in enumerate(all_params):
        table.add(slot, 1, p)
    tx, rx = table.get_tx(0, 1), table.get_rx(2, 1)
    for slot in range(4):
        table.delete(slot, 1)
    assert not any(any((*p.key, *p.salt, *p.iv)) for p in all_params)
    with pytest.raises(TxDrop):
        tx.encrypt(0xFFFFFFFF, memoryview(bytearray(40)))
    assert not rx.decrypt(0xFFFFFFFF, memoryview(bytearray(40))).decrypted


def test_a_context_is_the_same_whoever_asks_first() -> None:
    flow = (b"\x0a\0\0\x02", 443, b"\x0a\0\0\x01", 50000)
    for first in range(3):
        table = ContextTable(2)
        table.add(0, 7, params(Direction.TX))
        table.add(1, 8, params(Direction.RX))
        ways: list[Callable[[ContextTable], object]] = [
            lambda table: getattr(table.lookup_rx(*flow), "context", None),
            lambda table: table.get_rx(1, 8),
            lambda table: next(context for slot, _, context in table if slot == 1),
        ]
        contexts = [way(table) for way in ways[first:] + ways[:first]]
        assert isinstance(contexts[0], RxContext)
        assert contexts == [contexts[0]] * 3


def test_history_counts_from_the_command_not_from_the_first_packet() -> None:
    now = [10.0]
    table = ContextTable(2, lambda: now[0])
    table.add(0, 1, GCM_1_2.params(Direction.RX, 100, 0))
    table.add(1, 1, GCM_1_2.params(Direction.TX, 100, 0, no_sync=True))
    now[0] = 12.5
    table.get_rx(0, 1).decrypt(200, memoryview(bytearray(10)))  # 100 bytes are missing
    first, (lost,) = table.get_rx(0, 1).history.events[0], table.get_tx(1, 1).history.events
    assert (first.what, first.at) == (Happened.GAP, 2.5)
    assert (lost.what, lost.at) == (Happened.LOST, 0.0)


@pytest.mark.parametrize(
    ("direction", "personality"),
    [(Direction.TX, RxPersonality.IDEAL), *((Direction.RX, personality) for personality in RxPersonality)],
)
def test_memory_of_contexts_that_wait_for_their_first_packet(direction: Direction, personality: RxPersonality) -> None:
    """Python's; the library has none before the first packet."""
    count = 1000
    table = ContextTable(count)
    bodies = [
        GOOD._replace(dir=direction, rx_personality=personality, local_port=port, start_seq=port << 16)
        for port in range(1000, 1000 + count)
    ]
    tracemalloc.start()
    for slot, body in enumerate(bodies):
        table.add(slot, 1000 + slot, params_from_ctx_add(body))
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size / count < 1536
