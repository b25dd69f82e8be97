"""What must hold after every run, whatever it did: nothing lost, nothing in clear, nothing left behind.

The numbers NL1, NL2, ... are those of the project's robustness rules. NL3 (rings) is checked by the tests of the rings,
NL7 (keys) by those of the device's life.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from testbed.bed import Bed
from testbed.wire.namespace import INTERFACE
from tests.guest.conftest import SETTLE_SECONDS, assert_settled
from tests.guest.exchange import Seen


def open_files(pid: int) -> int:
    """How many file descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))


@dataclass(frozen=True)
class Baseline:
    """The NIC before a run."""

    pid: int
    files: int
    packets: dict[str, int]  # unexplained, by what came before

    @classmethod
    def of(cls, bed: Bed) -> Baseline:
        """As it is now, when nothing is under way."""
        packets = unexplained(bed)
        while (again := unexplained(bed)) != packets:
            packets = again
        return cls(bed.nic.pid, open_files(bed.nic.pid), packets)


def link_counters(text: str) -> dict[str, int]:
    """Packets of an interface, out of `ip -s -j link show`."""
    stats = json.loads(text)[0]["stats64"]
    return {direction: stats[direction]["packets"] for direction in ("tx", "rx")}


def unexplained(bed: Bed) -> dict[str, int]:
    """NL2: packets in less packets out less named drops, for every place that counts both. Empty: all is explained.

    From the guest's interface through driver, device and fault director to the interface on the wire, and back.
    """
    show = ["ip", "-s", "-j", "link", "show", "dev"]
    guest = link_counters(bed.agent.run([*show, "eth0"]).text)
    wire = link_counters(bed.wire.run([*show, INTERFACE]))  # of a tap, rx is what the NIC wrote
    driver, nic = bed.ethtool(), bed.nic.stats()

    def drops(counters: dict[str, int], prefix: str) -> int:
        return sum(n for name, n in counters.items() if name.startswith(prefix) and name != "tx_drop_port")

    messages = nic["events_sent"] + nic["hellos"]
    cut = nic["fault_cut"] + nic["fault_duplicated"] - nic["fault_dropped"]
    places = {
        "driver to device": guest["tx"] - nic["tx_packets"],
        "device, tx": nic["tx_packets"] - nic["tx_wire_packets"] - drops(nic, "tx_drop_"),
        "director": nic["tx_wire_packets"] + wire["tx"] + cut
        - wire["rx"] - nic["tx_drop_port"] - nic["rx_wire_packets"],
        "device, rx": nic["rx_wire_packets"] - (nic["rx_packets"] - messages) - drops(nic, "rx_drop_"),
        "device to driver": nic["rx_packets"] - messages - guest["rx"] - drops(driver, "rx_drop_"),
    }  # fmt: skip
    return {place: packets for place, packets in places.items() if packets}


def stream_intact(seen: Seen) -> None:
    """NL1: every byte once, in order, both ways, to a clean end; TLS complains about nothing.

    The cases of a run end with `eof` on both sides, so an end that is not clean fails them.
    """
    seen.arrived()
    assert seen.tls_stat["TlsDecryptError"] == 0, seen.account("NL1: a record that TLS rejected")


def wire_protected(seen: Seen) -> None:
    """NL5, NL6: every record on the wire opens with the keys of its flow, no nonce twice, each byte always the same."""
    assert seen.report.plaintext_hits == 0, f"NL5: plaintext at {seen.report.plaintext_places}"
    errors = {stream.source: stream.errors for stream in seen.report.streams if stream.errors}
    assert not errors, seen.account(f"NL6: {errors}")
    seen.wire_is_encrypted()


def nothing_left(bed: Bed, baseline: Baseline, drops: tuple[str, ...] = ()) -> None:
    """NL2, NL4, NL8, NL9: packets explained, contexts gone in all three places, the NIC alive, no complaint."""
    assert_settled(bed, drops)
    assert bed.nic.pid == baseline.pid, "NL8: another process"
    ends(lambda: unexplained(bed) != baseline.packets and unexplained(bed), "NL2: packets unexplained")
    ends(lambda: max(0, open_files(bed.nic.pid) - baseline.files), "NL8: more open files than before")


def ends(trouble: Callable[[], object], what: str) -> None:
    """Poll until `trouble` returns nothing; what is under way needs a moment. Fails with what it returned last."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while found := trouble():
        assert time.monotonic() < deadline, f"{what}: {found}"
        time.sleep(0.05)
