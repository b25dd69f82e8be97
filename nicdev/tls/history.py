"""What happened to a context's place in its stream: the last events, for whoever watches the device at work.

Theory of operation: a context that is in sync, and stays so, writes nothing. Whatever else happens to its place is
noted where it is decided, in the words of `Happened`. A history keeps the last `MAX_EVENTS`; their numbers tell how
many came before, and it never takes more than about 8 KiB, nor, empty, more than 100 bytes. It holds places, record
numbers and a few fixed words, never a byte of keys or data.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Final, NamedTuple

MAX_EVENTS: Final = 32


class Happened(StrEnum):
    """Kinds of events; which place and record they name."""

    LOST = "lost"  # where the context stood
    FORCED = "forced"  # out of sync by the fault director: likewise; the rule's name
    GAP = "gap"  # the place at which something is missing; the context goes on
    FILLED = "filled"  # nothing is missing any more: where it stands
    SCANNING = "scanning"  # the first packet that is searched for headers
    CANDIDATE = "candidate"  # what looks like a record start, and leads to others
    REJECTED = "rejected"  # a candidate that was none, or of which nothing is heard
    FOUND = "found"  # a record behind a gap, and its number
    ASKED = "asked"  # the host: does a record start here, and which?
    OPENED = "opened"  # driver-req-async, an attempt: where the packet starts with which it begins
    SUBMITTED = "submitted"  # its end: the guess
    CANCELLED = "cancelled"  # its end: none
    ANSWER = "answer"  # an RX_RESYNC that was of use: what it said
    REFUSED = "refused"  # and one that was not
    IN_SYNC = "in_sync"  # where the context goes on
    REBUILT = "rebuilt"  # tx: the record start that came with a packet
    DROPPED = "dropped"  # tx: the packet's start; the counter's name
    AUTH_FAILED = "auth_failed"  # the packet's start, the first record with a wrong tag
    NONCE = "nonce"  # a record with another nonce than expected
    CONFLICT = "conflict"  # the start of a packet that contradicts others
    POISONED = "poisoned"  # likewise; all that follows is dropped
    NO_ROOM = "no_room"  # the start of a packet that could not be remembered
    ERROR = "error"  # the packet's start; not a matter of tags
    FAULT = "fault"  # the fault director lost or held back a question or an answer


class Event(NamedTuple):
    """One event."""

    number: int  # counts from 1 in each context
    at: float  # seconds since the context was made
    what: Happened
    seq: int | None  # TCP sequence number
    record: int | None  # TLS record number
    why: str


class History:
    """The last events of one context; `clock` gives seconds, `since` is when the context began (default: now)."""

    __slots__ = ("_clock", "_count", "_events", "_since")

    # float(): a clock that stands still
    def __init__(self, clock: Callable[[], float] = float, since: float | None = None) -> None:
        self._clock = clock
        self._since = clock() if since is None else since
        self._count = 0
        self._events: tuple[Event, ...] = ()

    def note(self, what: Happened, seq: int | None = None, record: int | None = None, why: str = "") -> None:
        """Something happened now."""
        self._count += 1
        event = Event(self._count, self._clock() - self._since, what, seq, record, why)
        self._events = (*self._events[-MAX_EVENTS + 1 :], event)

    @property
    def events(self) -> tuple[Event, ...]:
        """The last ones, oldest first."""
        return self._events

    def describe(self) -> list[dict[str, object]]:
        """The same for control output."""
        return [event._asdict() for event in self._events]
