"""The faulty port on a real loop, around a pair and around nothing; the control socket and its client."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from nicdev import abi
from nicdev.control import Control, Identity
from nicdev.edge.control_socket import ControlSocket, Handler, Later
from nicdev.edge.loop import Loop
from nicdev.edge.port import PairPort, Port
from nicdev.edge.port_faulty import FaultsCommand, FaultyPort
from nicdev.faults.parse import parse
from nicdev.nic import Nic, Packet
from nicdev.stats import Counter, Stats
from nicdev.tls.table import ContextTable
from tests.device.test_cli import refused, serving
from tests.support.nic_chains import PLAIN, hello, messages, segment

DEADLINE = 10
BAD = '[[rule]]\naction = "drop"\ndirection = "tx"\nflow = 0\n'


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def make_nic() -> Nic:
    stats, table, boots = Stats(), ContextTable(8), count(1)
    return Nic(stats, table, Control(Identity("1"), table, stats), lambda: next(boots))


def until(loop: Loop, condition: Callable[[], bool]) -> None:
    """Run the loop until the condition holds."""
    deadline = time.monotonic() + DEADLINE

    def check() -> None:
        assert time.monotonic() < deadline
        if condition():
            loop.stop()
        else:
            loop.call_at(loop.time() + 0.001, check)

    check()
    loop._running = not condition()
    loop.run()
    loop._running = True
    loop.call_at(None, check)


class Far:
    """Who takes what comes out of a port."""

    def __init__(self, port: Port) -> None:
        self.frames: list[bytes] = []
        self.room = 1000
        port.receiver = self.take

    def take(self, _header: memoryview, frame: memoryview) -> bool:
        self.frames.append(bytes(frame))
        self.room -= 1
        return self.room > 0


class Cable:
    """A NIC with a faulty port, a cable, and somebody at the other end of it."""

    def __init__(self, loop: Loop, scenario: str = "") -> None:
        near, self.far_port = PairPort.create(loop)
        self.nic = make_nic()
        self.port = FaultyPort(loop, near, self.nic)
        self.far, self.device = Far(self.far_port), Far(self.port)
        if scenario:
            self.port.set(parse(scenario, "t"))

    def out(self, *texts: bytes) -> None:
        for text in texts:
            assert self.port.sender(packet(text))

    def back(self, *texts: bytes) -> None:
        for text in texts:
            assert self.far_port.send(packet(text))


def packet(text: bytes) -> Packet:
    return Packet(PLAIN, memoryview(bytearray(segment(text))))


def texts(far: Far) -> list[bytes]:
    return [frame[54:] for frame in far.frames]


def test_without_a_scenario_it_only_passes_on(loop: Loop) -> None:
    cable = Cable(loop)
    cable.out(b"a")
    cable.back(b"b")
    until(loop, lambda: bool(cable.far.frames and cable.device.frames))
    assert (texts(cable.far), texts(cable.device)) == ([b"a"], [b"b"])
    assert cable.port.describe() is None


def test_the_way_to_send_changes_with_the_scenario(loop: Loop) -> None:
    cable = Cable(loop)
    for scenario, arrives in (("", True), ('[[rule]]\naction = "drop"\ndirection = "tx"\ncount = "all"\n', False)):
        cable.port.set(parse(scenario, "t"))
        cable.out(b"a")
        until(loop, lambda: not cable.far_port._waiting)
        assert bool(cable.far.frames) is arrives
        cable.far.frames.clear()
    cable.port.clear()
    cable.out(b"b")
    until(loop, lambda: bool(cable.far.frames))
    assert texts(cable.far) == [b"b"]


def test_both_directions_of_a_pair(loop: Loop) -> None:
    rules = [f'[[rule]]\naction = "swap"\ndirection = "{d}"\n' for d in ("tx", "rx")]
    cable = Cable(loop, "".join(rules))
    cable.out(b"a", b"b", b"c")
    cable.back(b"x", b"y")
    until(loop, lambda: len(cable.far.frames) == 3 and len(cable.device.frames) == 2)
    assert texts(cable.far) == [b"b", b"a", b"c"]
    assert texts(cable.device) == [b"y", b"x"]


@pytest.mark.parametrize("direction", ["tx", "rx"])
def test_what_is_held_leaves_in_time_without_traffic(loop: Loop, direction: str) -> None:
    cable = Cable(loop, f'[[rule]]\naction = "delay"\ndirection = "{direction}"\nms = 20\n')
    send, far = (cable.out, cable.far) if direction == "tx" else (cable.back, cable.device)
    began = loop.time()
    send(b"late")
    until(loop, lambda: bool(far.frames))
    assert loop.time() - began >= 0.02
    assert cable.nic.stats[Counter.FAULT_DELAYED] == 1


def test_what_the_guest_posts_while_a_frame_is_held_comes_before_it(loop: Loop) -> None:
    cable = Cable(loop, '[[rule]]\naction = "delay"\ndirection = "rx"\nms = 20\n')
    looks: list[tuple[float, int]] = []
    cable.port.before_frames = lambda: looks.append((loop.time(), len(cable.device.frames)))
    began = loop.time()
    cable.back(b"late")
    until(loop, lambda: bool(cable.device.frames))
    assert looks[-1][0] - began >= 0.02
    assert looks[-1][1] == 0


@pytest.mark.parametrize("end", ["clear", "close", "another"])
def test_what_is_held_leaves_at_the_end(loop: Loop, end: str) -> None:
    cable = Cable(loop, '[[rule]]\naction = "delay"\ndirection = "tx"\nms = 60000\ncount = "all"\n')
    cable.out(b"a", b"b")
    if end == "another":
        cable.port.set(parse("", "t"))
    else:
        getattr(cable.port, end)()
    assert [bytes(frame[54:]) for _, frame in cable.far_port._waiting] == [b"a", b"b"]
    assert cable.nic.table.observer is None or end == "another"


def test_a_device_that_is_full_gets_everything_in_order_later(loop: Loop) -> None:
    cable = Cable(loop, "[rx]\nduplicate = 1\n")
    cable.device.room = 2
    cable.back(b"a", b"b", b"c")
    until(loop, lambda: len(cable.device.frames) == 2)
    assert texts(cable.device) == [b"a", b"a"]
    for expected in (3, 4, 5, 6):
        cable.device.room = 1
        cable.port.resume()
        until(loop, lambda n=expected: len(cable.device.frames) == n)  # type: ignore[misc]
    assert texts(cable.device) == [b"a", b"a", b"b", b"b", b"c", b"c"]


def test_packets_that_the_port_refuses_are_counted(loop: Loop) -> None:
    class Shut(Port):
        def send(self, packet: Packet) -> bool:
            return False

    nic = make_nic()
    port = FaultyPort(loop, Shut(), nic)
    assert not port.send(packet(b"a"))  # the queue counts it
    port.set(parse("[tx]\nduplicate = 1", "t"))
    assert port.send(packet(b"b"))
    assert nic.stats[Counter.TX_DROP_PORT] == 2


def test_timers_of_the_loop(loop: Loop) -> None:
    ran: list[str] = []
    now = loop.time()

    def never() -> None:
        ran.append("never")

    def first() -> None:
        ran.append("first")
        loop.call_at(None, never)

    def last() -> None:
        ran.append("last")
        loop.stop()

    loop.call_at(now + 0.02, last)
    loop.call_at(now + 60, first)
    loop.call_at(now + 0.001, first)  # in place of the other time
    loop.call_at(now + 0.01, never)
    loop.run()
    assert ran == ["first", "last"]
    assert loop.time() >= now + 0.02


def test_control_command(loop: Loop) -> None:
    cables = [Cable(loop), Cable(loop)]
    asked = FaultsCommand([cable.port for cable in cables])

    def command(request: dict[str, Any]) -> dict[str, Any]:
        answer = asked(request)
        assert isinstance(answer, dict)
        return answer

    assert command({"do": "set", "text": "[tx]\ndrop = 1", "name": "f"}) == {}
    assert command({"do": "set", "text": "seed = 5", "nic": 1}) == {}
    cables[0].out(b"a")
    nics = command({})["nics"]
    assert [nic["scenario"] for nic in nics] == ["f", "scenario"]
    assert nics[0]["rules"] == [{"name": "tx drop", "action": "drop", "direction": "tx", "fitted": 1, "struck": 1}]
    error = command({"do": "set", "text": BAD, "name": "f"})
    assert error == {"ok": False, "error": "f: rule 1: key flow: 0 is not a number from 1"}
    assert command({"do": "show", "nic": 0})["nics"] == nics[:1]
    assert command({"do": "clear"}) == {}
    assert command({"do": "show"}) == {"nics": [None, None]}
    for request in ({"do": "sit"}, {"do": "set"}, {"do": "set", "text": 3}, {"nic": 2}, {"nic": True}, {"nic": "0"}):
        assert not command(request)["ok"]


REFUSE = '[[rule]]\naction = "refuse-add"\ndirection = "rx"\n'


def test_a_driver_hears_of_a_scenario_that_refuses_contexts_before_it_is_answered(loop: Loop) -> None:
    nic = make_nic()
    port = FaultyPort(loop, Port(), nic)
    port.tell, command = nic.event, FaultsCommand([port])
    assert command({"do": "set", "text": REFUSE}) == {}, "nobody is there"
    port.clear()
    nic.messages.clear()
    nic.transmit(0, hello())
    nic.messages.clear()
    assert command({"do": "set", "text": "[tx]\ndrop = 1"}) == {}
    assert nic.messages == []
    answer = command({"do": "set", "text": REFUSE})
    assert isinstance(answer, Later)
    assert not answer.ready()
    event = abi.Event._make(abi.EVENT.unpack(messages(nic, abi.ExtType.EVENT)[0]))
    assert event.code == abi.EventCode.CONFIG_CHANGED
    nic.transmit(0, hello())
    assert answer.ready()
    nic.messages.clear()
    assert command({"do": "set", "text": REFUSE}) == {}, "it has heard"
    assert nic.messages == []
    assert command({"do": "clear"}) == {}
    assert len(messages(nic, abi.ExtType.EVENT)) == 1


class Client:
    """One that asks a control socket on the same loop."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))
        self.sock.setblocking(False)
        self.heard = b""

    def answers(self) -> list[dict[str, Any]]:
        with suppress(BlockingIOError):
            self.heard += self.sock.recv(4096)
        return [json.loads(line) for line in self.heard.splitlines()]


def test_an_answer_that_has_to_wait(loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the same client asks next waits behind it, others do not; and there is an end to waiting."""
    state = {"ready": False}
    handlers: dict[str, Handler] = {
        "slow": lambda _: Later(lambda: state["ready"], "nobody came"),
        "quick": lambda _: {"n": 1},
    }
    control = ControlSocket(loop, tmp_path / "control", handlers)
    first, second, gone = (Client(tmp_path / "control") for _ in range(3))
    ask = {name: json.dumps({"cmd": name}).encode() + b"\n" for name in handlers}
    gone.sock.send(ask["slow"])
    first.sock.send(ask["slow"] + ask["quick"])
    second.sock.send(ask["quick"])
    until(loop, lambda: second.answers() == [{"ok": True, "n": 1}])
    gone.sock.close()
    assert first.answers() == []
    state["ready"] = True
    until(loop, lambda: first.answers() == [{"ok": True}, {"ok": True, "n": 1}])
    state["ready"] = False
    monkeypatch.setattr("nicdev.edge.control_socket.PATIENCE", 0.05)
    first.heard = b""
    first.sock.send(ask["slow"])
    until(loop, lambda: first.answers() == [{"ok": True, "warning": "nobody came"}])
    first.sock.send(ask["slow"])
    control.close()
    loop.call_at(loop.time() + 0.01, loop.stop)
    loop.run()
    for client in (first, second):
        client.sock.close()


# -- the programs --------------------------------------------------------------------------------------------------


def ctl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "nicdev.ctl", *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE, check=False)


def test_ctl(tmp_path: Path) -> None:
    control, scenario, bad = (tmp_path / name for name in ("control", "loss.toml", "bad.toml"))
    scenario.write_text("[rx]\ndrop = 0.01\n")
    bad.write_text(BAD)
    begin = ("--socket-path", tmp_path / "nic", "--port", "null", "--control", control, "--faults", scenario)
    with serving(*begin):
        shown = json.loads(ctl(control, "faults", "show").stdout)
        assert (shown["scenario"], [rule["name"] for rule in shown["rules"]]) == (str(scenario), ["rx drop"])
        assert ctl(control, "faults", "clear").returncode == 0
        assert ctl(control, "faults", "show").stdout == "no faults\n"
        done = ctl(control, "faults", "set", bad)
        line = f"tlsnic-ctl: {bad}: rule 1: key flow: 0 is not a number from 1\n"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", line)
        assert ctl(control, "faults", "set", scenario).returncode == 0
        assert json.loads(ctl(control, "faults", "show").stdout)["scenario"] == str(scenario)
        assert "version" in json.loads(ctl(control, "info").stdout)
        assert ctl(control, "contexts").stdout == ctl(control, "stats").stdout == ""
        assert "fault_dropped 0\n" in ctl(control, "stats", "--all").stdout
        absent = ctl(control, "faults", "set", tmp_path / "absent")
        assert absent.stderr == f"tlsnic-ctl: cannot read {tmp_path}/absent: No such file or directory\n"
    assert ctl(tmp_path / "nobody", "info").stderr.startswith(f"tlsnic-ctl: cannot ask at {tmp_path}/nobody: ")


def test_a_bad_scenario_on_the_command_line(tmp_path: Path) -> None:
    bad, binary = tmp_path / "bad.toml", tmp_path / "binary"
    bad.write_text(BAD)
    binary.write_bytes(b"\xff")
    begin: tuple[str | Path, ...] = ("--socket-path", tmp_path / "nic", "--port", "null", "--faults")
    assert refused(*begin, bad) == f"{bad}: rule 1: key flow: 0 is not a number from 1"
    assert refused(*begin, binary) == f"{binary}: not a text in UTF-8"
    assert refused(*begin, tmp_path) == f"cannot read scenario {tmp_path}: Is a directory"
    assert refused(*begin, f"1={bad}") == f"--faults 1={bad}: there is no NIC 1, the last is 0"
