"""The benchmark's groups without a guest: that they run at all, and that what they measure they also prove."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest

from bench.__main__ import main
from bench.child import Child, Talk
from bench.device_rx import RxArm
from bench.device_tx import StreamArm
from bench.goals import DEVICE
from bench.registry import groups
from bench.rig import Recorder, Rig, Shape
from bench.work import SEALED, TSO
from nicdev.nic import Packet
from nicdev.stats import Counter
from testbed.errors import BedError


@pytest.mark.needs_netns
def test_smoke_run_of_all_groups_without_a_guest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure that they have a goal for is measured."""
    path = tmp_path / "bench.json"
    names = ",".join(group.name for group in groups() if group.kind == "device")
    assert main(["--smoke", "--only", names, "--output", str(path)]) == 0, capsys.readouterr().err
    figures = json.loads(path.read_text())["figures"]
    assert set(DEVICE) <= set(figures)
    assert all(figure["kind"] == "device" and figure["value"] > 0 for figure in figures.values())


@pytest.mark.parametrize("payload", [TSO, SEALED])
def test_a_wrong_tag_fails_the_run(payload: int) -> None:
    """In the last record that left, whose tag is the last thing in its packet."""

    class Spoiling(Recorder):
        def send(self, packet: Packet) -> bool:
            packet.frame[-1] ^= 1
            return super().send(packet)

    with ExitStack() as stack:
        arm = StreamArm(stack, 32, payload)
        arm.run(2, 2)
        with mock.patch("bench.rig.Recorder", Spoiling), pytest.raises(BedError, match="is not what it must be"):
            arm.run(2, 2)


def test_a_dropped_packet_fails_the_run() -> None:
    shape = Shape(64, {"commands": {}, "stream": {"payload": SEALED, "packets": 64}})
    with Rig(shape) as rig, pytest.raises(BedError, match="tx_drop_unknown_context"):
        rig.run("stream", 64)  # no context was made


def test_records_that_are_not_decrypted_fail_the_run() -> None:
    with ExitStack() as stack:
        arm = RxArm(stack, 4, TSO)
        arm.add(1)
        with pytest.raises(BedError, match="rx_tls_packets is 4, not 8"):
            arm.run(range(2))  # the second flow has no context


def test_commands_are_counted_and_their_contexts_there() -> None:
    with Rig(Shape(64, {"commands": {}})) as rig:
        rig.run("add_tx", 100)
        assert len(rig.nic.table) == 100
        rig.run("delete", 100)
        assert len(rig.nic.table) == 0
        assert rig.nic.stats[Counter.CTX_DELETED] == 100


def test_an_order_that_fails_in_the_driver_ends_the_run() -> None:
    """CTX_ADD of a slot that is taken is refused, and the driver reads its replies."""
    with Rig(Shape(64, {"commands": {}})) as rig:
        rig.run("add_tx", 10)
        rig.again("add_tx")
        with pytest.raises(BedError, match="the synthetic driver ended with status 1"):
            rig.run("add_tx", 10)


def fail(_talk: Talk, why: str) -> None:
    """A part of a benchmark that fails."""
    raise BedError(why)


def test_a_child_that_fails_says_why() -> None:
    with Child("tests.device.test_bench_device:fail", why="it rains") as child, pytest.raises(BedError) as caught:
        child.hear()
    assert str(caught.value) == "it rains"
