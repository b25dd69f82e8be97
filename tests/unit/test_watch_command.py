"""Contexts and their histories as the control socket and tlsnic-ctl show them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nicdev import abi, ctl
from nicdev.edge.watch import ContextsCommand
from nicdev.nic import Nic
from tests.support.nic_chains import KEY, START, add, hello, make_nic, receive, record, segment

SIZE = 34  # of a record with "reply"


@pytest.fixture
def nic() -> Nic:
    """A tx context, and an rx context that lost its place with the second record."""
    nic = make_nic()
    nic.transmit(0, hello())
    add(nic, abi.Direction.TX, slot=1)
    add(nic, abi.Direction.RX, slot=3, generation=7, rx_personality=abi.RxPersonality.CORE_NEXT_HINT)
    for number in (0, 2):
        receive(nic, segment(record(b"reply", number, sealed=True), START + number * SIZE, outgoing=False))
    return nic


def ask(nic: Nic, cmd: str, **fields: Any) -> list[dict[str, Any]]:
    (contexts,) = ContextsCommand([nic])({"cmd": cmd, **fields})["nics"]
    return contexts  # type: ignore[no-any-return]


def test_contexts_show_state_and_no_history(nic: Nic) -> None:
    tx, rx = ask(nic, "contexts")
    assert "events" not in tx | rx
    assert (tx["slot"], tx["dir"], rx["slot"], rx["generation"], rx["dir"]) == (1, "tx", 3, 7, "rx")
    assert (rx["local"], rx["remote"]) == ("198.51.100.2:4000", "198.51.100.1:443")
    assert (rx["personality"], rx["state"], rx["record"], rx["seq"]) == ("core-next-hint", "lost", 1, START + SIZE)
    assert (rx["packets"], rx["passed"], rx["bytes"], rx["records"], rx["losses"]) == (1, 1, 5, 1, 1)


def test_history_shows_events(nic: Nic) -> None:
    tx, rx = ask(nic, "history")
    assert tx["events"] == []
    event, *others = rx["events"]
    assert [other["what"] for other in others] == ["scanning", "candidate"]
    assert event == {
        "number": 1,
        "at": 0.0,
        "what": "lost",
        "seq": START + SIZE,
        "record": 1,
        "why": "34 bytes missing",
    }


@pytest.mark.parametrize(
    ("flow", "slots"),
    [
        ("3", [3]),
        ("198.51.100.2:4000", [1, 3]),
        ("198.51.100.1:443", [1, 3]),
        (":443", [1, 3]),
        (":43", []),
        ("0.2:4000", []),
        ("2", []),
        ("", []),
    ],
)
def test_flow(nic: Nic, flow: str, slots: list[int]) -> None:
    for cmd in ("contexts", "history"):
        assert [context["slot"] for context in ask(nic, cmd, flow=flow)] == slots


def test_a_flow_that_is_no_text(nic: Nic) -> None:
    assert ContextsCommand([nic])({"cmd": "history", "flow": 3})["ok"] is False


def test_json_and_no_key(nic: Nic) -> None:
    text = json.dumps(ContextsCommand([nic])({"cmd": "history"}))
    assert KEY.hex() not in text
    assert "salt" not in text


def test_table(nic: Nic, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    requests: list[dict[str, Any]] = []

    def answer(_: Path, request: dict[str, Any]) -> dict[str, Any]:
        requests.append(request)
        return ContextsCommand([nic])(request)

    monkeypatch.setattr(ctl, "ask", answer)
    assert ctl.main(["socket", "history", ":443"]) == 0
    assert requests == [{"cmd": "history", "flow": ":443"}]
    tx, in_sync, rx, lost, event, *_ = capsys.readouterr().out.splitlines()
    assert tx == "slot 1 tx 198.51.100.2:4000 -> 198.51.100.1:443"
    assert in_sync == f"  in_sync, record 0 at {START}; 0 packets, 0 records in the device"
    assert rx == "slot 3 rx 198.51.100.2:4000 <- 198.51.100.1:443 core-next-hint"
    assert lost == f"  lost, record 1 at {START + SIZE}; 1 packets, 1 records in the device"
    assert event.split() == f"1 0.000000 s lost seq {START + SIZE} record 1 34 bytes missing".split()
    assert ctl.main(["socket", "history", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["events"][0]["what"] == "lost"
