"""CTX_ADD without room for a reply: when it is offered, that it is taken, and how the driver hears that it was not."""

from __future__ import annotations

import pytest

from nicdev import abi
from nicdev.faults.director import Director
from nicdev.faults.parse import parse
from nicdev.nic import Nic, Packet
from nicdev.queues import QueuePair
from nicdev.stats import Counter
from tests.support.nic_chains import (
    KEY,
    add,
    command,
    ctx_add,
    hello,
    make_nic,
    marked,
    messages,
    record,
    reply,
    segment,
    sent,
)
from tests.support.rings import DATA, make

TX, RX = abi.Direction.TX, abi.Direction.RX
CTX_ADD = abi.Opcode.CTX_ADD
REFUSE = '[[rule]]\naction = "refuse-add"\ndirection = "tx"\ncount = "all"\n'


def caps(nic: Nic) -> int:
    """As the device tells them."""
    nic.transmit(0, hello())
    return abi.HelloReply._make(abi.HELLO_REPLY.unpack(messages(nic, abi.ExtType.HELLO_REPLY)[0])).caps


def refuse(nic: Nic, scenario: str = REFUSE) -> None:
    nic.control.faults = Director(parse(scenario, "t"), nic.table, nic.stats, float).device


def events(nic: Nic) -> list[tuple[int, int, int, int]]:
    """Code, slot, generation and reason of those that wait."""
    found = [abi.Event._make(abi.EVENT.unpack(message)) for message in messages(nic, abi.ExtType.EVENT)]
    return [(event.code, event.slot, event.generation, event.reason) for event in found]


@pytest.mark.parametrize(
    ("scenario", "offered"),
    [
        (REFUSE, False),
        (REFUSE.replace("tx", "rx").replace('"all"', "1"), False),
        ('[[rule]]\naction = "desync"\ndirection = "tx"\nrecord = 3\n', True),
        ("[tx]\ndrop = 0.1\n", True),
    ],
)
def test_offered_while_no_rule_refuses_contexts(scenario: str, offered: bool) -> None:
    nic = make_nic()
    assert caps(nic) == abi.Cap.TX | abi.Cap.RX | abi.Cap.POSTED_ADD
    refuse(nic, scenario)
    assert bool(caps(nic) & abi.Cap.POSTED_ADD) is offered


def test_not_offered_by_a_plain_nic() -> None:
    assert caps(make_nic(caps=abi.Cap(0))) == 0


def test_a_posted_context_is_there_for_the_packet_behind_it() -> None:
    """Both in one burst of a ring; nothing is said about it."""
    nic = make_nic()
    pair = QueuePair(0, nic)
    queue, pair.tx = make(8)
    frames: list[Packet] = []

    def send(packet: Packet) -> bool:
        frames.append(packet)
        return True

    at = DATA
    for chain in (command(CTX_ADD, 0, 1, ctx_add(TX)), marked(segment(record(b"first")))):
        queue.ram[at : at + len(chain)] = chain
        queue.add([(at, len(chain))], [])
        at += len(chain)
    queue.publish()
    pair.drain_tx(send)
    assert [bytes(packet.frame[54:]) for packet in frames] == [record(b"first", sealed=True)]
    assert [written for _, written in queue.collect()] == [0, 0]
    assert not pair.urgent  # nobody waits for it
    assert messages(nic, abi.ExtType.EVENT) == []
    assert nic.stats[Counter.CMD_OK] == nic.stats[Counter.CTX_TX_ADDED] == 1


def refused(nic: Nic, chain: bytearray) -> list[tuple[int, int, int, int]]:
    """Post it, in vain; the events."""
    before = nic.stats[Counter.CMD_FAILED]
    assert sent(nic.transmit(0, chain, posted=True)) is None
    assert nic.stats[Counter.CMD_FAILED] == before + 1
    return events(nic)


@pytest.mark.parametrize(
    ("chain", "why"),
    [
        (command(CTX_ADD, 0, 5, ctx_add(TX)), abi.Status.EXISTS),
        (command(CTX_ADD, 8, 5, ctx_add(TX)), abi.Status.BAD_REQUEST),
        (command(CTX_ADD, 1, 5, ctx_add(TX, key_len=15)), abi.Status.BAD_REQUEST),
        (command(CTX_ADD, 1, 5, ctx_add(TX)[:-1]), abi.Status.BAD_REQUEST),
        (command(CTX_ADD, 1, 5, ctx_add(RX, rx_personality=77)), abi.Status.UNSUPPORTED),
    ],
)
def test_a_posted_context_that_is_refused_is_told_by_an_event(chain: bytearray, why: abi.Status) -> None:
    nic = make_nic()
    add(nic, TX)
    _, _, _, slot, generation = abi.COMMAND.unpack_from(chain, 12)
    posted = bytearray(chain)
    assert refused(nic, posted) == [(abi.EventCode.ADD_REFUSED, slot, generation, why)]
    assert len(nic.table) == nic.stats[Counter.CTX_TX_ADDED] == 1


def test_a_full_table_and_no_key_left_behind() -> None:
    nic = make_nic()
    for slot in range(8):
        add(nic, TX, slot)
    chain = command(CTX_ADD, 7, 3, ctx_add(RX))
    assert KEY in chain
    assert refused(nic, chain) == [(abi.EventCode.ADD_REFUSED, 7, 3, abi.Status.TABLE_FULL)]
    assert KEY not in chain


def test_no_key_is_left_behind_by_a_command_of_a_wrong_length() -> None:
    nic = make_nic()
    add(nic, TX)
    for chain in (
        command(CTX_ADD, 1, 5, ctx_add(TX)[:-1]),
        command(CTX_ADD, 1, 5, ctx_add(TX) + bytes(1)),
        command(CTX_ADD, 1, 5, ctx_add(TX), lie=4),
        command(99, 1, 5, ctx_add(TX)),
    ):
        assert KEY in chain
        assert reply(nic.transmit(0, chain))
        assert KEY not in chain


@pytest.mark.conformance(85)
def test_nothing_leaves_in_clear_behind_a_refused_context() -> None:
    nic = make_nic()
    add(nic, TX, generation=1)
    refused(nic, command(CTX_ADD, 0, 2, ctx_add(TX)))
    assert sent(nic.transmit(0, marked(segment(record(b"secret")), generation=2), posted=True)) is None
    assert [event[0] for event in events(nic)] == [abi.EventCode.ADD_REFUSED, abi.EventCode.UNKNOWN_CONTEXT]


def test_of_other_commands_nobody_hears() -> None:
    nic = make_nic()
    for chain in (command(abi.Opcode.CTX_DEL, 3, 1), command(99), command(CTX_ADD)[:20]):
        assert refused(nic, chain) == []
    add(nic, TX)
    assert nic.transmit(0, command(abi.Opcode.CTX_DEL), posted=True)
    assert events(nic) == []


@pytest.mark.conformance(8)
def test_a_rule_refuses_only_who_waits_for_a_reply() -> None:
    """What is posted was opened before the driver heard of the rule."""
    nic = make_nic()
    refuse(nic)
    nic.transmit(0, command(CTX_ADD, 0, 1, ctx_add(TX)), posted=True)
    assert nic.stats[Counter.CTX_TX_ADDED] == 1
    nic.transmit(0, command(CTX_ADD, 1, 1, ctx_add(TX)))
    assert nic.stats[Counter.FAULT_ADDS_REFUSED] == nic.stats[Counter.CTX_REFUSED] == 1
    assert events(nic) == []


def test_the_driver_has_heard_when_it_says_hello() -> None:
    nic = make_nic()
    assert nic.heard  # nobody is there
    nic.transmit(0, hello())
    nic.event(abi.EventCode.TX_DROPPED)
    assert nic.heard
    for how in (lambda: nic.transmit(0, hello()), nic.reset):
        nic.event(abi.EventCode.CONFIG_CHANGED)
        assert not nic.heard
        how()
        assert nic.heard


def test_a_driver_that_was_only_paused_has_not_heard_yet() -> None:
    nic = make_nic()
    nic.transmit(0, hello())
    nic.reset()
    assert nic.heard  # nobody is there
    nic.resumed()
    assert not nic.heard
    nic.event(abi.EventCode.CONFIG_CHANGED)  # for another reason
    assert not nic.heard
    nic.transmit(0, hello())
    assert nic.heard
