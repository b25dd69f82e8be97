"""The benchmark's arithmetic and its file. That its arms run at all: the smoke test at the end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from scapy.layers.inet import IP, TCP

from bench.__main__ import main
from bench.goals import GOALS, Goal
from bench.guest import Disagreement, records_read, recovered_after
from bench.registry import Group, Measured, Session, groups, interleaved, ratios
from bench.results import Results, Surroundings, entry
from bench.verdicts import Flow, Stretch, Verdicts, taken
from nicdev.edge.capture import Capture
from nicdev.observer import View
from testbed.bed import Bed
from testbed.errors import BedError
from tests.support.ether import ETH

HERE = Surroundings("make bench", "2 x Some CPU", "abc", "2026-01-01T00:00:00+00:00", "QEMU 10.0.8", "6.12.1", "tcg")
NAME = "rx_loss5_records_offloaded"


def test_value_is_the_median_and_spread_the_range() -> None:
    measured = Measured("x", "%", [90.0, 97.0, 91.0])
    assert (measured.value, measured.spread) == (91.0, 7.0)
    assert measured.control_variation is None
    assert not measured.unsteady


@pytest.mark.parametrize(
    ("control", "variation", "unsteady"),
    [([100.0, 105.0, 109.0], 9 / 105, False), ([100.0, 100.0, 111.0], 0.11, True), ([0.0, 0.0], 0.0, False)],
)
def test_control_arm_that_varies(control: list[float], variation: float, unsteady: bool) -> None:
    measured = Measured("x", "ratio", [1.0], control)
    assert measured.control_variation == pytest.approx(variation)
    assert measured.unsteady is unsteady


def test_arms_are_interleaved() -> None:
    order: list[tuple[str, int]] = []

    def arm(name: str, number: int) -> float:
        order.append((name, number))
        return len(order)

    found = interleaved({name: lambda number, name=name: arm(name, number) for name in "ab"}, 2)  # type: ignore[misc]
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert ratios(found["a"], found["b"]) == [1 / 2, 3 / 4]


@pytest.mark.parametrize(
    ("goal", "value", "met"),
    [
        (Goal(90), 90.0, True),
        (Goal(90), 89.9, False),
        (Goal(256, less_is_better=True), 256, True),
        (Goal(256, less_is_better=True), 257, False),
        (Goal(anchor=43), 1.0, None),
    ],
)
def test_goals(goal: Goal, value: float, met: bool | None) -> None:
    assert goal.met(value) is met


def test_an_entry_has_all_that_is_needed_to_judge_it() -> None:
    found = entry(Measured(NAME, "%", [95.0, 93.0], [100.0, 80.0], {"records": 7}), "guest", HERE)
    assert (found["value"], found["unit"], found["spread"], found["rounds"]) == (94.0, "%", 2.0, 2)
    assert (found["target"], found["anchor"], found["met"]) == (90, 43, True)
    assert (found["unsteady"], found["control_variation"]) == (True, pytest.approx(20 / 90, abs=1e-4))
    assert (found["command"], found["commit"], found["kernel"], found["accelerator"]) == (
        "make bench", "abc", "6.12.1", "tcg",
    )  # fmt: skip
    assert found["details"] == {"records": 7}


def test_a_qemu_has_goals_of_its_own() -> None:
    measured = Measured("tx_offload_over_software", "x", [4.0])
    name = measured.name + "_linux_6_1"
    assert entry(measured, "guest", HERE, name)["target"] == 3.0
    assert entry(measured, "guest", HERE, name + "_qemu_7_2")["target"] == 5.0


def test_runs_are_merged(tmp_path: Path) -> None:
    """A later run replaces what it measured and leaves the rest."""
    path = tmp_path / "deep" / "bench.json"

    def run(name: str, value: float) -> dict[str, Any]:
        Results(path).add(name, entry(Measured(name, "%", [value]), "guest", HERE))
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    run("a", 1.0)
    run("b", 2.0)
    found = run("a", 3.0)
    assert {name: figure["value"] for name, figure in found["figures"].items()} == {"a": 3.0, "b": 2.0}
    assert found["machine"] == HERE.machine
    assert list(tmp_path.rglob(".tmp*")) == []


def test_without_a_path_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = Results(None)
    results.add("a", entry(Measured("a", "%", [1.0]), "guest", HERE))
    assert list(results.figures) == ["a"]
    assert list(tmp_path.iterdir()) == []


def test_records_by_device() -> None:
    """Three records of 10 bytes, the sequence wraps; a later copy by the device does not make up for the first."""
    base = 2**32 - 5
    flow = Flow()
    for offset, length, by_device in ((10, 5, True), (0, 10, True), (20, 10, False), (15, 10, True), (20, 10, True)):
        flow.packets.append(((base + offset) % 2**32, length, by_device))
    assert flow.records_by_device([10, 20, 30]) == [True, True, False]
    assert flow.records_by_device([10, 20, 31]) == [True, True, False]


@pytest.mark.parametrize(
    ("packets", "found"),
    [
        ([(0, 4, True), (2, 6, False)], [(0, 4, True), (4, 6, False)]),  # an overlap at the front
        ([(4, 6, True), (0, 5, False)], [(0, 5, False), (5, 6, True)]),  # in order, over one that waits
        ([(4, 8, True), (5, 7, False), (0, 4, True)], [(0, 4, True), (4, 8, True)]),  # adds nothing
        ([(5, 7, True), (4, 8, False), (0, 4, True)], [(0, 4, True), (4, 8, False)]),  # covers one that waits
        ([(4, 7, True), (5, 9, False), (0, 4, True)], [(0, 4, True), (4, 7, True), (7, 9, False)]),  # both wait
        ([(0, 4, True), (0, 4, False), (6, 8, True)], [(0, 4, True)]),  # again; behind a hole
    ],
)
def test_copies_that_tcp_takes(packets: list[Stretch], found: list[Stretch]) -> None:
    assert taken(packets) == found


def traced(sock: str, number: int, encrypted: int, decrypted: int) -> str:
    """A line as the kernel writes it."""
    return (
        f"  python3-168  [000] .l...  20.1: tls_device_decrypted: sk={sock} tcp_seq=14 rec_no={number} len=16413"
        f" encrypted={encrypted} decrypted={decrypted}"
    )


def test_the_kernels_trace_is_read_flow_by_flow() -> None:
    """Wholly decrypted, mixed, not at all; two flows, and an event that is another one's."""
    lines = [
        traced("0a", 5, 0, 1),
        traced("0b", 9, 1, 0),
        traced("0a", 6, 0, 0),
        "x: tls_other: sk=0c",
        traced("0a", 7, 0, 1),
    ]
    assert records_read(lines) == {5: [True, False, True], 9: [False]}
    with pytest.raises(Disagreement):
        records_read([*lines, traced("0b", 11, 0, 1)])


def segment(sport: int, dport: int, seq: int, payload: bytes) -> bytes:
    """A frame with a TCP segment."""
    return bytes(ETH / IP(src="192.0.2.1", dst="192.0.2.2") / TCP(sport=sport, dport=dport, seq=seq) / payload)


@pytest.mark.filterwarnings("ignore:Field type should not be:DeprecationWarning")  # python-pcapng, of its own option
def test_the_devices_verdicts_are_read_along(tmp_path: Path) -> None:
    """Each packet has two views; the verdict is with the second one."""
    verdicts = Verdicts(tmp_path / "fifo")
    capture = Capture(verdicts.path)
    counted: Counter[str] = Counter()
    bed = cast(Bed, SimpleNamespace(nic=SimpleNamespace(stats=lambda: counted)))

    def passes(direction: str, frame: bytes, comment: str) -> None:
        views = (View.WIRE, View.HOST) if direction == "rx" else (View.HOST, View.WIRE)
        for view, said in zip(views, ("", comment), strict=True):
            capture.packet(1, view, direction, frame, said)
        counted["rx_wire_packets" if direction == "rx" else "tx_packets"] += 1

    passes("rx", segment(443, 50000, 1, b"before"), "slot=0 gen=1 rx decrypted records=1")
    with verdicts.watching(bed) as flows:
        passes("rx", segment(443, 50000, 100, b"abc"), "slot=0 gen=1 rx decrypted records=1")
        passes("rx", segment(443, 50000, 103, b"defg"), "slot=0 gen=1 rx untouched records=0")
        passes("tx", segment(50000, 443, 7, b"hi"), "slot=1 gen=1 tx encrypted")
        passes("tx", segment(50000, 443, 9, b"clear"), "")
        passes("tx", segment(50000, 443, 14, b""), "")
    capture.close()
    assert flows["rx", 443].packets == [(100, 3, True), (103, 4, False)]
    assert flows["tx", 443].packets == [(7, 2, True), (9, 5, False)]


@pytest.mark.parametrize(
    ("misses", "after"),
    [([], 0), ([0], 0), ([0, 1], 1), ([5, 100], 1 + 5), ([5, 105], 0), ([250, 251], 251)],
)
def test_recovered_after(misses: list[int], after: int) -> None:
    offloaded = [index not in misses for index in range(400)]
    assert recovered_after(offloaded) == after


def test_a_stream_that_does_not_recover() -> None:
    assert recovered_after([True] * 398 + [False] * 2) > 256


def test_groups_are_told_apart() -> None:
    names = [group.name for group in groups()]
    assert len(set(names)) == len(names)
    assert {group.kind for group in groups()} <= {"simulation", "device", "guest"}


def test_an_unknown_group_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "nonsense"]) == 1
    assert "there are simulation" in capsys.readouterr().err


def test_smoke_run_of_the_simulation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure that it has a goal for is measured."""
    simulated = ",".join(group.name for group in groups() if group.kind == "simulation")
    path = tmp_path / "bench.json"
    assert main(["--smoke", "--only", simulated, "--output", str(path)]) == 0
    figures = json.loads(path.read_text())["figures"]
    assert {name for name in GOALS if name.startswith("sim_")} <= set(figures)
    assert all(0 <= figures[name]["value"] <= 100 for name in figures if figures[name]["unit"] == "%")
    assert "Smoke test" in capsys.readouterr().out


def test_a_group_that_fails_leaves_the_others_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = 0

    def fails(_: Session) -> Iterator[Measured]:
        yield Measured("before", "x", [1.0])
        raise BedError("the wire broke")

    def close(_: Session) -> None:
        nonlocal closed
        closed += 1
        if closed == 1:
            raise OSError("the guest is gone, too")

    def works(_: Session) -> Iterator[Measured]:
        yield Measured("after", "x", [2.0])

    both = [Group("first", "device", "fails", fails), Group("second", "device", "works", works)]
    monkeypatch.setattr("bench.__main__.groups", lambda: both)
    monkeypatch.setattr(Session, "close", close)
    path = tmp_path / "bench.json"
    assert main(["--output", str(path)]) == 1
    assert set(json.loads(path.read_text())["figures"]) == {"before", "after"}
    said = capsys.readouterr()
    assert "error: first: the wire broke" in said.err
    assert "not measured to the end: first" in said.err
    assert "after" in said.out
