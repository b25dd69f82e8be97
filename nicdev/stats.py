"""One vocabulary of counters and drop reasons.

The lower-case member names are what `ethtool -S` shows behind `dev_`, what the control output and the logs say, and
what tests assert. The order is the order of GET_STATS replies: new members go at the end, none is ever removed or
moved. Names are at most 27 characters, since ETH_GSTRING_LEN is 32 with its NUL and the prefix takes four.
"""

from __future__ import annotations

from enum import IntEnum, auto


class Counter(IntEnum):
    """Index of a counter in `Stats`; unit is packets unless the name says otherwise."""

    TX_PACKETS = 0  # frames taken from tx rings, commands not counted
    TX_BYTES = auto()
    TX_WIRE_PACKETS = auto()  # frames handed to the port
    TX_TLS_PACKETS = auto()  # of those, encrypted by the engine
    TX_TLS_BYTES = auto()  # TCP payload bytes of those
    TX_TLS_RECORDS = auto()  # records whose tag the engine wrote
    TX_TLS_RESYNC = auto()  # packets that carried a resync for their context
    TX_DROP_BAD_HEADER = auto()  # chain shorter than its headers, impossible virtio_net_hdr
    TX_DROP_BAD_EXTENSION = auto()  # unknown or malformed extension
    TX_DROP_TOO_BIG = auto()
    TX_DROP_NOT_TCP = auto()  # marked for encryption, but no TCP payload to be found
    TX_DROP_UNKNOWN_CONTEXT = auto()  # no context in that slot
    TX_DROP_STALE_CONTEXT = auto()  # slot is taken by another generation
    TX_DROP_WRONG_DIRECTION = auto()  # handle of an rx context on a tx packet
    TX_DROP_WRONG_SEQ = auto()
    TX_DROP_BAD_RECORD = auto()  # not a TLS record where one must start
    TX_DROP_SEQ_WRAP = auto()  # record number would wrap: nonce reuse
    TX_DROP_CRYPTO = auto()
    TX_DROP_PORT = auto()  # the port would not take the frame
    TX_RING_ERRORS = auto()
    RX_WIRE_PACKETS = auto()  # frames received from the port
    RX_PACKETS = auto()  # frames put into rx rings
    RX_BYTES = auto()
    RX_TLS_PACKETS = auto()  # with the decrypted verdict
    RX_TLS_BYTES = auto()  # TCP payload bytes of those
    RX_TLS_RECORDS = auto()  # records whose tag verified
    RX_TLS_PASSED = auto()  # matched a context but left untouched
    RX_TLS_AUTH_FAIL = auto()  # records whose tag did not verify
    RX_TLS_LOST_SYNC = auto()  # events, not packets
    RX_TLS_RESYNCED = auto()  # resync answers that took effect
    RX_TLS_BAD_CSUM = auto()  # matched a context, checksum wrong: untouched
    RX_DROP_NO_BUFFER = auto()
    RX_DROP_TOO_BIG = auto()
    RX_DROP_QUEUE_DOWN = auto()
    RX_RING_ERRORS = auto()
    CTX_TX_ADDED = auto()
    CTX_RX_ADDED = auto()
    CTX_DELETED = auto()
    CTX_REFUSED = auto()
    CMD_OK = auto()
    CMD_FAILED = auto()
    EVENTS_SENT = auto()
    EVENTS_DROPPED = auto()
    HELLOS = auto()
    TX_DROP_QUEUE_DOWN = auto()  # waiting in a tx ring that was disabled
    VHOST_BAD_MESSAGES = auto()  # messages of the front end that were refused
    VHOST_UNKNOWN_MESSAGES = auto()
    RX_TLS_ASKED = auto()  # resync requests to the driver
    FAULT_DROPPED = auto()  # by the fault director, as all that follow; see docs/faults.md
    FAULT_DUPLICATED = auto()
    FAULT_CORRUPTED = auto()
    FAULT_REORDERED = auto()
    FAULT_DELAYED = auto()
    FAULT_TIMED_OUT = auto()  # reordered ones that too few others overtook in time
    FAULT_HOLD_FULL = auto()  # not reordered or delayed, since too many were
    FAULT_ADDS_REFUSED = auto()
    FAULT_REQUESTS_LOST = auto()
    FAULT_REQUESTS_DELAYED = auto()
    FAULT_ANSWERS_LOST = auto()
    FAULT_ANSWERS_DELAYED = auto()
    FAULT_DESYNCED = auto()  # contexts forced out of sync
    FAULT_VERDICTS = auto()  # packets with another verdict than they deserve
    INTERNAL_ERRORS = auto()  # of our own making, logged with a traceback; a ring in which one happens stops
    RX_DROP_INCONSISTENT = auto()  # it contradicts what other records were decrypted on: see docs/device.md
    RX_TLS_RESYNC_STARTED = auto()  # asynchronous resync attempts: opened, ended with a guess, abandoned
    RX_TLS_RESYNC_GUESSED = auto()
    RX_TLS_RESYNC_CANCELLED = auto()
    TX_DROP_NONCE_REUSE = auto()  # would put other ciphertext where some was sent: two plaintexts under one nonce
    FAULT_CUT = auto()  # packets more, since the fault director took large ones apart


class Stats:
    """The counters of one device; `stats.values[Counter.X] += n` is the hot way to count."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: list[int] = [0] * len(Counter)

    def add(self, counter: Counter, n: int = 1) -> None:
        """Count `n` of `counter`."""
        self.values[counter] += n

    def __getitem__(self, counter: Counter) -> int:
        return self.values[counter]

    def as_dict(self) -> dict[str, int]:
        """Lower-case names and values, in vocabulary order."""
        return {c.name.lower(): self.values[c] for c in Counter}
