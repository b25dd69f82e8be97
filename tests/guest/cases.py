"""Connections and circumstances that several tests of the data path need; exchange.py runs them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from testbed.bed import Bed
from tests.guest.exchange import ASK, ASKED, EOF, SHUTDOWN, Case, Step, recv, send


def install(*dirs: str) -> Step:
    """Step: give the kernel the keys of these directions ("tx", "rx")."""
    return {"do": "install", "dirs": [*dirs]}


def send_clear(data: bytes) -> Step:
    """Step: send this before there is TLS."""
    return {"do": "send_clear", "data": data.hex()}


def recv_clear(size: int) -> Step:
    """Step: receive so much before there is TLS."""
    return {"do": "recv_clear", "size": size}


def control(kind: int, data: str) -> Step:
    """Step: send a record of this type of its own; `data` is hexadecimal."""
    return {"do": "record", "kind": kind, "data": data}


CLOSE_NOTIFY = control(21, "0100")
ZEROCOPY: Step = {"do": "option", "name": "TLS_TX_ZEROCOPY_RO", "value": 1}  # files that are sent will not change

# Scenario: a rule for a flow that is none. But where contexts may be refused, the driver waits for the reply to each:
# they are in the device when the application has set its keys.
AWAITED = """
[[rule]]
action = "refuse-add"
direction = "tx"
local = "192.0.2.1:*"
"""
# Scenario: the guest hears nothing any more.
DEAF = """
[[rule]]
action = "drop"
direction = "rx"
only = "tcp"
count = "all"
"""


def tx_flow(seed: str, guest: Sequence[Step], peer: Sequence[Step], **options: Any) -> Case:
    """Only the guest encrypts, and it ends the connection; `guest` and `peer` are what they do before."""
    return Case(seed, [*guest, SHUTDOWN], [*peer, EOF], dirs=("tx",), **options)


def rx_flow(seed: str, guest: Sequence[Step], peer: Sequence[Step], **options: Any) -> Case:
    """Only the peer encrypts, and it ends the connection. It begins when the guest asks, who has its context by then
    unless it is a step of `guest` that installs it."""
    return Case(seed, [ASK, *guest, EOF], [ASKED, *peer, SHUTDOWN], dirs=("rx",), **options)


def both_ways(seed: str, size: int, **options: Any) -> Case:
    """The guest sends `size` bytes, then receives as many, and ends the connection."""
    return Case(seed, [send(size), recv(size), SHUTDOWN, EOF], [recv(size), send(size), EOF, SHUTDOWN], **options)


@contextmanager
def egress(bed: Bed, rule: str) -> Iterator[None]:
    """Between TCP and the driver, what the guest sends over IPv4 meets this rule of `tc`: a match and an action."""
    try:
        for command in ("qdisc add dev eth0 clsact", f"filter add dev eth0 egress protocol ip {rule}"):
            bed.agent.run(["tc", *command.split()])
        yield
    finally:
        bed.agent.run(["tc", "qdisc", "del", "dev", "eth0", "clsact"])
