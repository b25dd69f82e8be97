"""The NIC's tap and its namespace, without a guest: what can be wrong with them, and that nothing of them stays."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.errors import SetupError
from testbed.nic import NicProcess
from testbed.wire.namespace import Wire, held_wire
from tests.device.test_cli import AS_ROOT, PROGRAM, refused

pytestmark = [pytest.mark.guest, pytest.mark.timeout(60)]

ADDRESSES = "address=198.51.100.1/24,address=2001:db8:1::1/64"


@pytest.fixture
def wire() -> Iterator[Wire]:
    with held_wire() as wire:
        yield wire


def nic(folder: Path, port: str, wire: Wire | None = None) -> NicProcess:
    return NicProcess([folder / "nic"], port, folder / "log", wire=wire)


def links(wire: Wire) -> dict[str, dict[str, Any]]:
    return {link["ifname"]: link for link in json.loads(wire.run(["ip", "-json", "address"]))}


def test_a_namespace_of_its_own(tmp_path: Path) -> None:
    ours = os.stat("/proc/self/ns/net").st_ino
    with nic(tmp_path, f"tap:name=here,{ADDRESSES},mtu=4000") as running:
        found = links(Wire(running.pid))
        assert os.stat(f"/proc/{running.pid}/ns/net").st_ino != ours
    assert set(found) == {"lo", "here"}
    assert found["here"]["mtu"] == 4000
    assert "UP" in found["lo"]["flags"]
    addresses = {entry["local"] for entry in found["here"]["addr_info"]}
    assert {"198.51.100.1", "2001:db8:1::1"} <= addresses
    assert "here" not in os.listdir("/sys/class/net")


def test_a_tap_that_is_taken(tmp_path: Path, wire: Wire) -> None:
    other = tmp_path / "other"
    other.mkdir()
    port = "tap:netns=current,name=mine"
    busy = pytest.raises(SetupError, match="cannot create tap interface mine: Device or resource busy")
    with nic(tmp_path, port, wire), busy:
        nic(other, port, wire).start()
    assert "mine" not in links(wire)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("name=lo", "cannot create tap interface lo: Invalid argument"),
        (
            "name=mine,mtu=1000,address=2001:db8::1/64",
            "cannot set up mine with mtu 1000 and addresses 2001:db8::1/64: ",
        ),
    ],
)
def test_a_tap_that_cannot_be(tmp_path: Path, wire: Wire, options: str, line: str) -> None:
    with pytest.raises(SetupError, match=line):
        nic(tmp_path, f"tap:netns=current,{options}", wire).start()
    assert set(links(wire)) == {"lo", wire.interface}
    assert not (tmp_path / "nic").exists()


def test_a_tap_that_stays_while_nics_come_and_go(tmp_path: Path, wire: Wire) -> None:
    running = nic(tmp_path, f"tap:netns=current,{ADDRESSES}", wire)
    for _ in range(2):
        running.start()
        addresses = {entry["local"] for entry in links(wire)["wire0"]["addr_info"]}
        assert {"198.51.100.1", "2001:db8:1::1"} <= addresses
        running.kill()
    running.start()
    assert running.stop() == 0
    assert not running.sockets[0].exists()


def test_a_named_namespace_is_removed_at_the_end() -> None:
    """In a mount namespace of the test's own, where /run is empty."""
    script = 'mount -t tmpfs none /run; "$@" || { status=$?; ls -A /run/netns; exit $status; }'
    program = [*AS_ROOT, "sh", "-ec", script, "sh", *PROGRAM]
    line = refused("--socket-path", "/nowhere/nic", "--port", "tap:netns=lab", program=program)
    assert line == "cannot listen at /nowhere/nic: No such file or directory"
