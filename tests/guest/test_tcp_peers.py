"""Peers that do with TCP whatever it allows, and some of what it does not: the device sees every oddity, users none."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.bed import Bed
from testbed.peers.stream import sha256_of
from tests.guest.conftest import wait_until
from tests.guest.exchange import Case, Running, Seen, rx_case
from tests.guest.exchange import rx_personality as personality_of
from tests.guest.scripted import scripted, sealed
from tests.support.tcp_peer import ECN_CE, TcpPeer

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

SIZE = 30_000
RECORDS = (1000, 3000, 64)
MSS = ("MSS", 1460)
SACK = ("SAckOK", b"")
STAMPS = ("Timestamp", (1, 0))
OPTIONS = {"bare": (MSS,), "SACK": (MSS, SACK), "timestamps": (MSS, STAMPS), "both": (MSS, SACK, STAMPS)}


@pytest.fixture(params=["ideal", "driver-req"])
def personality(bed: Bed, request: pytest.FixtureRequest) -> Iterator[str]:
    with personality_of(bed, request.param):
        yield request.param


def unharmed(seen: Seen, honest: bool = True) -> None:
    """Every byte arrived, kernel and device are content, and the decoder too where the peer is `honest`."""
    seen.arrived()
    assert seen.report.plaintext_hits == 0
    if honest:
        seen.wire_is_encrypted()
    seen.kernel_offloads()
    assert seen.nic["rx_tls_auth_fail"] == 0
    assert seen.driver["tx_tls_device_drop"] == seen.driver["tx_drop"] == 0


def begun(peer: TcpPeer) -> None:
    """The guest has asked for data with a clear byte."""
    peer.receive(1)


def incoming(name: str, **options: Any) -> Case:
    return rx_case(name, size=SIZE, **options)


# -- wire to guest -----------------------------------------------------------------------------------------------------


@pytest.mark.conformance(35)
@pytest.mark.conformance(123)
@pytest.mark.parametrize("options", OPTIONS)
def test_repetitions_with_other_cuts(bed: Bed, capture_path: Path, personality: str, options: str) -> None:
    """Everything comes twice and more, each time cut elsewhere, in part acknowledged long ago, in part new."""
    case = incoming(f"cuts {options} {personality}")
    data = b"".join(sealed(case, RECORDS))
    rng = random.Random(options)

    def script(peer: TcpPeer, _: Running) -> None:
        begun(peer)
        while peer.sent < len(data):
            peer.write(data[peer.sent : peer.sent + rng.randint(1, 1400)])
            start = rng.randrange(peer.sent)
            peer.segment(start, data[start : start + rng.randint(1, 1400)])  # may reach beyond what was sent
        peer.all_acknowledged()
        peer.finish()

    seen = scripted(bed, case, capture_path, script, options=OPTIONS[options])
    unharmed(seen)
    assert seen.nic["rx_tls_records"] > 0


@pytest.mark.conformance(35)
@pytest.mark.conformance(41)
@pytest.mark.conformance(57)
@pytest.mark.conformance(60)
def test_segments_shuffled_and_overlapping(bed: Bed, capture_path: Path, personality: str) -> None:
    """A window's worth of segments in any order; neighbours share bytes."""
    case = incoming(f"shuffled {personality}")
    data = b"".join(sealed(case, RECORDS))
    rng = random.Random(7)

    def script(peer: TcpPeer, _: Running) -> None:
        begun(peer)
        for start in range(0, len(data), 9000):
            window = data[start : start + 9000]
            cuts = list(range(0, len(window), 700))
            rng.shuffle(cuts)
            for cut in cuts:
                peer.segment(start + cut, window[cut : cut + 900])
            peer.sent = start + len(window)
            peer.all_acknowledged()
        peer.finish()

    unharmed(scripted(bed, case, capture_path, script))


@pytest.mark.conformance(4)
@pytest.mark.conformance(86)
@pytest.mark.parametrize("place", ["whole", "front", "middle", "end"])
def test_a_forged_copy_that_tcp_keeps(bed: Bed, capture_path: Path, personality: str, place: str) -> None:
    """It waits behind a hole that is filled exactly; the honest bytes come too late. No tag may vouch for it."""
    case = rx_case(f"forged {place} {personality}", size=10_000)
    records = sealed(case, [1000])
    data = b"".join(records)
    start = len(records[0]) * 4
    low, high = {"whole": (0, 1029), "front": (0, 300), "middle": (300, 700), "end": (700, 1029)}[place]
    forged = bytes(byte ^ 0x55 for byte in data[start + low : start + high])

    def script(peer: TcpPeer, _: Running) -> None:
        begun(peer)
        peer.write(data[: start - 100])
        peer.all_acknowledged()
        peer.segment(start + low, forged)
        peer.write(data[start - 100 : start + low])
        peer.all_acknowledged()  # else GRO may join what fills the hole with what follows, and TCP keeps that
        peer.write(data[start + low :], 1200)
        peer.finish()

    seen = scripted(bed, case, capture_path, script)
    (guest,) = seen.guest
    assert not guest["ok"], seen.account("not refused")
    # Linux 6.1 forgets the error of a bad header if the call that meets it has data to return; offload or not
    errors = ("EBADMSG", "EINVAL", "EMSGSIZE", None) if low == 0 else ("EBADMSG",)
    assert guest["error"]["errno"] in errors, seen.account("not refused")
    assert guest["received"] == 4000
    assert guest["sha256_received"] == sha256_of(case.seed, 4000)
    assert seen.tls_stat["TlsRxDevice"] == 1


@pytest.mark.conformance(4)
@pytest.mark.parametrize("whole", [True, False], ids=["covered", "in part"])
def test_a_forged_copy_that_tcp_throws_away(bed: Bed, capture_path: Path, personality: str, whole: bool) -> None:
    """It waits behind a hole; the honest segment that fills the hole covers it, or all of it but the end."""
    case = incoming(f"covered {whole} {personality}")
    data = b"".join(sealed(case, RECORDS))
    honest = data[2300:2400]
    forged = bytes(byte ^ 0x55 for byte in data[1500:2300]) + (b"" if whole else honest)

    def script(peer: TcpPeer, _: Running) -> None:
        begun(peer)
        peer.write(data[:1000])
        peer.all_acknowledged()
        peer.segment(1500, forged)
        peer.write(data[1000:2300])
        peer.write(data[2300:])
        peer.finish()

    unharmed(scripted(bed, case, capture_path, script), honest=False)


@pytest.mark.conformance(35)
@pytest.mark.conformance(59)
def test_a_forged_copy_that_comes_late_or_lies_outside_the_window(
    bed: Bed, capture_path: Path, personality: str
) -> None:
    """TCP throws it away whatever it holds; the stream goes on."""
    case = incoming(f"late {personality}")
    data = b"".join(sealed(case, RECORDS))
    forged = b"\x17\x03\x03\x04\x00" + b"\x55" * 1000

    def script(peer: TcpPeer, _: Running) -> None:
        begun(peer)
        for start in range(0, len(data), 1200):
            peer.write(data[start : start + 1200])
            peer.all_acknowledged()
            peer.segment(start, forged[: min(len(forged), len(data) - start)])  # acknowledged already
            peer.segment(start + (1 << 24), forged)  # beyond the window
            peer.segment(start - (1 << 24), forged)
        peer.finish()

    unharmed(scripted(bed, case, capture_path, script), honest=False)


@pytest.mark.conformance(123)
@pytest.mark.parametrize("options", ["bare", "both"])
def test_keepalives_window_probes_urgent_pointers_and_ecn(bed: Bed, capture_path: Path, options: str) -> None:
    """Segments with bytes of before, one byte at a time, marks of routers: the device goes on through all of it."""
    case = incoming(f"probes {options}")
    data = b"".join(sealed(case, RECORDS))

    def script(peer: TcpPeer, _: Running) -> None:
        begun(peer)
        for start in range(0, len(data), 700):
            piece = data[start : start + 700]
            peer.write(piece[:1])  # a window probe that is taken
            peer.write(piece[1:], tos=ECN_CE if start % 1400 else 2)
            peer.all_acknowledged()
            peer.segment(peer.sent - 1)  # keep-alive probes, without a byte and with an old one
            peer.segment(peer.sent - 1, b"\0")
            peer.segment(start, piece[:20], "UA", urgptr=10)  # in what was read
        assert any("E" in segment.flags for segment in peer.heard), "the guest has not heard of congestion"
        peer.finish()

    bed.agent.run(["sysctl", "-qw", "net.ipv4.tcp_ecn=1"])
    try:
        seen = scripted(bed, case, capture_path, script, options=OPTIONS[options], ecn=True)
    finally:
        bed.agent.run(["sysctl", "-qw", "net.ipv4.tcp_ecn=2"])
    unharmed(seen, honest=False)  # a probe's byte is any
    assert seen.nic["rx_tls_records"] == seen.streams("rx")[0].records
    assert seen.nic["rx_tls_lost_sync"] == 0


@pytest.mark.conformance(123)
def test_the_end_comes_with_the_last_record(bed: Bed, capture_path: Path, personality: str) -> None:
    case = incoming(f"FIN {personality}")
    data = b"".join(sealed(case, RECORDS))

    def script(peer: TcpPeer, _: Running) -> None:
        begun(peer)
        peer.write(data[:-500])
        peer.finish(data[-500:])

    seen = scripted(bed, case, capture_path, script)
    unharmed(seen)
    assert seen.nic["rx_tls_records"] == seen.streams("rx")[0].records


@pytest.mark.parametrize("flags", ["F", "R"], ids=["FIN", "RST"])
def test_the_end_comes_in_the_middle_of_a_record(bed: Bed, capture_path: Path, personality: str, flags: str) -> None:
    """What was whole is delivered, then the end is told: as such, or as a reset."""
    case = rx_case(f"cut short {flags} {personality}", size=10_000)
    data = b"".join(sealed(case, [1000]))

    def script(peer: TcpPeer, _: Running) -> None:
        begun(peer)
        peer.write(data[:4500])
        peer.until(lambda: peer.acked >= 4500, "all of it")
        wait_until(lambda: bed.nic.stats()["rx_tls_records"] >= before + 4, "four records")
        if flags == "R":
            peer.segment(peer.sent, flags="R")
        else:
            peer.finish()

    before = bed.nic.stats()["rx_tls_records"]
    seen = scripted(bed, case, capture_path, script)
    (guest,) = seen.guest
    assert guest["error"]["errno"] == ("ECONNRESET" if flags == "R" else None), guest
    assert guest["sha256_received"] == sha256_of(case.seed, guest["received"])
    assert guest["received"] == 4000 or (flags == "R" and guest["received"] % 1000 == 0)
    assert seen.tls_stat["TlsDecryptError"] == 0
    assert seen.tls_stat["TlsRxDevice"] == 1


RESYNC_NEVER_ANSWERED = """
[[rule]]
action = "desync"
direction = "rx"
record = 3

[[rule]]
action = "lose-answer"
count = "all"
"""


@pytest.mark.conformance(13)
@pytest.mark.parametrize("name", ["ideal", "driver-req", "driver-req-async", "core-next-hint"])
def test_a_reset_while_the_device_asks_for_its_place(bed: Bed, capture_path: Path, name: str) -> None:
    case = rx_case(f"reset {name}", size=400_000)
    data = b"".join(sealed(case, [1000]))[:300_000]

    def script(peer: TcpPeer, _: Running) -> None:
        begun(peer)
        while peer.sent < len(data):
            # All of it is more than a window, and the guest may be slow to read. What it has room for may be little,
            # and no more until that was used: a receiver does not tell of small steps (RFC 9293 3.8.6.2.2).
            peer.room(1)
            peer.write(data[peer.sent : min(peer.sent + 10_000, peer.allowed)])
            peer.all_acknowledged()
        peer.segment(peer.sent, flags="R")

    with personality_of(bed, name), bed.nic.faults(RESYNC_NEVER_ANSWERED):
        seen = scripted(bed, case, capture_path, script)
    assert seen.guest[0]["error"]["errno"] == "ECONNRESET"
    assert seen.nic["fault_desynced"] == 1
    assert seen.nic["fault_answers_lost"] > 0
    assert seen.tls_stat["TlsDecryptError"] == 0
    # that nothing is left of it, is asserted behind every test
