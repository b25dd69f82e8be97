"""What a scenario says: rules, each of them an action, an address and how often. docs/faults.md is the manual.

Theory of operation: a scenario is data, and the same whether it was written in TOML (see parse.py) or in Python. Rules
do not know of each other: each has a random number generator of its own and judges every packet, whatever the others
made of it. So a rule that is added or taken away leaves the decisions of the others as they were.

Numbers. A *flow* is a context: the k-th of its direction in order of creation since the scenario was set, counted from
1, those that existed then first. Record r of a flow is the one with TLS record number rec_seq + r, so the first one of
the offload is record 0. `nth` counts from 1 what the rest of the address fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from nicdev.abi import Direction, Status
from nicdev.errors import ConfigError


class Action(StrEnum):
    """What a rule does; the first five to packets on their way, the others in the device."""

    DROP = "drop"
    DUPLICATE = "duplicate"
    CORRUPT = "corrupt"  # one bit
    REORDER = "reorder"  # let `distance` packets of the stream overtake
    DELAY = "delay"
    REFUSE_ADD = "refuse-add"
    LOSE_REQUEST = "lose-request"  # the device's resync question
    DELAY_REQUEST = "delay-request"
    LOSE_ANSWER = "lose-answer"  # the driver's RX_RESYNC
    DELAY_ANSWER = "delay-answer"
    DESYNC = "desync"
    CLAIM_DECRYPTED = "claim-decrypted"  # mark a packet that was left alone
    WITHHOLD_VERDICT = "withhold-verdict"  # hand over as on the wire what could be decrypted
    UNMARK = "unmark"  # hand over plaintext without the mark


WIRE_ACTIONS: Final = (Action.DROP, Action.DUPLICATE, Action.CORRUPT, Action.REORDER, Action.DELAY)
ANY_DIRECTION: Final = (*WIRE_ACTIONS, Action.REFUSE_ADD, Action.DESYNC)
WAITING: Final = (Action.DELAY_REQUEST, Action.DELAY_ANSWER)


class Part(StrEnum):
    """Of a record."""

    HEADER = "header"
    NONCE = "nonce"  # the explicit one; empty where there is none
    PAYLOAD = "payload"
    TAG = "tag"


class Only(StrEnum):
    """The packets that a rule looks at."""

    DATA = "data"  # TCP with payload
    TCP = "tcp"
    ANY = "any"


class Segments(StrEnum):
    """What rules judge of a large packet, and what of it leaves together."""

    WHOLE = "whole"  # the packet
    WIRE = "wire"  # segments of wire size, each of which leaves by itself
    JOINED = "joined"  # segments of wire size; neighbours that no rule touched leave together


class RuleError(ConfigError):
    """A rule that cannot be; `key` is to blame."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"key {key}: {problem}")
        self.key = key


@dataclass(frozen=True)
class Endpoint:
    """One end of a TCP connection; None fits any address or port."""

    address: IPv4Address | IPv6Address | None = None
    port: int | None = None

    def fits(self, address: bytes, port: int) -> bool:
        """Whether these are address (4 or 16 bytes) and port of this end."""
        return self.port in (None, port) and (self.address is None or self.address.packed == address)


@dataclass(frozen=True)
class Rule:
    """One fault. Raises RuleError where its parts contradict each other."""

    name: str  # unique in its scenario; part of the seed
    action: Action
    direction: Direction
    # address; None fits everything
    flow: int | None = None
    local: Endpoint = Endpoint()  # the guest
    remote: Endpoint = Endpoint()
    record: int | None = None
    part: Part | None = None
    byte: int | None = None  # from the start of the part, or of the record
    seq: tuple[int, int] | None = None  # bytes of the stream from the first up to, without, the second; 0 is start_seq
    only: Only = Only.DATA
    retransmissions: bool | None = None  # also packets without new data; None: unless `record` or `seq` is given
    # how often
    nth: int = 1  # begin with the n-th that fits
    count: int | None = None  # at most so many; None: no limit with a rate, else once; 0: no limit
    rate: float | None = None  # probability, 0 to 1
    # what exactly
    distance: int = 1  # REORDER: packets that overtake
    timeout_ms: float = 50  # REORDER: and no longer than this
    ms: float | None = None  # DELAY, DELAY_REQUEST, DELAY_ANSWER: one of these three
    packets: int | None = None
    records: int | None = None
    fix_checksum: bool = True  # CORRUPT: TLS is to see it; else TCP's checksum is left wrong
    bit: int | None = None  # CORRUPT: 0 is the lowest; None: any
    status: Status = Status.REFUSED  # REFUSE_ADD

    def __post_init__(self) -> None:
        if self.direction is Direction.TX and self.action not in ANY_DIRECTION:
            raise RuleError("direction", f"{self.action} is for rx")
        if (self.part or self.byte is not None) and self.record is None:
            raise RuleError("part" if self.part else "byte", "needs record")
        if self.record is not None and self.seq:
            raise RuleError("seq", "not together with record")
        if self.action is Action.DESYNC and self.record is None:
            raise RuleError("record", "desync needs it")
        if (self.record is not None or self.seq or self.flow) and self.only is not Only.DATA:
            raise RuleError("only", "flow, record and seq are about data")
        given = sum(unit is not None for unit in (self.ms, self.packets, self.records))
        if self.action is Action.DELAY and self.ms is None:
            raise RuleError("ms", "delay needs it")
        if self.action in WAITING and given != 1:
            raise RuleError("ms", f"{self.action} needs one of packets, records, ms")

    @property
    def limit(self) -> int | None:
        """How often at most; None: no limit."""
        if self.count is None:
            return None if self.rate is not None else 1
        return self.count or None

    @property
    def repeats_too(self) -> bool:
        """Whether packets without new data count."""
        if self.retransmissions is None:
            return self.record is None and self.seq is None
        return self.retransmissions


@dataclass(frozen=True)
class Scenario:
    """Everything that is to go wrong."""

    rules: tuple[Rule, ...] = ()
    seed: int = 0
    segments: Mapping[Direction, Segments] = field(default_factory=lambda: dict.fromkeys(Direction, Segments.WHOLE))
    name: str = "scenario"

    def __post_init__(self) -> None:
        names: set[str] = set()
        for rule in self.rules:
            if rule.name in names:
                raise ConfigError(f"{self.name}: rule {rule.name}: key name: used twice")
            names.add(rule.name)
            if not rule.fix_checksum and self.segments[rule.direction] is Segments.WHOLE:
                raise ConfigError(
                    f"{self.name}: rule {rule.name}: key checksum: wrong needs"
                    f' segments = "wire" or "joined" in [{rule.direction.name.lower()}]'
                )
