"""How soon a device does all of the work again when loss has stopped: records, for every personality and cipher.

A connection per cipher moves data, the first of it under loss; there is no pause where the loss stops. rx: 5 % of
wire-size segments are lost between port and engine, also of those sent again, and in the end the header of the last
record, so that every personality has just lost its place. tx: netem in the guest loses 5 % of the segments, which are
gaps to the driver, until the last lossy record has arrived. Counted are the records that follow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from bench.goals import CIPHERS, RX_PERSONALITIES, TX_PERSONALITIES, flat
from bench.guest import CUBIC, RECORD, WatchedBed, first_record, recovered_after, transfer, watched
from bench.registry import Group, Measured, Session, interleaved
from tests.guest.exchange import (
    EOF,
    RECORD_OVERHEAD,
    SHUTDOWN,
    WAIT,
    Case,
    Running,
    disturbed,
    netem,
    recv,
    rx_case,
    rx_personality,
    send,
    tx_personality,
)

SEED = 7
LOSS = """
seed = {seed}
[rx]
segments = "wire"
[[rule]]
name = "loss"
action = "drop"
direction = "rx"
seq = [0, {end}]
retransmissions = true
rate = 0.05
"""
LAST_HEADER = """
[[rule]]
name = "last header of flow {flow}"
action = "drop"
direction = "rx"
flow = {flow}
record = {record}
part = "header"
"""


def rx(session: Session, guest: WatchedBed, personality: str, number: int) -> dict[str, int]:
    """Records until recovery, by cipher."""
    lossy, after = session.scaled(128, 8), session.scaled(768, 128)
    size = (lossy + after) * RECORD
    cases = [
        rx_case(
            f"{personality} {number} {cipher}",
            send(size),
            size=size,
            cipher=cipher,
            rec_seq=first_record(index),
            peer_job=CUBIC,
        )
        for index, cipher in enumerate(CIPHERS)
    ]
    scenario = LOSS.format(seed=SEED + number, end=lossy * (RECORD + RECORD_OVERHEAD))
    scenario += "".join(LAST_HEADER.format(flow=flow, record=lossy - 1) for flow in (1, 2))
    with rx_personality(guest.bed, personality), guest.bed.nic.faults(scenario):
        found = transfer(guest, cases)
        struck = guest.bed.nic.fault_rules()
    if not all(struck.values()):
        raise AssertionError(f"not everything that was to be lost was lost: {struck}")
    result = {case.cipher: recovered_after(found.rx_records(case)[lossy:]) for case in cases}
    session.say(f"  round {number + 1}, rx {personality}: {result}")
    return result


def tx(session: Session, guest: WatchedBed, personality: str, number: int) -> dict[str, int]:
    """Records until recovery, by cipher."""
    lossy, after = session.scaled(128, 8), session.scaled(768, 128)
    cases = [
        Case(
            f"{personality} {number} {cipher}",
            [WAIT, send((lossy + after) * RECORD, write=RECORD), SHUTDOWN],
            [recv(lossy * RECORD), WAIT, recv(after * RECORD), EOF],
            dirs=("tx",),
            cipher=cipher,
            rec_seq=first_record(index),
        )
        for index, cipher in enumerate(CIPHERS)
    ]

    def lose_for_a_while(running: Running) -> None:
        running.guest_waits()
        with disturbed(guest.bed, netem("loss 5%")):
            running.go_on()
            for peer in running.peers:
                peer.await_waiting()
        for peer in running.peers:
            peer.release()

    with tx_personality(guest.bed, personality):
        found = transfer(guest, cases, lose_for_a_while)
    result = {case.cipher: recovered_after(found.by_device(case, "tx")[lossy:]) for case in cases}
    session.say(f"  round {number + 1}, tx {personality}: {result}")
    return result


def measure(session: Session) -> Iterator[Measured]:
    """One figure per direction, personality and cipher."""
    guest = session.guest(watched)
    arms: dict[str, Callable[[int], dict[str, int]]] = {
        **{flat("rx_recovery_records", name): partial(rx, session, guest, name) for name in RX_PERSONALITIES},
        **{flat("tx_recovery_records", name): partial(tx, session, guest, name) for name in TX_PERSONALITIES},
    }
    for name, results in interleaved(arms, session.rounds(3)).items():
        for cipher in CIPHERS:
            yield Measured(flat(name, cipher), "records", [result[cipher] for result in results])


GROUP = Group("recovery", "guest", "records until the device does everything again after loss", measure)
