"""Faults inside the device: what nic.py and control.py ask before they do what they do.

Theory of operation: `Faults` is the interface and the device without faults: every method does the plain thing.
`DeviceFaults` stands in its place while a scenario with such rules is set. What waits (a question to the driver, an
answer of it) waits with its flow, is looked at when the next packet of the flow arrives, and dies with the context.
Records are counted where the wire's director sees their headers, so also while the context has lost its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from nicdev.abi import Status
from nicdev.faults.flows import Due, Flow, Flows
from nicdev.faults.scenario import Action, Rule
from nicdev.faults.select import Selector, Sight
from nicdev.stats import Counter, Stats
from nicdev.tls.context import ContextParams
from nicdev.tls.history import Happened
from nicdev.tls.rx import RxContext, RxResult
from nicdev.tls.table import RxEntry
from nicdev.tls.tx import TxContext
from nicdev.wire.frame import Frame

MAX_WAITING: Final = 64  # questions and answers per flow; more are lost, and counted so
# The fields of a verdict that put a question to the driver, or go with one, and what they are without.
NO_QUESTION: Final[dict[str, Any]] = {
    name: value for name, value in RxResult._field_defaults.items() if name in ("ask", "opened", "guess", "cancelled")
}


class Faults:
    """No faults."""

    refuses_adds = False  # whether contexts may be refused: then the driver is to wait for each reply

    def refusal(self, params: ContextParams) -> Status:
        """With what status to refuse a context; OK: do not."""
        return Status.OK

    def answer(self, entry: RxEntry, tcp_seq: int, rcd_sn: int) -> bool:
        """Carry out RX_RESYNC; False if it changes nothing."""
        return entry.context.resync(tcp_seq, rcd_sn)

    def before_tx(self, slot: int, generation: int, context: TxContext) -> None:
        """A packet is going to be encrypted."""

    def decrypt(self, entry: RxEntry, parsed: Frame, payload: memoryview) -> RxResult:
        """Judge a packet of an rx context."""
        return entry.context.decrypt(parsed.seq, payload)


class DeviceFaults(Faults):
    """The rules of a scenario that act in the device; `clock` gives seconds, for waits in milliseconds."""

    def __init__(self, rules: Sequence[Selector], flows: Flows, stats: Stats, clock: Callable[[], float]) -> None:
        self._rules = rules
        self._flows = flows
        self._stats = stats
        self._clock = clock
        self.refuses_adds = any(selector.rule.action is Action.REFUSE_ADD for selector in rules)
        self._desyncs: dict[tuple[str, int], bool] = {}  # rule, flow: done, or still to be done

    def refusal(self, params: ContextParams) -> Status:
        """See Faults."""
        for selector in self._rules:
            rule = selector.rule
            if rule.action is not Action.REFUSE_ADD or rule.direction is not params.direction:
                continue
            if selector.fits_flow(None, params.local, params.remote) and selector.strikes():
                self._stats.add(Counter.FAULT_ADDS_REFUSED)
                return rule.status
        return Status.OK

    def answer(self, entry: RxEntry, tcp_seq: int, rcd_sn: int) -> bool:
        """See Faults. One that is lost or waits is good news to the driver."""
        flow = self._flows.by_handle(entry.slot, entry.generation)
        selector = self._striking(flow, (Action.LOSE_ANSWER, Action.DELAY_ANSWER))
        if flow is None or selector is None:
            return super().answer(entry, tcp_seq, rcd_sn)
        if selector.rule.action is Action.LOSE_ANSWER or len(flow.answers) >= MAX_WAITING:
            self._stats.add(Counter.FAULT_ANSWERS_LOST)
            entry.context.history.note(Happened.FAULT, tcp_seq, rcd_sn, "answer lost")
        else:
            self._stats.add(Counter.FAULT_ANSWERS_DELAYED)
            entry.context.history.note(Happened.FAULT, tcp_seq, rcd_sn, "answer held back")
            flow.answers.append((self._due(selector.rule, flow), tcp_seq, rcd_sn))
        return True

    def before_tx(self, slot: int, generation: int, context: TxContext) -> None:
        """See Faults."""
        self._desync(self._flows.by_handle(slot, generation), context)

    def decrypt(self, entry: RxEntry, parsed: Frame, payload: memoryview) -> RxResult:
        """See Faults."""
        flow = self._flows.by_handle(entry.slot, entry.generation)
        if flow is None:
            return super().decrypt(entry, parsed, payload)
        self._desync(flow, entry.context)
        flow.packets += 1
        while flow.answers and self._over(flow.answers[0][0], flow):
            _, tcp_seq, rcd_sn = flow.answers.popleft()
            entry.context.resync(tcp_seq, rcd_sn)
        result = super().decrypt(entry, parsed, payload)
        return self._request(flow, entry.context, self._verdict(flow, parsed, result))

    # -- the rules ----------------------------------------------------------------------------------------------------

    def _striking(self, flow: Flow | None, actions: Sequence[Action]) -> Selector | None:
        """The first rule of these actions that is about the flow and strikes."""
        if flow is None:
            return None
        for selector in self._rules:
            fits = selector.rule.action in actions and selector.fits_flow(flow, flow.local, flow.remote)
            if fits and selector.strikes():
                return selector
        return None

    def _desync(self, flow: Flow | None, context: TxContext | RxContext) -> None:
        """Before the first packet that begins in the rule's record or behind it; once per flow and rule.

        A context that may not forget its place just then does so as soon as it may.
        """
        place = context.place
        if flow is None or place is None:
            return
        for selector in self._rules:
            rule = selector.rule
            if rule.action is not Action.DESYNC or rule.direction is not flow.direction:
                continue
            reached = place.number - flow.rec_seq >= (rule.record or 0)
            if not reached or not selector.fits_flow(flow, flow.local, flow.remote):
                continue
            key = (rule.name, flow.number)
            if key not in self._desyncs:
                self._desyncs[key] = not selector.strikes()
            if not self._desyncs[key]:
                context.lose_sync()
                if context.place is None:
                    self._desyncs[key] = True
                    self._stats.add(Counter.FAULT_DESYNCED)
                    context.history.note(Happened.FORCED, place.seq, place.number, rule.name)

    def _verdict(self, flow: Flow, parsed: Frame, result: RxResult) -> RxResult:
        """The verdict that the rules make of the true one."""
        at = flow.follower.position(parsed.seq) if flow.follower is not None else 0
        sight = Sight(flow, at, parsed.end - parsed.payload, True)
        for selector in self._rules:
            action = selector.rule.action
            if result.decrypted != (action is not Action.CLAIM_DECRYPTED):
                continue
            if action not in (Action.CLAIM_DECRYPTED, Action.WITHHOLD_VERDICT, Action.UNMARK):
                continue
            about = selector.fits_packet(parsed, flow, flow.local, flow.remote)
            if not about or not selector.fits(sight) or not selector.strikes():
                continue
            self._stats.add(Counter.FAULT_VERDICTS)
            if action is Action.CLAIM_DECRYPTED:
                return result._replace(decrypted=True, error=False)
            text = result.text if action is Action.UNMARK else None
            return result._replace(decrypted=False, records=0, plaintext=0, text=text)
        return result

    def _request(self, flow: Flow, context: RxContext, result: RxResult) -> RxResult:
        """Take away the packet's question, or give it one that waited."""
        question = {name: getattr(result, name) for name in NO_QUESTION}
        if question != NO_QUESTION:
            about = result.guess if result.ask is None else result.ask
            selector = self._striking(flow, (Action.LOSE_REQUEST, Action.DELAY_REQUEST))
            if selector is None:
                return result
            if selector.rule.action is Action.LOSE_REQUEST or len(flow.requests) >= MAX_WAITING:
                self._stats.add(Counter.FAULT_REQUESTS_LOST)
                context.history.note(Happened.FAULT, about, why="request lost")
            else:
                self._stats.add(Counter.FAULT_REQUESTS_DELAYED)
                context.history.note(Happened.FAULT, about, why="request held back")
                flow.requests.append((self._due(selector.rule, flow), question))
            return result._replace(**NO_QUESTION)
        if flow.requests and self._over(flow.requests[0][0], flow):
            return result._replace(**flow.requests.popleft()[1])
        return result

    # -- waits --------------------------------------------------------------------------------------------------------

    def _due(self, rule: Rule, flow: Flow) -> Due:
        if rule.packets is not None:
            return Due("packets", flow.packets + rule.packets)
        if rule.records is not None:
            return Due("records", flow.headers + rule.records)
        return Due("time", self._clock() + (rule.ms or 0) / 1000)

    def _over(self, due: Due, flow: Flow) -> bool:
        if due.unit == "time":
            return self._clock() >= due.at
        return (flow.packets if due.unit == "packets" else flow.headers) >= due.at
