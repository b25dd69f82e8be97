"""Peers that make the guest's TCP repeat, wait, probe and cut anew: the device encrypts it all, the same every time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from testbed.bed import Bed
from testbed.peers.stream import stream
from tests.guest.exchange import ASK, CIPHERS, EOF, SHUTDOWN, Case, Running, Seen, Step, recv, send, tx_case
from tests.guest.scripted import scripted, sealed
from tests.guest.test_tcp_peers import OPTIONS, SACK, unharmed
from tests.support.tcp_peer import Heard, TcpPeer

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

SIZE = 60_000
FRAMING = 29


def total(size: int, write: int) -> int:
    """Bytes on the wire of `size` bytes in records of `write`."""
    return size + FRAMING * -(-size // write)


def holds(place: int, segment: Heard) -> bool:
    """Whether it begins with this byte."""
    return segment.at == place and bool(segment.data)


def by_the_device(seen: Seen) -> None:
    """All arrived, the repetitions too were the device's, and no two copies of a byte differ."""
    unharmed(seen)
    assert seen.driver["tx_tls_fallback"] == seen.driver["tx_tls_drop_no_sync_data"] == 0
    assert seen.driver["tx_tls_encrypted_bytes"] == seen.nic["tx_tls_bytes"] >= seen.streams("tx")[0].bytes


@pytest.mark.conformance(45)
@pytest.mark.conformance(49)
@pytest.mark.conformance(123)
@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_acknowledged_in_odd_places_comes_again(bed: Bed, capture_path: Path, options: str) -> None:
    """Partial acknowledgements in the middle of a record, a tag, a header: the rest is cut and sent anew."""
    case = tx_case(f"odd {options}", send(SIZE, write=3000), size=SIZE)
    whole = total(SIZE, 3000)

    def script(peer: TcpPeer, _: Running) -> None:
        peer.acking = False
        for place in (5, 777, 3020, 3031, 6060, 7001):
            peer.receive(place + 1)
            peer.acknowledge(place)
            peer.hear(partial(holds, place), f"byte {place} again")
        peer.acking = True
        peer.acknowledge()
        peer.receive(whole)

    seen = scripted(bed, case, capture_path, script, options=OPTIONS[options])
    by_the_device(seen)
    assert seen.streams("tx")[0].retransmitted_bytes > 0
    assert seen.driver["tx_tls_resync"] > 0


@pytest.mark.conformance(45)
def test_holes_that_sack_tells_of(bed: Bed, capture_path: Path) -> None:
    """Single segments out of the middle, while what is behind them goes on."""
    case = tx_case("sack", send(SIZE, write=16_000), size=SIZE)

    def script(peer: TcpPeer, _: Running) -> None:
        peer.acking = False
        peer.receive(9000)  # all that TCP sends at first
        for _repeat in range(4):
            peer.acknowledge(1000, blocks=((3000, 5000), (7000, len(peer.stream))))
        peer.hear(partial(holds, 1000), "byte 1000 again")
        peer.acknowledge(3000, blocks=((3000, 5000), (7000, len(peer.stream))))
        peer.hear(partial(holds, 5000), "byte 5000 again")
        peer.acking = True
        peer.acknowledge()
        peer.receive(total(SIZE, 16_000))

    seen = scripted(bed, case, capture_path, script, options=(("MSS", 1000), SACK))
    by_the_device(seen)
    assert seen.tcp["TcpExtTCPSackRecovery"] > 0


@pytest.mark.conformance(123)
@pytest.mark.parametrize("mss", [88, 536])
def test_a_tiny_mss_a_closed_window_and_keepalives(bed: Bed, capture_path: Path, mss: int) -> None:
    """The window closes, the guest probes it; it opens by less than a record; at rest the guest asks who is there."""
    size = 8000
    alive = {"options": {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1}}
    asked: Step = {"do": "recv", "size": 1}
    case = Case(f"probe {mss}", [send(size), asked, send(100), SHUTDOWN], [], dirs=("tx",), guest_job=alive)
    first = total(size, 16_384)

    def script(peer: TcpPeer, _: Running) -> None:
        peer.receive(500)
        for upto in (2000, 2003, 2500):
            peer.window = upto - len(peer.stream) if upto > len(peer.stream) else 0
            peer.acknowledge()
            peer.receive(upto)
        peer.window = 0
        peer.acknowledge()
        peer.hear(lambda segment: segment.at < len(peer.stream), "a window probe")
        peer.window = 65_535
        peer.acknowledge()
        peer.receive(first)
        peer.hear(lambda segment: segment.at == first - 1 and not segment.data, "a keep-alive probe")
        peer.write(stream(case.seed, 1))
        peer.receive(first + 100 + FRAMING)

    seen = scripted(bed, case, capture_path, script, options=(("MSS", mss),), window=1200)
    assert seen.guest[0]["ok"], seen.account("guest")
    by_the_device(seen)


@pytest.mark.conformance(123)
def test_a_path_that_becomes_narrow(bed: Bed, capture_path: Path) -> None:
    """ICMP "fragmentation needed" in mid-flow: what was sent is cut anew, and so is everything from then on."""
    case = tx_case("narrow", send(SIZE, write=5000), size=SIZE)
    mtu = 600

    def script(peer: TcpPeer, _: Running) -> None:
        peer.acking = False
        peer.receive(10_000)
        peer.fragmentation_needed(mtu)
        peer.hear(partial(holds, 0), "the first byte again")
        peer.acking = True
        peer.acknowledge()
        peer.receive(total(SIZE, 5000))

    seen = scripted(bed, case, capture_path, script)
    by_the_device(seen)
    assert bed.agent.run(["ip", "route", "get", "198.51.100.77"]).text.count(f"mtu {mtu}") == 1
    bed.agent.run(["ip", "route", "flush", "cache"])


@pytest.mark.conformance(123)
@pytest.mark.parametrize("cipher", CIPHERS)
def test_both_close_at_the_same_time(bed: Bed, capture_path: Path, cipher: str) -> None:
    """Two FINs cross; the guest's last record and its FIN are repeated until they are acknowledged."""
    steps = [ASK, recv(5000), send(5000), SHUTDOWN, EOF]
    case = Case("crossing", steps, [], cipher=cipher)
    data = b"".join(sealed(case, [1000]))

    def script(peer: TcpPeer, _: Running) -> None:
        peer.receive(1 + FRAMING)
        peer.acking = False
        peer.write(data)
        peer.until(lambda: peer.finished, "the guest's FIN")
        peer.segment(peer.sent, flags="FA", ack=len(peer.stream))
        peer.ended = True
        peer.hear(lambda segment: "F" in segment.flags, "the FIN again")
        peer.acking = True
        peer.acknowledge()

    seen = scripted(bed, case, capture_path, script)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()


@pytest.mark.conformance(120)
@pytest.mark.conformance(124)
@pytest.mark.conformance(125)
@pytest.mark.conformance(127)
def test_the_wire_is_the_same_with_and_without_offload(bed: Bed, capture_path: Path) -> None:
    """The same connection with the device's contexts and without: the same segments with the same bytes in the same
    order, and as many of them sent twice."""
    writes = (1, 500, 1448, 3000, 16_384)
    steps: list[Step] = []
    for write in writes:
        steps += [send(write, write=write), {"do": "record", "kind": 22, "data": "ab" * 40}, recv(100)]
    case = Case("same", [*steps, SHUTDOWN, EOF], [])
    records = sealed(case, [100])
    heard: list[list[tuple[int, str, bytes, int, tuple[str, ...]]]] = []

    def script(peer: TcpPeer, _: Running) -> None:
        expected = 0
        for write, record in zip(writes, records, strict=True):
            expected += total(write, 16_384) + total(40, 40)
            peer.receive(expected)
            peer.write(record)
        peer.until(lambda: peer.finished, "the guest's FIN")
        heard.append([(s.at, s.flags, s.data, s.tos, tuple(s.options)) for s in peer.heard if s.data])
        peer.finish()

    def switch(state: str) -> None:
        bed.agent.run(["ethtool", "-K", "eth0", "tls-hw-tx-offload", state, "tls-hw-rx-offload", state])

    by_device = scripted(bed, case, capture_path, script)
    switch("off")
    try:
        by_software = scripted(bed, case, capture_path, script)
    finally:
        switch("on")
    by_device.offloaded()
    by_software.arrived()
    assert by_software.tls_stat["TlsTxSw"] == by_software.tls_stat["TlsRxSw"] == 1
    assert b"".join(data for _, _, data, _, _ in heard[0]) == b"".join(data for _, _, data, _, _ in heard[1])
    assert {options for *_, options in heard[0]} == {options for *_, options in heard[1]}
    assert {tos for _, _, _, tos, _ in heard[0]} == {tos for _, _, _, tos, _ in heard[1]}
    assert by_device.tcp["TcpRetransSegs"] == by_software.tcp["TcpRetransSegs"]
