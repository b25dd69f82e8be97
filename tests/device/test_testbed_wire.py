"""Programs in another process's namespaces, and a capture there that loses nothing: loopback stands for the wire."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.errors import SetupError
from testbed.peers.flowkeys import FlowKeys
from testbed.peers.peer import Peer
from testbed.peers.stream import sample, sha256_of
from testbed.wire.decoder import Keys, decode, fixed_keys
from testbed.wire.namespace import Wire
from testbed.wire.pcapfile import CaptureError
from testbed.wire.wirecapture import WireCapture

pytestmark = pytest.mark.needs_netns

FLOW = FlowKeys.from_seed("aes-128-gcm", "wire")
MIRRORED = FlowKeys("aes-128-gcm", tx=FLOW.rx, rx=FLOW.tx)


@pytest.fixture
def wire() -> Iterator[Wire]:
    """A network namespace with nothing but loopback, as a NIC of an ordinary user would make it."""
    script = "ip link set lo up && echo ready && exec cat"
    argv = ["unshare", "--net", "--user", "--map-root-user", "--", "sh", "-c", script]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        yield Wire(holder.pid, "lo")
        holder.communicate()


def links(wire: Wire) -> list[str]:
    found: list[dict[str, Any]] = json.loads(wire.run(["ip", "-json", "link"]))
    return [link["ifname"] for link in found]


def test_programs_run_in_the_namespace(wire: Wire) -> None:
    assert links(wire) == ["lo"]
    with pytest.raises(SetupError, match=r"ip in the wire's namespace: .*nowhere"):
        wire.run(["ip", "link", "show", "nowhere"])


def test_a_process_that_is_gone_has_no_wire() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    with pytest.raises(SetupError, match="cannot enter the NIC's network namespace: No such file"):
        Wire(process.pid).run(["true"])


def test_a_capture_has_everything_that_peers_said(wire: Wire, tmp_path: Path) -> None:
    size = 300_000
    with WireCapture(wire, tmp_path / "lo.pcap") as capture:
        steps = [{"do": "recv", "size": size}, {"do": "send", "size": size}]
        server = {"listen": ["::1", 0], **FLOW.as_job(), "seed": "down", "steps": steps}
        with Peer(wire, "raw", server) as one:
            steps = [{"do": "send", "size": size}, {"do": "recv", "size": size}, {"do": "eof"}]
            client = {"connect": ["::1", one.port], **MIRRORED.as_job(), "seed": "up", "steps": steps}
            with Peer(wire, "raw", client) as other:
                assert other.result()["ok"]
    report = decode(capture.path, Keys(fixed_keys(FLOW, ("::1", one.port)), samples=[sample("up"), sample("down")]))
    assert report.ok
    assert [stream.sha256 for stream in report.streams] == [sha256_of("up", size), sha256_of("down", size)]
    assert report.records == report.records_decrypted_ok == 2 * (-(-size // 16384))


def test_a_capture_of_no_interface_says_so(wire: Wire, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"tcpdump does not record wire0: .*wire0"):
        WireCapture(Wire(wire.pid), tmp_path / "none.pcap").start()
