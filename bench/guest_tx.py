"""tx at 5 % loss: nothing leaves in plaintext, nothing is lost, and who encrypts what TCP sends again.

Lost behind the device, by the fault director ("loss5"): TCP repeats single segments out of the middle of packets and
records. Lost above the driver, by netem in the guest ("netem_loss5"): to the driver these are gaps and jumps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

from bench.goals import CIPHERS, TX_PERSONALITIES, flat
from bench.guest import RECORD, SECONDS, WatchedBed, first_record, transfer, watched
from bench.registry import Group, Measured, Session, interleaved
from testbed.peers.stream import sha256_of
from tests.guest.exchange import WAIT, Running, disturbed, netem, send, tx_case, tx_personality

SEED = 5
WHERE = ("loss5", "netem_loss5")


def arm(session: Session, guest: WatchedBed, where: str, personality: str, number: int) -> dict[str, float]:
    """Figures of one transfer; two flows per cipher, of large and of small records."""
    size = RECORD * session.scaled(256, 16)
    cases = [
        tx_case(f"{where} {personality} {number} {cipher} {write}", WAIT, send(size, write=write), size=size,
                cipher=cipher, rec_seq=first_record(2 * index + (write == RECORD)))
        for index, cipher in enumerate(CIPHERS) for write in (700, RECORD)
    ]  # fmt: skip

    def lose(running: Running) -> None:
        with ExitStack() as stack:
            running.guest_waits()
            if where == "loss5":
                scenario = f'seed = {SEED + number}\n[tx]\nsegments = "wire"\ndrop = 0.05\n'
                stack.enter_context(guest.bed.nic.faults(scenario))
            else:
                stack.enter_context(disturbed(guest.bed, netem("loss 5%")))
            running.go_on()
            for peer in running.peers:
                peer.result(SECONDS)

    with tx_personality(guest.bed, personality):
        seen = transfer(guest, cases, lose).seen
    driver = seen.driver
    out_of_order = driver["tx_tls_resync"] + driver["tx_tls_fallback"] + driver["tx_tls_drop_no_sync_data"]
    lost = sum(case.size("send") - int(peer["received"]) for case, peer in zip(cases, seen.peers, strict=True)) + sum(
        peer["sha256_received"] != sha256_of(case.seed, size) for case, peer in zip(cases, seen.peers, strict=True)
    )
    if not out_of_order:
        raise AssertionError(seen.account("nothing was sent out of order"))
    result = {
        "plaintext_frames": float(seen.report.plaintext_hits),
        "bytes_lost": float(lost),
        "retransmissions_in_device": 100 * driver["tx_tls_resync"] / out_of_order,
        "out_of_order": float(out_of_order),
    }
    session.say(f"  round {number + 1}, {personality}, {where}: {result}")
    return result


UNITS = {"plaintext_frames": "frames", "bytes_lost": "bytes", "retransmissions_in_device": "%"}


def measure(session: Session) -> Iterator[Measured]:
    """For rebuild, and for next-record beside it."""
    guest = session.guest(watched)
    arms: dict[str, Callable[[int], dict[str, float]]] = {
        flat("tx", where, "{}", name if name != "rebuild" else ""): partial(arm, session, guest, where, name)
        for name in TX_PERSONALITIES
        for where in WHERE
    }
    for name, results in interleaved(arms, session.rounds(3)).items():
        details = {"out_of_order_packets": [result["out_of_order"] for result in results]}
        for figure, unit in UNITS.items():
            yield Measured(name.format(figure), unit, [result[figure] for result in results], details=details)


GROUP = Group("tx-loss", "guest", "tx at 5 % loss: no plaintext, nothing lost, encrypted by the device", measure)
