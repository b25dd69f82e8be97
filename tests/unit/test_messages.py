"""What waits for the driver: bounded, events merged, one answer to HELLO."""

from __future__ import annotations

import pytest

from nicdev import abi
from nicdev.messages import MAX_MESSAGES, Messages
from nicdev.stats import Stats

DROPPED = abi.EventCode.TX_DROPPED


@pytest.fixture
def stats() -> Stats:
    return Stats()


@pytest.fixture
def messages(stats: Stats) -> Messages:
    return Messages(stats)


def extension(message: bytes) -> bytes:
    assert message[0] == abi.HDR_F_EXT
    return message[abi.VNET_HDR_LEN :]


def test_an_event_says_what_it_was_given(messages: Messages) -> None:
    messages.event(DROPPED, 7, 8, 9, 10)
    event = abi.Event._make(abi.EVENT.unpack(extension(messages[0])))
    assert event == (abi.ExtType.EVENT, DROPPED, abi.EVENT.size, 7, 8, 9, 10)


def test_events_of_a_context_merge_and_others_do_not(messages: Messages, stats: Stats) -> None:
    for slot, generation in ((1, 1), (1, 1), (2, 1), (1, 2)):
        messages.event(DROPPED, slot, generation, 3, 4)
    messages.event(DROPPED, 1, 1, 5, 6)  # for another reason, elsewhere
    messages.event(abi.EventCode.UNKNOWN_CONTEXT, 1, 1, 3, 4)
    assert len(messages) == 4
    assert stats.as_dict()["events_sent"] == 4


def test_a_driver_that_takes_nothing_costs_bounded_memory(messages: Messages, stats: Stats) -> None:
    for slot in range(MAX_MESSAGES + 5):
        messages.event(DROPPED, slot, 1, 0, 0)
    assert len(messages) == MAX_MESSAGES
    assert stats.as_dict()["events_sent"] == MAX_MESSAGES
    assert stats.as_dict()["events_dropped"] == 5


def test_a_change_is_told_to_who_takes_nothing_for_a_while(messages: Messages, stats: Stats) -> None:
    """Nobody would say it a second time, as the device does of a context."""
    for slot in range(MAX_MESSAGES):
        messages.event(DROPPED, slot, 1, 0, 0)
    for _ in range(2):
        messages.event(abi.EventCode.CONFIG_CHANGED, 0, 0, 0, 0)
    assert extension(messages[-1])[:2] == bytes([abi.ExtType.EVENT, abi.EventCode.CONFIG_CHANGED])
    assert len(messages) == MAX_MESSAGES + 1
    assert stats.as_dict()["events_dropped"] == 0


def test_only_the_last_answer_to_hello_waits_and_events_stay(messages: Messages) -> None:
    reply = bytes([abi.ExtType.HELLO_REPLY])
    messages.event(DROPPED, 1, 1, 0, 0)
    messages.hello_reply(reply + b"first")
    messages.event(DROPPED, 2, 1, 0, 0)
    messages.hello_reply(reply + b"second")
    assert [extension(message)[0] for message in messages] == [abi.ExtType.EVENT] * 2 + [abi.ExtType.HELLO_REPLY]
    assert extension(messages[-1]) == reply + b"second"
