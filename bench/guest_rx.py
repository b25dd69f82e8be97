"""rx under loss and reordering: the share of records that reach the guest's kernel wholly decrypted.

Four connections at once into the guest, TLS 1.2 AES-128-GCM, records of 16 KiB, packets cut to segments of 1448 bytes
by the fault director, which then loses or reorders them (distance 3) between port and engine. An arm of its own
without faults goes along in each round. Counted by the kernel and by the device, see Watched.rx_records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from bench.goals import RX_PERSONALITIES, flat
from bench.guest import CUBIC, RECORD, WatchedBed, first_record, transfer, watched
from bench.registry import Group, Measured, Session, interleaved
from tests.guest.exchange import rx_case, rx_personality, send

RATES = {
    "loss0": "",
    "loss1": "drop = 0.01",
    "loss5": "drop = 0.05",
    "reorder2": "reorder = 0.02",
    "reorder5": "reorder = 0.05",
}
SEED = 7
FLOWS = 4


def share(session: Session, guest: WatchedBed, rate: str, personality: str, number: int) -> float:
    """One arm, once: per cent of records offloaded."""
    size = RECORD * session.scaled(256, 8)
    cases = [
        rx_case(
            f"{rate} {personality} {number} {index}", send(size), size=size, rec_seq=first_record(index), peer_job=CUBIC
        )
        for index in range(FLOWS)
    ]
    scenario = f'seed = {SEED + number}\n[rx]\nsegments = "wire"\n{RATES[rate]}\n'
    with rx_personality(guest.bed, personality), guest.bed.nic.faults(scenario):
        found = transfer(guest, cases)
    records = [done for case in cases for done in found.rx_records(case)]
    percent = 100 * sum(records) / len(records)
    session.say(f"  round {number + 1}, {personality}, {rate}: {percent:.1f} % of {len(records)} records")
    return percent


def measure(session: Session, personalities: Sequence[str], usual: int) -> Iterator[Measured]:
    """All rates, interleaved, for each of these personalities."""
    guest = session.guest(watched)
    arms: dict[str, Callable[[int], float]] = {
        f"{rate} {personality}": partial(share, session, guest, rate, personality)
        for personality in personalities
        for rate in RATES
    }
    results = interleaved(arms, session.rounds(usual))
    for personality in personalities:
        control = results[f"loss0 {personality}"]
        for rate in list(RATES)[1:]:
            name = flat("rx", rate, "records_offloaded", personality if personality != "ideal" else "")
            details = {"personality": personality, "records_per_round": FLOWS * session.scaled(256, 8)}
            yield Measured(name, "%", results[f"{rate} {personality}"], control, details)


GROUPS = (
    Group("rx-disorder", "guest", "records offloaded under loss and reordering, rx ideal",
          partial(measure, personalities=RX_PERSONALITIES[:1], usual=3)),
    Group("rx-personalities", "guest", "the same of the personalities that are like hardware",
          partial(measure, personalities=RX_PERSONALITIES[1:], usual=1)),
)  # fmt: skip
