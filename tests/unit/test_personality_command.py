"""Changing the rx personality at run time: new contexts obey, the driver is told, old contexts stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from nicdev import abi
from nicdev.control import Control, Identity
from nicdev.edge.device import Device
from nicdev.edge.loop import Loop
from nicdev.edge.personality import PersonalityCommand
from nicdev.edge.port import Port
from nicdev.nic import Nic
from nicdev.stats import Stats
from nicdev.tls.personality import RX_PERSONALITIES
from nicdev.tls.table import ContextTable
from tests.support.nic_chains import command as chain
from tests.support.nic_chains import ctx_add, hello, status


@pytest.fixture
def make() -> Iterator[Callable[[], Device]]:
    loop = Loop()

    def device() -> Device:
        stats, table = Stats(), ContextTable(8)
        nic = Nic(stats, table, Control(Identity("test"), table, stats), lambda: 1)
        return Device(loop, nic, Port(), 1)

    yield device
    loop.close()


def greet(nic: Nic) -> int:
    """Say HELLO; the rx personality that the device names."""
    nic.transmit(0, hello())
    reply = abi.HelloReply._make(abi.HELLO_REPLY.unpack(nic.messages[-1][abi.VNET_HDR_LEN :]))
    nic.messages.clear()
    return reply.rx_personality


def add_as_heard(nic: Nic, heard: int, slot: int) -> None:
    """The driver makes a context as the last HELLO_REPLY told it to."""
    body = ctx_add(abi.Direction.RX, rx_personality=heard, port=4000 + slot)
    assert status(nic.transmit(0, chain(abi.Opcode.CTX_ADD, slot, body=body))) == abi.Status.OK


def names(device: Device) -> list[object]:
    return [context.describe()["personality"] for _, _, context in device.nic.table]


def test_all_four_in_turn(make: Callable[[], Device]) -> None:
    device = make()
    command = PersonalityCommand([device])
    assert set(RX_PERSONALITIES) == {"driver-req", "driver-req-async", "core-next-hint", "ideal"}
    for slot, name in enumerate(RX_PERSONALITIES):
        assert command({"rx": name}) == {"nics": [{"rx": name, "tx": "rebuild"}]}
        add_as_heard(device.nic, greet(device.nic), slot)
    assert names(device) == list(RX_PERSONALITIES)


@pytest.mark.parametrize("heard", RX_PERSONALITIES)
@pytest.mark.parametrize("now", RX_PERSONALITIES)
def test_a_context_made_before_the_driver_has_heard(make: Callable[[], Device], heard: str, now: str) -> None:
    """The kernel answers such a context in the way that the driver chose: the device must ask in that way."""
    device = make()
    command = PersonalityCommand([device])
    command({"rx": heard})
    personality = greet(device.nic)
    command({"rx": now})
    add_as_heard(device.nic, personality, 0)
    add_as_heard(device.nic, greet(device.nic), 1)
    assert names(device) == [heard, now]


def test_the_driver_is_told_and_says_hello_again(make: Callable[[], Device]) -> None:
    device = make()
    command = PersonalityCommand([device])
    command({"rx": "driver-req"})
    assert device.nic.messages == []  # nobody to tell
    greet(device.nic)
    command({"rx": "driver-req-async"})
    event = abi.Event._make(abi.EVENT.unpack(device.nic.messages[0][abi.VNET_HDR_LEN :]))
    assert event.code == abi.EventCode.CONFIG_CHANGED
    reply = abi.HelloReply._make(abi.HELLO_REPLY.unpack(device.nic.control.hello_reply(0, 0)))
    assert reply.rx_personality == abi.RxPersonality.DRIVER_REQ_ASYNC


def test_tx_is_told_by_the_next_hello_reply(make: Callable[[], Device]) -> None:
    device = make()
    greet(device.nic)
    for name, value in (("next-record", abi.TxPersonality.NEXT_RECORD), ("rebuild", abi.TxPersonality.REBUILD)):
        device.nic.messages.clear()
        assert PersonalityCommand([device])({"tx": name}) == {"nics": [{"rx": "ideal", "tx": name}]}
        event = abi.Event._make(abi.EVENT.unpack(device.nic.messages[0][abi.VNET_HDR_LEN :]))
        assert event.code == abi.EventCode.CONFIG_CHANGED
        reply = abi.HelloReply._make(abi.HELLO_REPLY.unpack(device.nic.control.hello_reply(0, 0)))
        assert reply.tx_personality == value


def test_one_of_two_nics(make: Callable[[], Device]) -> None:
    command = PersonalityCommand([make(), make()])
    answer = {"nics": [{"rx": "ideal", "tx": "rebuild"}, {"rx": "driver-req", "tx": "next-record"}]}
    assert command({"rx": "driver-req", "tx": "next-record", "nic": 1}) == answer
    assert command({}) == answer


@pytest.mark.parametrize(
    "request_", [{"rx": "best"}, {"rx": "ideal", "tx": "best"}, {"rx": 4}, {"rx": "ideal", "nic": 1}, {"nic": True}]
)
def test_refused(make: Callable[[], Device], request_: dict[str, object]) -> None:
    answer = PersonalityCommand([make()])(request_)
    assert answer["ok"] is False
