"""A burst of records of which one is bad, at each of its places: the packet passes as it was on the wire."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from testbed.bed import GUEST4, WIRE4, Bed
from testbed.peers.stream import sha256_of
from testbed.wire import pcapfile
from testbed.wire.reassembly import Stream, reassemble
from tests.guest.conftest import wait_until
from tests.guest.exchange import CIPHERS, RECORD_OVERHEAD, Case, exchange, rx_case, rx_personality, send

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

RECORD, COUNT = 200, 5  # shorter than a segment: one packet
ON_WIRE = RECORD + RECORD_OVERHEAD
SPOTS = ("type", "version", "nonce", "ciphertext", "tag")
PLACES = {"first": 0, "middle": COUNT // 2, "last": COUNT - 1}
LAST_PORT = 9  # nobody listens there


@contextmanager
def captured_by_the_guest(bed: Bed, path: Path) -> Iterator[None]:
    """What the guest's stack gets from the driver, into `path`. A last connection shows that all before it is there."""
    inside = "/tmp/burst.pcap"  # noqa: S108 - in the guest
    tool = bed.agent.spawn(
        ["tcpdump", "-i", "eth0", "-n", "-U", "--immediate-mode", "-B", "65536", "-w", inside, "tcp"]
    )
    tool.wait_for_output(b"listening on", 20)
    yield
    bed.agent.run(["python3", "-c", f"import socket; socket.socket().connect_ex(('{WIRE4}', {LAST_PORT}))"])
    last = ["tcpdump", "-n", "-r", inside, "port", str(LAST_PORT)]
    wait_until(lambda: bool(bed.agent.run(last, check=False).stdout), "the last packet is in the capture")
    tool.kill(signal.SIGINT)
    tool.wait(20)
    path.write_bytes(bed.agent.get(inside))


def incoming(path: Path) -> dict[int, Stream]:
    """The streams to the guest, by the peer's port."""
    found = [stream for each in reassemble(pcapfile.frames(path)) for stream in each.streams]
    return {s.source.port: s for s in found if (s.source.address, s.destination.address) == (WIRE4, GUEST4)}


@pytest.mark.conformance(86)
@pytest.mark.conformance(87)
@pytest.mark.conformance(88)
@pytest.mark.conformance(89)
@pytest.mark.conformance(90)
@pytest.mark.conformance(91)
@pytest.mark.parametrize("name", ["ideal", "driver-req"])
@pytest.mark.parametrize("place", PLACES)
def test_one_bad_record_of_many_in_a_packet(bed: Bed, capture_path: Path, name: str, place: str) -> None:
    """The guest's stack sees the bytes of the wire, delivers what was before, and reports EBADMSG."""
    bad = PLACES[place]
    size = COUNT * RECORD
    cases: list[Case] = [
        rx_case(f"{place} {spot} {name} {cipher}", send(size, records=[RECORD], writes=[size * 2]), size=size,
                cipher=cipher, peer_job={"spoil": {bad: spot}})
        for cipher in CIPHERS
        for spot in SPOTS
    ]  # fmt: skip
    inside = capture_path.with_name("guest.pcap")
    with rx_personality(bed, name), captured_by_the_guest(bed, inside):
        seen = exchange(bed, cases, capture_path)
    on_wire, in_guest = incoming(capture_path), incoming(inside)
    for case, guest in zip(cases, seen.guest, strict=True):
        errors = ("EBADMSG",) if not case.seed.startswith(f"{place} version") else ("EBADMSG", "EINVAL")
        assert guest["error"]["errno"] in errors, case.seed
        assert guest["received"] == bad * RECORD, case.seed
        assert guest["sha256_received"] == sha256_of(case.seed, bad * RECORD), case.seed
        port = int(guest["remote"][1])
        assert on_wire[port].segments == 1, "the burst came in one packet"
        assert in_guest[port].data == on_wire[port].data, case.seed
        assert len(on_wire[port].data) == COUNT * ON_WIRE
    assert seen.tls_stat["TlsRxDevice"] == len(cases)
    assert seen.driver["rx_tls_decrypted_packets"] == seen.nic["rx_tls_records"] == 0
    assert seen.driver["rx_tls_err"] == len(cases)


WITHHOLD = """
[[rule]]
action = "withhold-verdict"
record = 4
count = "all"
"""


@pytest.mark.conformance(5)
@pytest.mark.conformance(40)
@pytest.mark.parametrize("name", ["ideal", "driver-req"])
def test_records_of_which_a_part_was_decrypted(bed: Bed, capture_path: Path, name: str) -> None:
    """One packet of a record that spans many comes as ciphertext: the kernel encrypts the others again."""
    size = 8 * 16_000
    cases = [
        rx_case(f"mixed {name} {cipher}", send(size, records=[16_000], writes=[1400], apart=True), size=size,
                cipher=cipher)
        for cipher in CIPHERS
    ]  # fmt: skip
    rule = WITHHOLD.replace('"all"', str(3 * len(cases)))
    with rx_personality(bed, name), bed.nic.faults(rule):
        seen = exchange(bed, cases, capture_path)
        assert seen.nic["fault_verdicts"] == 3 * len(cases)
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    assert seen.driver["rx_tls_decrypted_packets"] > 50
