"""Rx contexts that lose their place and find it again, packet by packet: what tests of it share.

In lockstep a packet holds one whole record and waits until the guest's application has read the one before. So every
question, answer and verdict has a known place among the records, and tests say exactly which records the kernel had to
decrypt. The oracle is the kernel: its tracepoints (group "tls") tell which record went which way, and what it answered
about which place; where a record really starts follows from the length of all.

Records are counted from the flow's first. Flows are told apart by their first record number, so that no mix-up of
places can go unseen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from testbed.bed import QUEUES, WIRE4, Bed
from tests.guest.cases import rx_flow
from tests.guest.conftest import wait_until
from tests.guest.exchange import (
    CIPHERS,
    RECORD_OVERHEAD,
    WAIT,
    Case,
    Running,
    Seen,
    Step,
    recv,
    rx_personality,
    send,
    traced,
)

WIRE4_NET, WIRE6_NET = "198.51.100.0/24", "2001:db8:1::/64"
SIZE: Final = 1000  # plaintext of a record
LENGTH: Final = SIZE + RECORD_OVERHEAD
HARDWARE: Final = ("driver-req", "driver-req-async", "core-next-hint")
# enum tls_offload_sync_type
SYNC_TYPES: Final = {"driver-req": 0, "core-next-hint": 1, "driver-req-async": 2, "ideal": 0}
LAST_HEADER_BYTE: Final = 4  # driver-req's convention: question and answer name it
_EVENT: Final = re.compile(r"(\w+): (sk=\S+) ?(.*)$")
_FIELD: Final = re.compile(r"(\w+)=(-?\d+)")


def desync(record: int, more: str = "") -> str:
    """Scenario: every flow loses its place before this record; `more` TOML after it."""
    return f'[[rule]]\naction = "desync"\ndirection = "rx"\nrecord = {record}\ncount = "all"\n{more}'


def rule(action: str, **keys: int | str) -> str:
    """One more rule of a scenario."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    return "\n".join(["[[rule]]", f'action = "{action}"', *lines, ""])


def lockstep(records: int, size: int = SIZE, **how: Any) -> tuple[list[Step], list[Step]]:
    """The guest's and the peer's steps: so many records, each sent when the one before was read."""
    return [recv(size), send(1)] * records, [send(size, **how), recv(1)] * records


def lockstep_case(seed: str, records: int, first: int = 0, **options: Any) -> Case:
    """One flow of records in lockstep, whose first record has the number `first`."""
    return rx_flow(seed, *lockstep(records), rec_seq=first, **options)


def behind_case(seed: str, waiting: int, records: int, first: int) -> Case:
    """A flow of which `waiting` records arrive while the application stands at a step "wait"; the rest in lockstep."""
    guest, peer = lockstep(records - waiting)
    in_one = send(waiting * SIZE, records=[SIZE], writes=[LENGTH], apart=True)
    return rx_flow(
        seed,
        [recv(SIZE), WAIT, recv((waiting - 1) * SIZE), send(1), *guest],
        [in_one, recv(1), *peer],
        rec_seq=first,
        guest_job={"options": {"SO_RCVBUF": 1 << 20}},
    )


def go_on_when_passed(bed: Bed, packets: int) -> Callable[[Running], None]:
    """For `exchange`: the application goes on when the device has left so many packets more alone.

    The last of them may come twice: TCP's sender probes for an answer.
    """
    before = bed.nic.stats()["rx_tls_passed"]

    def meanwhile(run: Running) -> None:
        run.guest_waits()
        wait_until(lambda: bed.nic.stats()["rx_tls_passed"] - before >= packets, f"{packets} packets passed")
        run.go_on()

    return meanwhile


def lockstep_flows(seed: str, records: int) -> list[Case]:
    """One flow of each kind of socket, ciphers in turn, with record numbers far from each other."""
    return [
        lockstep_case(f"{seed} {family}", records, (n + 1) << 16, family=family, cipher=CIPHERS[n % 2])
        for n, family in enumerate(("4", "6", "mapped"))
    ]


@dataclass
class TracedFlow:
    """What the kernel traced about one rx context; records count from its first."""

    start: int  # TCP sequence number of the first record
    events: list[tuple[str, dict[str, int]]] = field(default_factory=list)

    @property
    def first(self) -> int:
        """Number of the first record."""
        return self.of("decrypted")[0]["rec_no"]

    def of(self, name: str) -> list[dict[str, int]]:
        """Fields of the events of one name."""
        return [fields for event, fields in self.events if event == f"tls_device_{name}"]

    def records(self, **want: int) -> list[int]:
        """The records that the kernel met in this state; without `want`, all."""
        found = [e for e in self.of("decrypted") if all(e[name] == value for name, value in want.items())]
        return [event["rec_no"] - self.first for event in found]

    @property
    def by_software(self) -> list[int]:
        """Records of which no packet was marked."""
        return self.records(encrypted=1)

    @property
    def mixed(self) -> list[int]:
        """Records of which some packets were marked."""
        return self.records(encrypted=0, decrypted=0)

    def answers(self, personality: str, length: int = LENGTH) -> list[int]:
        """The records of which the kernel told the device, all of them of this length; checks that it told the truth.

        A hint given with an empty queue names the start of the record before, which is the kernel's mistake; the
        driver knows (tlsnic_hinted_seq).
        """
        answered = []
        for event in self.of("rx_resync_send"):
            record = event["rec_no"] - self.first
            shifts = {0: (LAST_HEADER_BYTE,), 1: (0, -length), 2: (0,)}[SYNC_TYPES[personality]]
            assert event["sync_type"] == SYNC_TYPES[personality]
            assert (event["tcp_seq"] - self.start - record * length) % 2**32 in [n % 2**32 for n in shifts], event
            answered.append(record)
        return answered


def flows_of(lines: Sequence[str]) -> dict[int, TracedFlow]:
    """The rx contexts of a trace, by their first record number.

    That is the one which is read first: tls_device_offload_set shows a wrong one where the key has 256 bits. A socket
    that was closed leaves its place in memory to a new one.
    """
    flows: list[TracedFlow] = []
    live: dict[str, TracedFlow] = {}
    for line in lines:
        found = _EVENT.search(line)
        assert found, line
        name, sock = found[1], found[2]
        fields = {key: int(value) for key, value in _FIELD.findall(found[3])}
        if name == "tls_device_offload_set":
            if fields["direction"] == 0:
                assert fields["ret"] == 0, line
                live[sock] = TracedFlow(fields["tcp_seq"])
                flows.append(live[sock])
        elif sock in live:
            live[sock].events.append((name, fields))
    return {flow.first: flow for flow in flows}


@contextmanager
def tracing(bed: Bed) -> Iterator[dict[int, TracedFlow]]:
    """Record what the kernel does with rx contexts that are made in the block; the result is there after it."""
    found: dict[int, TracedFlow] = {}
    with traced(bed, "tls:*") as lines:
        yield found
    found |= flows_of(lines)


def _routes(bed: Bed, *how: str) -> None:
    for argv in (
        ("-4", WIRE4_NET, "scope", "link", "src", WIRE4),
        ("-6", WIRE6_NET, "metric", "256"),
    ):
        bed.wire.run(["ip", argv[0], "route", "change", *argv[1:], "dev", bed.wire.interface, "proto", "kernel", *how])


@contextmanager
def unhurried(bed: Bed) -> Iterator[None]:
    """The peers' TCP repeats nothing for ten seconds: on a busy machine it would put packets where none belongs."""
    probes = "/proc/sys/net/ipv4/tcp_early_retrans"
    before = bed.wire.run(["cat", probes])
    _routes(bed, "rto_min", "10s")
    bed.wire.run(["sh", "-c", f"echo 0 >{probes}"])
    try:
        yield
    finally:
        bed.wire.run(["sh", "-c", f"echo {before} >{probes}"])
        _routes(bed)


@contextmanager
def pairs(bed: Bed, count: int) -> Iterator[None]:
    """The guest has so many queue pairs."""
    channels = ["ethtool", "-L", "eth0", "combined"]
    if count == QUEUES:
        yield
        return
    try:
        bed.agent.run([*channels, str(count)])
        yield
    finally:
        bed.agent.run([*channels, str(QUEUES)])


@contextmanager
def resyncing(bed: Bed, personality: str, faults: str, queues: int = 1) -> Iterator[dict[int, TracedFlow]]:
    """New contexts are of this personality, and these faults happen alone; gives what `tracing` does.

    With one queue pair the kernel's answer gets to the device before whatever the application sends next. With more,
    nothing orders them.
    """
    with (
        rx_personality(bed, personality),
        bed.nic.faults(faults),
        unhurried(bed),
        pairs(bed, queues),
        tracing(bed) as flows,
    ):
        yield flows


def consistent(seen: Seen, flows: dict[int, TracedFlow], skipped: int = 0, size: int = SIZE) -> None:
    """Everything arrived; kernel, driver and device counted the same.

    `skipped`: answers of no use to the device; `size`: plaintext of all records.
    """
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    driver, nic = seen.driver, seen.nic
    assert set(flows) == {case.rec_seq for case in seen.cases}
    answers = sum(len(flow.of("rx_resync_send")) for flow in flows.values())
    marked = sum(len(flow.records(decrypted=1)) for flow in flows.values())
    pairs = {
        "answers that the kernel counts": (seen.tls_stat["TlsRxDeviceResync"], answers),
        "answers given": (driver["rx_tls_resync_res_ok"], answers - skipped),
        "answers of no use": (driver["rx_tls_resync_res_skip"], skipped),
        "attempts ended": (
            driver["rx_tls_resync_req_start"],
            driver["rx_tls_resync_req_end"] + driver["rx_tls_resync_req_skip"],
        ),
        "packets marked": (driver["rx_tls_decrypted_packets"], nic["rx_tls_packets"]),
        "bytes decrypted": (driver["rx_tls_decrypted_bytes"], marked * size),
        "records marked": (nic["rx_tls_records"], marked),
        "errors": (driver["rx_tls_err"], 0),
    }
    wrong = {what: pair for what, pair in pairs.items() if pair[0] != pair[1]}
    assert not wrong, seen.account(str(wrong))
