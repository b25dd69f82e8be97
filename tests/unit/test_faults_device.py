"""Faults inside the device: what the guest's driver is told when a scenario says so. Records are sealed by AESGCM.

What is asked and answered does not depend on a personality: there the context is a stub.
"""

from __future__ import annotations

import pytest

from nicdev import abi
from nicdev.faults.device import Faults
from nicdev.faults.director import Director
from nicdev.faults.parse import parse
from nicdev.nic import Nic
from nicdev.stats import Counter, Stats
from nicdev.tls.context import ContextParams, params_from_ctx_add
from nicdev.tls.rx import RxContext, RxResult
from nicdev.tls.table import ContextTable, RxEntry
from nicdev.wire.frame import parse as parse_frame
from tests.support.nic_chains import (
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
    sent,
    status,
)

DECRYPTED, ERROR = abi.RxTlsFlag.DECRYPTED, abi.RxTlsFlag.ERROR
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


def test_the_key_of_a_refused_context_is_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(rule("refuse-add", 'direction = "rx"'))
    seen: list[ContextParams] = []
    refusal = bench.director.device.refusal

    def watched(params: ContextParams) -> abi.Status:
        seen.append(params)
        return refusal(params)

    monkeypatch.setattr(bench.director.device, "refusal", watched)
    assert try_add(bench.nic, abi.Direction.RX) == abi.Status.REFUSED
    assert [bytes(params.key) for params in seen] == [bytes(16)]


def test_desync_of_rx_comes_back_by_a_resync() -> None:
    bench = Bench(rule("desync", 'direction = "rx"', "record = 2"))
    add(bench.nic, abi.Direction.RX, rx_personality=abi.RxPersonality.CORE_NEXT_HINT)
    assert bench.flags(0, 1, 2) == [DECRYPTED, DECRYPTED, 0]
    assert bench.answer(3) == abi.Status.OK
    assert bench.flags(3, 4) == [DECRYPTED, DECRYPTED]
    assert bench.nic.stats[Counter.FAULT_DESYNCED] == 1
    ((_, _, context),) = bench.nic.table
    forced = context.history.events[0]
    assert forced[2:] == ("forced", START + 2 * SIZE, 2, "desync 1")


def test_desync_of_tx_drops_and_tells_and_leaves_by_a_resync() -> None:
    bench = Bench(rule("desync", 'direction = "tx"', "flow = 1", "record = 1"))
    nic = bench.nic
    add(nic, abi.Direction.TX)
    frames = [segment(record(TEXT, number), START + number * SIZE) for number in range(3)]
    assert sent(nic.transmit(0, marked(frames[0]))) is not None
    assert sent(nic.transmit(0, marked(frames[1]))) is None
    (event,) = (abi.Event._make(abi.EVENT.unpack(m)) for m in messages(nic, abi.ExtType.EVENT))
    assert (event.code, event.reason) == (abi.EventCode.TX_DROPPED, Counter.TX_DROP_WRONG_SEQ)
    resync = {"flags": 1, "resync_seq": START + 2 * SIZE, "resync_rcd_sn": 2}
    packet = sent(nic.transmit(0, marked(frames[2], header=NEEDS_CSUM, **resync)))
    assert packet is not None
    assert bytes(packet.frame[54:]) == record(TEXT, 2, sealed=True)


class Asking(RxContext):
    """A context that decrypts nothing, asks about every packet, and keeps the answers."""

    def __init__(self) -> None:
        super().__init__(params_from_ctx_add(abi.unpack_ctx_add(memoryview(bytearray(ctx_add(abi.Direction.RX))))))
        self.answers: list[tuple[int, int]] = []

    def decrypt(self, seq: int, payload: memoryview) -> RxResult:
        return RxResult(ask=seq)

    def resync(self, tcp_seq: int, rcd_sn: int) -> bool:
        self.answers.append((tcp_seq, rcd_sn))
        return True


class Talk:
    """Packets of a flow, questions and answers, with a scenario between."""

    def __init__(self, scenario: str) -> None:
        self.now = 0.0
        self.stats = Stats()
        self.director = Director(parse(scenario, "t"), ContextTable(1), self.stats, lambda: self.now)
        self.context = Asking()
        self.entry = RxEntry(0, 1, self.context)
        self.director.flows.added(0, 1, self.context.params)

    def packet(self, number: int, records: int = 1) -> int | None:
        """A packet that begins with a record; the number of the record it asks about."""
        payload = b"".join(record(TEXT, n, True) for n in range(number, number + records))
        frame = memoryview(bytearray(segment(payload, START + number * SIZE, outgoing=False)))
        assert self.director.feed(abi.Direction.RX, PLAIN, frame, self.now)
        parsed = parse_frame(frame)
        assert parsed is not None
        ask = self.director.device.decrypt(self.entry, parsed, frame[parsed.payload :]).ask
        self.now += 0.001
        return None if ask is None else (ask - START) // SIZE

    def answer(self, number: int) -> None:
        assert self.director.device.answer(self.entry, START + number * SIZE, number)

    def answered(self) -> list[int]:
        return [number for _, number in self.context.answers]


def test_lost_requests() -> None:
    talk = Talk(rule("lose-request", "nth = 2", "count = 2"))
    assert [talk.packet(number) for number in range(5)] == [0, None, None, 3, 4]
    assert talk.stats[Counter.FAULT_REQUESTS_LOST] == 2
    noted = [event[2:] for event in talk.context.history.events]
    assert noted == [("fault", START + number * SIZE, None, "request lost") for number in (1, 2)]


@pytest.mark.parametrize("unit", ["packets", "records", "ms"])
def test_delayed_request_rides_on_a_later_packet(unit: str) -> None:
    talk = Talk(rule("delay-request", f"{unit} = 3") + rule("lose-request", 'count = "all"'))
    assert [talk.packet(number) for number in range(6)] == [None] * 6  # each packet has a question of its own
    talk = Talk(rule("delay-request", f"{unit} = 3"))
    asked = [talk.packet(0)]
    talk.context.decrypt = lambda seq, payload: RxResult()  # type: ignore[method-assign]
    asked += [talk.packet(number) for number in range(1, 6)]
    assert asked == [None, None, None, 0, None, None]
    assert talk.stats[Counter.FAULT_REQUESTS_DELAYED] == 1
    assert [event[2:] for event in talk.context.history.events] == [("fault", START, None, "request held back")]


def test_lost_answer() -> None:
    talk = Talk(rule("lose-answer"))
    talk.answer(1)
    talk.answer(2)
    talk.packet(3)
    assert talk.answered() == [2]
    assert talk.stats[Counter.FAULT_ANSWERS_LOST] == 1
    assert [event[2:] for event in talk.context.history.events] == [("fault", START + SIZE, 1, "answer lost")]


@pytest.mark.parametrize("unit", ["packets", "records", "ms"])
def test_delayed_answer_takes_effect_before_a_later_packet(unit: str) -> None:
    talk = Talk(rule("delay-answer", f"{unit} = 3"))
    talk.packet(0)
    talk.answer(1)
    seen = []
    for number in range(1, 6):
        talk.packet(number)
        seen.append(talk.answered())
    early = unit != "ms"  # the third packet comes two milliseconds after the first
    assert seen == [[]] * (3 - early) + [[1]] * (2 + early)
    assert talk.stats[Counter.FAULT_ANSWERS_DELAYED] == 1
    assert [event[2:] for event in talk.context.history.events] == [("fault", START + SIZE, 1, "answer held back")]


def test_records_are_counted_several_to_a_packet() -> None:
    talk = Talk(rule("delay-answer", "records = 3"))
    talk.answer(1)
    talk.packet(0, records=3)
    assert talk.answered() == [1]


def test_what_waits_dies_with_the_context() -> None:
    talk = Talk(rule("delay-answer", "packets = 1") + rule("delay-request", "packets = 1"))
    talk.packet(0)
    talk.answer(1)
    talk.director.flows.deleted(0, 1)
    talk.director.flows.added(0, 1, talk.context.params)
    assert [talk.packet(number) for number in (1, 2)] == [1, 2]
    assert talk.answered() == []


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
