"""`--capture FILE`: both sides of the NIC in one file, and nothing in it that should not be there."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pcapng import FileScanner, blocks

from testbed.bed import running
from testbed.peers.stream import sample, sha256_of
from testbed.setup import Assets
from testbed.wire import tls12
from testbed.wire.decoder import Keys, decode, fixed_keys
from testbed.wire.pcapfile import frames
from testbed.wire.reassembly import reassemble
from tests.guest.cases import both_ways
from tests.guest.conftest import assert_settled
from tests.guest.exchange import CIPHERS, WIRE_HOSTS, exchange

pytestmark = [
    pytest.mark.guest,
    pytest.mark.timeout(300),
    # python-pcapng says it of an option of its own, if_tsresol
    pytest.mark.filterwarnings("ignore:Field type should not be:DeprecationWarning"),
]

SIZE = 1 << 20
TAG = 16
CASES = [
    both_ways(f"capture {family}", SIZE, family=family, cipher=cipher)
    for family, cipher in zip("46", CIPHERS, strict=True)
]


class Packet(NamedTuple):
    """One enhanced packet block."""

    interface: str
    direction: str
    comment: str
    data: bytes


def packets(path: Path) -> dict[int, list[Packet]]:
    """Packets by their id, in the order of the file."""
    found: dict[int, list[Packet]] = defaultdict(list)
    with open(path, "rb") as file:
        for block in FileScanner(file):
            if isinstance(block, blocks.EnhancedPacket):
                options: Any = block.options
                found[options["epb_packetid"]].append(
                    Packet(
                        block.interface.options["if_name"],
                        options["epb_flags"].inout,
                        options.get("opt_comment", ""),
                        bytes(block.packet_data),
                    )
                )
    return found


def plaintext(path: Path, interface: str) -> list[bytes]:
    """Of every TCP stream with data, what stands where a record's content stands."""
    contents = []
    for connection in reassemble(frames(path, interface)):
        for each in connection.streams:
            found = tls12.records(each.data, 0)
            contents.append(b"".join(bytes(each.data[r.body + tls12.NONCE : r.end - TAG]) for r in found))
    return contents


def test_both_views_of_every_packet(assets: Assets, tmp_path: Path) -> None:
    path = tmp_path / "nic.pcapng"
    with running(assets, name="test-capture", nic_arguments=["--capture", str(path)]) as bed:
        seen = exchange(bed, CASES, tmp_path / "wire.pcap")
        seen.offloaded()
        assert_settled(bed)
        nic = bed.nic.stats()
        assert bed.nic.stop() == 0
    assert path.stat().st_mode & 0o777 == 0o600

    by_id = packets(path)
    tx = [views for views in by_id.values() if views[0].direction == "outbound"]
    rx = [views for views in by_id.values() if views[0].direction == "inbound"]
    assert nic["tx_wire_packets"] <= len(tx) <= nic["tx_wire_packets"] + 20  # some may come after the last look
    assert nic["rx_wire_packets"] <= len(rx) <= nic["rx_wire_packets"] + 20
    assert {tuple(view.interface for view in views) for views in tx} == {("host0", "wire0")}
    assert {tuple(view.interface for view in views) for views in rx} == {("wire0", "host0")}
    encrypted = [views for views in tx if "encrypted" in views[1].comment]
    decrypted = [views for views in rx if "decrypted" in views[1].comment]
    assert len(encrypted) == seen.nic["tx_tls_packets"]
    assert len(decrypted) == seen.nic["rx_tls_packets"]
    for views in (*tx, *rx):
        assert views[0].direction == views[1].direction
        assert (views[0].data != views[1].data) == (views in encrypted or views in decrypted)
        assert len(views[0].data) == len(views[1].data)
    assert all(views[0].comment.startswith("slot=") for views in encrypted)
    assert sum(int(views[1].comment.rpartition("records=")[2]) for views in decrypted) == seen.nic["rx_tls_records"]

    keys = [entry for case in CASES for entry in fixed_keys(case.keys, peer=(WIRE_HOSTS[case.family], None))]
    wire = decode(path, Keys(keys, samples=[sample(case.seed) for case in CASES]), "wire0")
    assert wire.ok
    assert wire.records == wire.records_decrypted_ok == seen.report.records
    sent = [sha256_of(case.seed, SIZE) for case in CASES]
    assert sorted(found.sha256 for found in wire.streams) == sorted(sent * 2)
    on_host = plaintext(path, "host0")
    assert sorted(hashlib.sha256(data).hexdigest() for data in on_host) == sorted(sent * 2)
