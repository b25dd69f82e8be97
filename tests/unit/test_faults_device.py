"""Faults inside the device: what the guest's driver is told when a scenario says so. Records are sealed by AESGCM."""

from __future__ import annotations

import pytest

from nicdev import abi
from nicdev.faults.device import Faults
from nicdev.faults.director import Director
from nicdev.faults.parse import parse
from nicdev.nic import Nic
from nicdev.stats import Counter
from tests.unit.test_nic import (
    NEEDS_CSUM,
    PLAIN,
    START,
    add,
    command,
    ctx_add,
    hello,
    make_nic,
    marked,
    messages,
    record,
    segment,
    status,
)

DECRYPTED, ASKS, ERROR = abi.RxTlsFlag.DECRYPTED, abi.RxTlsFlag.RESYNC_REQ, abi.RxTlsFlag.ERROR
TEXT = b"reply" * 20
SIZE = 13 + len(TEXT) + 16


class Bench:
    """A NIC with its driver, a scenario and a clock."""

    def __init__(self, scenario: str) -> None:
        self.now = 0.0
        self.nic = make_nic()
        self.nic.transmit(0, hello())
        self.director = Director(parse(scenario, "t"), self.nic.table, self.nic.stats, lambda: self.now)
        self.nic.table.observer = self.director.flows
        self.nic.control.faults = self.director.device

    def receive(self, number: int, wire: bytes = b"") -> tuple[abi.RxTls, bytes]:
        """The verdict on a packet with record `number` of the flow, and the payload handed over."""
        frame = segment(wire or record(TEXT, number, True), START + number * SIZE, outgoing=False)
        (parcel,) = self.director.feed(abi.Direction.RX, PLAIN, memoryview(bytearray(frame)), self.now)
        ((_, packet),) = self.nic.receive(memoryview(bytearray(parcel.header)), parcel.frame)
        ext = abi.RxTls._make(abi.RX_TLS.unpack(bytes(packet.header[12:])))
        return ext, bytes(packet.frame[54:])

    def flags(self, *numbers: int) -> list[int]:
        """RxTlsFlag bits of packets with these records."""
        return [self.receive(number)[0].flags for number in numbers]

    def answer(self, number: int) -> int:
        """RX_RESYNC for record `number`; its status."""
        body = abi.RX_RESYNC.pack(START + number * SIZE, number)
        return status(self.nic.transmit(0, command(abi.Opcode.RX_RESYNC, body=body)))


def rule(action: str, *lines: str) -> str:
    return "\n".join(("[[rule]]", f'action = "{action}"', *lines, ""))


def try_add(nic: Nic, direction: abi.Direction, slot: int = 0) -> int:
    return status(nic.transmit(0, command(abi.Opcode.CTX_ADD, slot, 1, ctx_add(direction))))


@pytest.mark.parametrize(
    ("line", "refused"), [("", abi.Status.REFUSED), ('status = "table-full"', abi.Status.TABLE_FULL)]
)
def test_refused_adds_leave_nothing(line: str, refused: abi.Status) -> None:
    bench = Bench(rule("refuse-add", 'direction = "tx"', "count = 2", line))
    nic = bench.nic
    assert try_add(nic, abi.Direction.RX, 5) == abi.Status.OK
    chain = command(abi.Opcode.CTX_ADD, 0, 1, ctx_add(abi.Direction.TX))
    key = ctx_add(abi.Direction.TX)[36:52]
    assert status(nic.transmit(0, chain)) == refused
    assert key not in chain
    assert [try_add(nic, abi.Direction.TX) for _ in range(2)] == [refused, abi.Status.OK]
    assert len(nic.table) == 2
    assert nic.stats[Counter.FAULT_ADDS_REFUSED] == nic.stats[Counter.CTX_REFUSED] == 2
    nic.control.faults = Faults()
    assert try_add(nic, abi.Direction.TX, 1) == abi.Status.OK


def test_a_refused_context_is_no_flow() -> None:
    bench = Bench(rule("refuse-add", 'direction = "rx"') + rule("lose-request", "flow = 1"))
    try_add(bench.nic, abi.Direction.RX)
    add(bench.nic, abi.Direction.RX)
    assert bench.flags(1) == [0]
    assert bench.nic.stats[Counter.FAULT_REQUESTS_LOST] == 1


def test_desync_of_rx_comes_back_by_a_resync() -> None:
    bench = Bench(rule("desync", 'direction = "rx"', "record = 2"))
    add(bench.nic, abi.Direction.RX)
    assert bench.flags(0, 1, 2) == [DECRYPTED, DECRYPTED, ASKS]
    assert bench.answer(2) == abi.Status.OK
    assert bench.flags(3, 4) == [DECRYPTED, DECRYPTED]
    assert bench.nic.stats[Counter.FAULT_DESYNCED] == 1


def test_desync_of_tx_drops_and_tells_and_leaves_by_a_resync() -> None:
    bench = Bench(rule("desync", 'direction = "tx"', "flow = 1", "record = 1"))
    nic = bench.nic
    add(nic, abi.Direction.TX)
    frames = [segment(record(TEXT, number), START + number * SIZE) for number in range(3)]
    assert nic.transmit(0, marked(frames[0])).packet is not None
    assert nic.transmit(0, marked(frames[1])).packet is None
    (event,) = (abi.Event._make(abi.EVENT.unpack(m)) for m in messages(nic, abi.ExtType.EVENT))
    assert (event.code, event.reason) == (abi.EventCode.TX_DROPPED, Counter.TX_DROP_WRONG_SEQ)
    resync = {"flags": 1, "resync_seq": START + 2 * SIZE, "resync_rcd_sn": 2}
    packet = nic.transmit(0, marked(frames[2], header=NEEDS_CSUM, **resync)).packet
    assert packet is not None
    assert bytes(packet.frame[54:]) == record(TEXT, 2, sealed=True)


def lost(scenario: str) -> Bench:
    """A bench with an rx context that has not seen record 0: it was lost behind the director."""
    bench = Bench(scenario)
    add(bench.nic, abi.Direction.RX)
    frame = segment(record(TEXT, 0, True), outgoing=False)
    assert bench.director.feed(abi.Direction.RX, PLAIN, memoryview(bytearray(frame)), 0)
    return bench


def test_lost_request() -> None:
    bench = lost(rule("lose-request"))
    assert bench.flags(1, 2) == [0, 0]  # the device waits for the answer
    assert bench.nic.stats[Counter.FAULT_REQUESTS_LOST] == 1


@pytest.mark.parametrize("unit", ["packets", "ms"])
def test_delayed_request_rides_on_a_later_packet(unit: str) -> None:
    bench = lost(rule("delay-request", f"{unit} = 3"))
    asked = []
    for number in range(1, 7):
        asked.append(bench.receive(number)[0])
        bench.now += 0.001
    assert [ext.flags for ext in asked] == [0, 0, 0, ASKS, 0, 0]
    assert asked[3].resync_seq == lost("").receive(1)[0].resync_seq
    assert bench.nic.stats[Counter.FAULT_REQUESTS_DELAYED] == 1


def test_lost_answer() -> None:
    bench = lost(rule("lose-answer"))
    assert bench.flags(1) == [ASKS]
    assert bench.answer(1) == abi.Status.OK
    assert bench.flags(2) == [0]
    assert bench.answer(1) == abi.Status.OK
    assert bench.flags(3) == [DECRYPTED]
    assert bench.nic.stats[Counter.FAULT_ANSWERS_LOST] == 1


@pytest.mark.parametrize("unit", ["packets", "records", "ms"])
def test_delayed_answer_takes_effect_later(unit: str) -> None:
    bench = lost(rule("delay-answer", f"{unit} = 3"))
    assert bench.receive(1)[0].flags == ASKS
    bench.now += 0.001
    assert bench.answer(1) == abi.Status.OK
    flags = []
    for number in range(2, 7):
        flags += bench.flags(number)
        bench.now += 0.001
    passed = 2 + (unit == "ms")  # the third packet brings the third record, and comes two milliseconds after the first
    assert flags == [0] * passed + [DECRYPTED] * (5 - passed)
    assert bench.nic.stats[Counter.FAULT_ANSWERS_DELAYED] == 1


def test_records_pass_while_the_context_is_lost_several_to_a_packet() -> None:
    bench = lost(rule("delay-answer", "records = 3"))
    assert bench.flags(1) == [ASKS]
    bench.answer(1)
    three = b"".join(record(TEXT, number, True) for number in (2, 3, 4))
    assert bench.receive(2, three)[0].flags == DECRYPTED


def test_an_answer_that_waits_dies_with_its_context() -> None:
    bench = lost(rule("delay-answer", "packets = 1"))
    bench.flags(1)
    bench.answer(1)
    bench.nic.transmit(0, command(abi.Opcode.CTX_DEL))
    add(bench.nic, abi.Direction.RX)
    assert bench.flags(1) == [ASKS]
    assert bench.flags(2) == [0]


def test_claimed_verdict() -> None:
    bench = Bench(rule("claim-decrypted", "record = 1"))
    add(bench.nic, abi.Direction.RX)
    assert bench.flags(0) == [DECRYPTED]
    bad = record(TEXT, 9, True)  # not record 1
    ext, payload = bench.receive(1, bad)
    assert (ext.flags, payload) == (DECRYPTED, bad)
    assert bench.nic.stats[Counter.FAULT_VERDICTS] == 1


@pytest.mark.parametrize("action", ["withhold-verdict", "unmark"])
def test_withheld_verdict(action: str) -> None:
    bench = Bench(rule(action, "record = 1"))
    add(bench.nic, abi.Direction.RX)
    assert bench.flags(0) == [DECRYPTED]
    ext, payload = bench.receive(1)
    assert (ext.flags, ext.records, ext.payload) == (0, 0, 0)
    wire = record(TEXT, 1, True)
    assert payload == (wire if action == "withhold-verdict" else wire[:13] + TEXT + wire[-16:])
    assert bench.flags(2) == [DECRYPTED]
    assert bench.nic.stats[Counter.RX_TLS_RECORDS] == 2


def test_contexts_without_rules_are_as_ever() -> None:
    bench = Bench("".join(rule(action, "flow = 9", "record = 0") for action in ("claim-decrypted", "unmark")))
    add(bench.nic, abi.Direction.RX)
    assert bench.flags(0, 1) == [DECRYPTED, DECRYPTED]
    ext, _ = bench.receive(2, record(TEXT, 7, True))
    assert ext.flags == ERROR
