"""The peers against each other and against the guest's own tool (without kTLS) over loopback."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from testbed.peers.flowkeys import FlowKeys
from testbed.peers.peer import Peer, PeerError
from testbed.peers.rawtls import Opener, RecordError, Sealer
from testbed.peers.stream import sample, sha256_of, stream
from testbed.wire.tls12 import read_keylog

TOOLS = Path(__file__).parents[2] / "guest-image" / "tools"
FLOW = FlowKeys.from_seed("aes-256-gcm", "peers", rec_seq=3)


def mirrored(flow: FlowKeys) -> dict[str, Any]:
    """A job's keys for a raw peer that plays the guest: peers seal with rx."""
    return FlowKeys(flow.cipher, tx=flow.rx, rx=flow.tx).as_job()


def guest_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(TOOLS))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(TOOLS))
    return module


def converse(kind: str, server: dict[str, Any], client: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    with (
        Peer(None, kind, {"listen": ["127.0.0.1", 0], **server}) as one,
        Peer(None, kind, {"connect": ["127.0.0.1", one.port], **client}) as other,
    ):
        return one.result(), other.result()


@pytest.mark.parametrize("size", [0, 1, 4096, 50_001])
def test_host_and_guest_make_the_same_stream(size: int) -> None:
    common = guest_tool("ktls_common")
    assert stream("seed", size) == bytes(common.stream("seed", size))
    assert sha256_of("seed", size) == common.sha256(common.stream("seed", size))


def test_stream_blocks_differ_and_show_the_sample() -> None:
    data = stream("seed", 3 * 512)
    blocks = {data[at : at + 512] for at in range(0, len(data), 512)}
    assert len(blocks) == 3
    assert all(sample("seed") in block for block in blocks)
    assert sample("seed") != sample("other")


def test_guest_tool_packs_the_kernels_structure() -> None:
    keys = FLOW.tx
    packed = guest_tool("ktls_raw").crypto_info(FLOW.cipher, **keys.as_json())
    head = (0x0303).to_bytes(2, sys.byteorder) + (52).to_bytes(2, sys.byteorder)
    assert packed == head + keys.iv + keys.key + keys.salt + bytes(7) + b"\x03"
    assert len(packed) == 4 + 8 + 32 + 4 + 8


@pytest.mark.parametrize("cipher", ["aes-128-gcm", "aes-256-gcm"])
def test_raw_peers_both_ways(cipher: str) -> None:
    flow = FlowKeys.from_seed(cipher, "x")
    alert = {"do": "record", "kind": 21, "data": "0100"}
    send = {"do": "send", "size": 100_000, "records": [1, 16384, 700], "writes": [1, 5, 1448]}
    one, other = converse(
        "raw",
        {**flow.as_job(), "seed": "down", "steps": [{"do": "echo", "size": 5000}, send, alert, {"do": "shutdown"}]},
        {
            **mirrored(flow),
            "seed": "up",
            "steps": [{"do": "send", "size": 5000}, {"do": "recv", "size": 105_000}, {"do": "eof"}],
        },
    )
    assert one["ok"], one
    assert other["ok"], other
    assert one["sha256_received"] == sha256_of("up", 5000)
    assert other["sha256_sent"] == sha256_of("up", 5000)
    assert other["received"] == 105_000
    assert other["sha256_received"] == one["sha256_sent"]
    assert other["control"] == [{"kind": 21, "data": "0100"}]
    assert other["records_received"] == one["records_sent"]


def test_clear_bytes_before_the_first_record() -> None:
    one, other = converse(
        "raw",
        {**FLOW.as_job(), "steps": [{"do": "send_clear", "data": "00010203"}, {"do": "send", "size": 9000}]},
        {**mirrored(FLOW), "steps": [{"do": "recv_clear", "size": 4}, {"do": "recv", "size": 9000}, {"do": "eof"}]},
    )
    assert (one["ok"], other["ok"]) == (True, True)
    assert other["sha256_received"] == sha256_of("", 9000)


def test_writes_apart_arrive() -> None:
    send = {"do": "send", "size": 3000, "records": [1000], "writes": [700], "apart": True}
    one, other = converse(
        "raw",
        {**FLOW.as_job(), "options": {"TCP_MAXSEG": 536, "TCP_CONGESTION": "reno"}, "steps": [send, {"do": "drain"}]},
        {**mirrored(FLOW), "steps": [{"do": "recv", "size": 3000}, {"do": "eof"}]},
    )
    assert (one["ok"], other["ok"]) == (True, True)
    assert other["sha256_received"] == sha256_of("", 3000)


@pytest.mark.parametrize("spot", ["type", "version", "length", "nonce", "ciphertext", "tag"])
def test_a_spoilt_record_is_refused(spot: str) -> None:
    _, other = converse(
        "raw",
        {**FLOW.as_job(), "spoil": {"2": spot}, "steps": [{"do": "send", "size": 5000, "records": [1000]}]},
        {**mirrored(FLOW), "steps": [{"do": "recv", "size": 5000}]},
    )
    assert not other["ok"]
    assert (other["error"]["step"], other["error"]["kind"]) == (0, "RecordError")
    assert "record 5" in other["error"]["message"]


def test_wrong_number_is_refused() -> None:
    sealer, opener = Sealer(FLOW.tx), Opener(FLOW.tx)
    sealer.seal(b"lost")
    with pytest.raises(RecordError, match="record 3: its tag does not verify"):
        list(opener.feed(sealer.seal(b"next")))


@pytest.mark.parametrize("cipher", ["ECDHE-RSA-AES128-GCM-SHA256", "ECDHE-RSA-AES256-GCM-SHA384"])
def test_openssl_peers(tmp_path: Path, cipher: str) -> None:
    keylog = tmp_path / "keylog"
    one, other = converse(
        "openssl",
        {
            "cipher": cipher,
            "keylog": str(keylog),
            "steps": [{"do": "recv", "size": 70_000}, {"do": "send", "size": 50_000}, {"do": "shutdown"}],
        },
        {
            "cipher": cipher,
            "seed": "up",
            "steps": [{"do": "send", "size": 70_000}, {"do": "recv", "size": 50_000}, {"do": "eof"}],
        },
    )
    assert one["ok"], one
    assert other["ok"], other
    assert one["sha256_received"] == sha256_of("up", 70_000)
    assert other["sha256_received"] == sha256_of("", 50_000)
    assert len(read_keylog(keylog.read_text())) == 1


def test_a_peer_that_waits_goes_on_when_told() -> None:
    steps = [{"do": "wait"}, {"do": "send", "size": 10}]
    with Peer(None, "raw", {"listen": ["127.0.0.1", 0], "steps": steps}) as peer:
        client = {"connect": ["127.0.0.1", peer.port], "steps": [{"do": "recv", "size": 10}, {"do": "eof"}]}
        with Peer(None, "raw", client) as other:
            peer.await_waiting()
            peer.release()
            assert peer.result()["ok"]
            assert other.result()["ok"]


def test_a_peer_that_cannot_start_says_why() -> None:
    with pytest.raises(PeerError, match="Cannot assign requested address"):
        Peer(None, "raw", {"listen": ["192.0.2.1", 0]})
    with pytest.raises(PeerError, match="did not get to 'listening'"):
        Peer(None, "openssl", {"listen": ["127.0.0.1", 0], "cipher": "NO-SUCH-CIPHER"})


def test_the_guests_tool_without_keys_against_a_peer() -> None:
    """Everything of the tool but kTLS, which this machine's kernel may not have."""
    server = {
        "listen": ["127.0.0.1", 0],
        "seed": "down",
        "steps": [{"do": "recv", "size": 30_000}, {"do": "send", "size": 20_000}, {"do": "shutdown"}, {"do": "eof"}],
    }
    with Peer(None, "raw", server) as first, Peer(None, "raw", server) as second:
        job = {
            "seed": "up",
            "steps": [
                {"do": "send", "size": 10_000, "write": 999, "more": True},
                {"do": "sendfile", "size": 20_000, "write": 7000},
                {"do": "wait"},
                {"do": "recv", "size": 20_000},
                {"do": "eof"},
            ],
            "connections": [{"connect": ["127.0.0.1", peer.port]} for peer in (first, second)],
        }
        tool = [sys.executable, str(TOOLS / "ktls_raw.py")]
        lines = json.dumps(job) + "\ngo on\n"
        done = subprocess.run(tool, input=lines, capture_output=True, text=True, timeout=30, check=True)
        said = [json.loads(line) for line in done.stdout.splitlines()]
        assert said[0] == {"event": "waiting"}
        assert said[1]["ok"]
        for connection, peer in zip(said[1]["connections"], (first, second), strict=True):
            assert connection["sha256_received"] == sha256_of("down", 20_000)
            assert connection["sha256_sent"] == sha256_of("up", 30_000) == peer.result()["sha256_received"]


def test_the_guests_tool_names_its_errors() -> None:
    def outcome(job: dict[str, Any]) -> dict[str, Any]:
        tool = [sys.executable, str(TOOLS / "ktls_raw.py"), json.dumps(job)]
        done = subprocess.run(tool, capture_output=True, text=True, timeout=30, check=False)
        assert (done.returncode, done.stderr) == (1, "")
        error: dict[str, Any] = json.loads(done.stdout)["connections"][0]["error"]
        return error

    with Peer(None, "raw", {"listen": ["127.0.0.1", 0], "steps": [{"do": "send", "size": 5}]}) as peer:
        steps = [{"do": "recv", "size": 9}]
        early = outcome({"connect": ["127.0.0.1", peer.port], "steps": steps})
        assert (early["step"], early["message"]) == (1, "EOFError: the peer ended 4 bytes early")
        refused = outcome({"connect": ["127.0.0.1", peer.port], "steps": steps})
        assert refused["errno"] == "ECONNREFUSED"
