"""One kTLS connection of the guest to a peer that follows a script, watched like every other exchange."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from testbed.bed import GUEST4, TOOLS, Bed, last_line
from testbed.peers.rawtls import APPLICATION_DATA, Opener, Sealer
from testbed.peers.stream import sample, stream
from testbed.wire.decoder import Fixed, Keys, decode, fixed_keys
from testbed.wire.wirecapture import WireCapture
from tests.guest.exchange import TIMEOUT, Case, Running, Seen, counters, difference, guest_member
from tests.support.packet_link import PacketLink
from tests.support.tcp_peer import TcpPeer

ADDRESS, PORT = "198.51.100.77", 4433
Script = Callable[[TcpPeer, Running], None]


def sealed(case: Case, sizes: Sequence[int], spoil: dict[int, str] | None = None) -> list[bytes]:
    """The guest's incoming stream as records of these sizes, repeated; `spoil` as in rawtls.Sealer."""
    sealer = Sealer(case.keys.rx, spoil)
    data = memoryview(stream(case.seed, case.size("recv")))

    def records() -> Iterator[bytes]:
        start = 0
        for size in cycle(sizes):
            if start >= len(data):
                return
            yield sealer.seal(data[start : start + size])
            start += size

    return list(records())


def _heard(case: Case, peer: TcpPeer) -> dict[str, Any]:
    """What the peer got, as the other peers tell it."""
    clear = bytes(peer.stream[: case.tx_start])
    opened = list(Opener(case.keys.tx).feed(bytes(peer.stream[case.tx_start :]))) if "tx" in case.dirs else []
    data = b"".join(text for kind, text in opened if kind == APPLICATION_DATA) if "tx" in case.dirs else peer.stream
    control = [{"kind": kind, "data": text.hex()} for kind, text in opened if kind != APPLICATION_DATA]
    return {"ok": True, "sha256_received": hashlib.sha256(data).hexdigest(), "control": control, "clear": clear}


def scripted(bed: Bed, case: Case, capture_path: Path, script: Script, **options: Any) -> Seen:
    """Run the guest's side of `case` against `script`; `options` are TcpPeer's. What the peer got need not be all."""
    seen = Seen([case])
    before = counters(bed)
    end = (ADDRESS, PORT)
    with WireCapture(bed.wire, capture_path) as capture, PacketLink(bed.wire) as link:
        peer = TcpPeer(link, *end, **options)
        tool = bed.agent.spawn(["python3", f"{TOOLS}/ktls_raw.py"])
        try:
            member = {**guest_member(case, PORT), "connect": list(end)}
            tool.write(json.dumps({"connections": [member]}).encode() + b"\n")
            peer.accept()
            script(peer, Running(bed, tool))
            seen.contexts = bed.nic.contexts()
            peer.until(lambda: not tool.running, "the end of the guest's tool", TIMEOUT)
            while peer.take(0.1):  # what is still on its way
                pass
        finally:
            if tool.running:
                tool.kill()
                peer.segment(peer.sent, flags="R")  # or TCP would repeat what it has for minutes
        seen.guest = last_line(bytes(tool.stdout), bytes(tool.stderr))["connections"]
        seen.peers = [_heard(case, peer)]
    seen.tls_stat, seen.driver, seen.nic, seen.tcp = map(difference, counters(bed), before)
    keys: list[Fixed] = []
    tx, rx = fixed_keys(case.keys, end, (None, None), case.tx_start, case.rx_start)
    keys += [tx] * ("tx" in case.dirs) + [rx] * ("rx" in case.dirs)
    seen.report = decode(capture.path, Keys(keys, samples=[sample(case.seed)]))
    here = (GUEST4, int(seen.guest[0]["local"][1]))  # what earlier connections still have to say is not of this one
    (outgoing,), (incoming,) = seen.report.find(here, end), seen.report.find(end, here)
    seen.wires = [{"tx": outgoing, "rx": incoming}]
    return seen
