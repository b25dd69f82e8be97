"""The throughput arms: both ends of a transfer over loopback, what is counted, and that no wrong record is believed."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.speed_bed import PATTERN
from bench.speed_bulk import ARMS, RATIOS, figures
from bench.speed_profile import middle, shares
from bench.speed_run import Arm, Look, Outcome, check_firsts, check_samples, interrupts, prove
from testbed.errors import BedError
from testbed.peers.flowkeys import DirectionKeys, FlowKeys
from testbed.peers.rawtls import Opener, RecordError, Sealer
from testbed.peers.speed import (
    PERIOD,
    RECORD,
    RECORDS,
    SAMPLE_EVERY,
    SEALED_PERIOD,
    SEALED_RECORD,
    Ring,
    Short,
    Window,
    numbered,
    sealed,
)
from testbed.peers.speed_end import Program
from testbed.peers.speed_many import SAMPLED, WRITE
from testbed.peers.speed_profile import counted
from testbed.peers.speed_small import serve

KEYS = FlowKeys.from_seed("aes-128-gcm", "speed test", rec_seq=5)
WINDOW = {"warm": 0.01, "seconds": 0.05}


@pytest.fixture
def pattern(tmp_path: Path) -> Path:
    path = tmp_path / "pattern"
    path.write_bytes(PATTERN)
    return path


def both(connecting_job: dict[str, Any], listening_job: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both ends say, each of which does its job."""
    listening, connecting = Program(), Program()
    place = ["127.0.0.1", listening.do_listen({"listen": ["127.0.0.1", 0]})["port"]]
    said: dict[str, Any] = {}

    def connect() -> None:
        said.update(getattr(connecting, "do_" + connecting_job["do"])(connecting_job | {"connect": place}))

    thread = threading.Thread(target=connect)
    thread.start()
    try:
        return said, getattr(listening, "do_" + listening_job["do"])(listening_job)
    finally:
        thread.join()
        listening.close()
        connecting.close()


def transferred(sender: dict[str, Any], receiver: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What both ends say."""
    return both(sender, {"do": "receive", **receiver})


@pytest.mark.parametrize("connections", [1, 3])
@pytest.mark.parametrize(("verb", "piece"), [("send", PERIOD // 4), ("sendfile", PERIOD)])
def test_plain_transfer(verb: str, piece: int, connections: int, pattern: Path) -> None:
    common = {"pattern": str(pattern), "connections": connections}
    sent, received = transferred({"do": verb, "seconds": 0.1, "write": piece, **common}, {**WINDOW, **common})
    assert sent["total"] == received["total"] > 0
    assert sent["total"] % piece == 0
    assert 0 < received["bytes"] < received["total"]
    assert received["seconds"] > 0


def test_other_bytes_than_the_pattern_are_noticed(pattern: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(PERIOD))
    with pytest.raises(ValueError, match="something else arrived"):
        transferred({"do": "send", "seconds": 0.1, "pattern": str(pattern)}, {**WINDOW, "pattern": str(other)})


@pytest.mark.parametrize("connections", [1, 3])
def test_sealed_transfer_opens_to_the_pattern(connections: int, pattern: Path, tmp_path: Path) -> None:
    """The whole way of encrypted streams, to an independent decoder; a flipped bit of any part of one is noticed."""
    records = tmp_path / "samples"
    sender = {"do": "send", "seconds": 0.3, "pattern": str(pattern), "seal": KEYS.rx.as_json()}
    sent, received = transferred(
        sender | {"connections": connections}, {**WINDOW, "records": str(records), "connections": connections}
    )
    assert sent["total"] == received["total"]
    samples, data = received["samples"], records.read_bytes()
    assert [place for place, _ in samples].count(0) == connections
    if connections == 1:
        assert sum(samples[-1]) == received["total"]
    check_samples(data, samples, KEYS.rx)
    for at in (0, 4, 5, 12, 13, len(data) - 1):
        spoilt = bytearray(data)
        spoilt[at] ^= 1
        with pytest.raises(BedError, match="on the wire is"):
            check_samples(bytes(spoilt), samples, KEYS.rx)
    with pytest.raises(BedError, match="on the wire is wrong"):
        check_samples(data, [(place + SEALED_RECORD, size) for place, size in samples], KEYS.rx)
    with pytest.raises(BedError, match="bytes of 1 samples"):
        check_samples(data[:-1], [(0, len(data))], KEYS.rx)


def test_records_that_hold_something_else_are_noticed() -> None:
    source = sealed(KEYS.tx.as_json(), bytes(PERIOD))
    data = b"".join(bytes(next(source)) for _ in range(SEALED_PERIOD // (16 * SEALED_RECORD)))
    with pytest.raises(BedError, match="other bytes on the wire"):
        check_samples(data, [(0, SEALED_PERIOD)], KEYS.tx)


@pytest.mark.parametrize("count", [1, SAMPLED + 1])
def test_many_connections(count: int, pattern: Path) -> None:
    sent, received = both(
        {"do": "send_many", "count": count, "seconds": 0.3, "pattern": str(pattern)},
        {"do": "receive_many", "count": count, "pattern": str(pattern), **WINDOW},
    )
    assert sent["total"] == received["total"]
    assert received["samples"] == list(range(0, count, SAMPLED))


def test_first_records_of_many_connections() -> None:
    numbers = [0, 64]
    sealers = [Sealer(DirectionKeys.from_json(numbered(KEYS.tx.as_json(), number))) for number in numbers]
    data = b"".join(sealer.seal(PATTERN[at : at + RECORD]) for sealer in sealers for at in range(0, WRITE, RECORD))
    check_firsts(data, numbers, KEYS.tx)
    with pytest.raises(BedError, match="on the wire is wrong"):
        check_firsts(data[:-1] + bytes([data[-1] ^ 1]), numbers, KEYS.tx)
    with pytest.raises(BedError, match="bytes of 2 connections"):
        check_firsts(data[:-1], numbers, KEYS.tx)


def test_round_trips() -> None:
    asked, _ = both({"do": "ask", "seconds": 0.05}, {"do": "answer"})
    assert asked["count"] > 1
    assert 0 < asked["median"] < 0.05


def test_datagrams_are_counted_where_they_arrive() -> None:
    sent, seen = both(
        {"do": "send_packets", "size": 18, "seconds": 0.2},
        {"do": "count_packets", "interface": "lo", "warm": 0.05, "seconds": 0.05},
    )
    assert 0 < seen["count"] < sent["count"]


def test_small_transfers(pattern: Path) -> None:
    sizes = {"pattern": str(pattern), "up": 10_000, "down": 100}
    asked, served = both({"do": "small", "seconds": 0.05, **sizes}, {"do": "serve_small", **sizes})
    assert asked["count"] == served["count"] > 2
    assert asked["rate"] > 0


@pytest.mark.parametrize("number", [0, 3])
def test_every_small_transfer_has_nonces_of_its_own(number: int) -> None:
    ours, theirs = socket.socketpair()
    keys = {name: getattr(KEYS, name) for name in ("tx", "rx")}
    with ours, theirs:
        nonces = {
            name: replace(keys[name], iv=bytes.fromhex(numbered(keys[name].as_json(), number)["iv"])) for name in keys
        }
        ours.sendall(Sealer(nonces["tx"]).seal(b"request"))
        serve(theirs, {name: keys[name].as_json() for name in keys}, number, b"request", b"answer")
        ((_, answer),) = Opener(nonces["rx"]).feed(ours.recv(PERIOD))
    assert answer == b"answer"
    assert int.from_bytes(nonces["tx"].iv, "big") - int.from_bytes(keys["tx"].iv, "big") == number << 24


def test_a_request_that_does_not_open_is_refused() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(Sealer(KEYS.tx).seal(b"request"))
        with pytest.raises(RecordError, match="its tag does not verify"):
            serve(theirs, {"tx": KEYS.rx.as_json(), "rx": KEYS.rx.as_json()}, 0, b"request", b"answer")


def test_window() -> None:
    """Opens `warm` after the first bytes, and counts to the first call behind its end."""
    window = Window(1.0, 2.0)
    for now, size in ((10.0, 5), (10.9, 5), (11.1, 7), (12.0, 8), (12.9, 9), (13.2, 10), (14.0, 100)):
        window.add(size, now)
    assert window.result() == {"bytes": 27, "seconds": pytest.approx(2.1), "total": 144}


def test_window_of_a_stream_that_ends_early() -> None:
    window = Window(1.0, 2.0)
    window.add(5, 10.0)
    window.add(5, 11.5)
    window.add(0, 12.9)
    with pytest.raises(Short, match="after 10 bytes"):
        window.result()


def test_ring_takes_samples_now_and_then_and_the_last() -> None:
    ring = Ring(4)
    for turn in range(SAMPLE_EVERY + 3):
        for half in range(2):
            space = ring.space()
            space[:2] = bytes([turn, half])
            ring.put(2)
    ring.end()
    last = SAMPLE_EVERY + 2
    assert ring.samples == [(4 * turn, bytes([turn, 0, turn, 1])) for turn in (0, SAMPLE_EVERY, last)]


def test_ring_of_a_stream_that_ends_within_a_period() -> None:
    ring = Ring(4)
    for piece in (b"abcd", b"efg"):
        ring.space()[: len(piece)] = piece
        ring.put(len(piece))
    ring.end()
    assert ring.samples == [(0, b"abcd"), (4, b"efg")]


def test_interrupts_of_one_device() -> None:
    text = """           CPU0       CPU1
 24:          0          7  PCI-MSIX-0000:00:01.0   0-edge      virtio4-config
 25:         10          2  PCI-MSIX-0000:00:01.0   1-edge      virtio4-input.0
 26:          3          0  PCI-MSIX-0000:00:01.0   2-edge      virtio4-output.0
 27:        100          0  PCI-MSIX-0000:00:02.0   2-edge      virtio40-input.0
NMI:          0          9   Non-maskable interrupts
"""
    assert interrupts(text, "virtio4") == 15
    assert interrupts(text, "virtio40") == 100
    assert interrupts(text, "virtio5") == 0


SENT = 100 * RECORD
BY_DEVICE = {
    "tx": Look(
        Counter(TlsTxDevice=1),
        Counter(tx_tls_encrypted_bytes=100 * SEALED_RECORD),
        Counter(tx_tls_bytes=100 * SEALED_RECORD, tx_tls_records=100),
        Counter(),
        0,
    ),
    "rx": Look(
        Counter(TlsRxDevice=1),
        Counter(rx_tls_decrypted_bytes=SENT),
        Counter(rx_tls_bytes=100 * SEALED_RECORD, rx_tls_records=100),
        Counter(),
        0,
    ),
}
BY_SOFTWARE = {name: Look(Counter({f"Tls{name}Sw": 1}), Counter(), Counter(), Counter(), 0) for name in ("Tx", "Rx")}
NOTHING = Look(Counter(), Counter(), Counter(), Counter(), 0)


@pytest.mark.parametrize("direction", ["tx", "rx"])
def test_counters_prove_who_did_the_tls(direction: str) -> None:
    looks = {
        "plain": NOTHING,
        "offload": BY_DEVICE[direction],
        "software": BY_SOFTWARE[direction.capitalize()],
    }
    for mode in looks:
        for name, look in looks.items():
            if mode == name:
                prove(Arm(direction, mode), SENT, look)
            else:
                with pytest.raises(BedError, match="not what it seems"):
                    prove(Arm(direction, mode), SENT, look)
    with pytest.raises(BedError, match="not what it seems"):
        prove(Arm("rx" if direction == "tx" else "tx", "offload"), SENT, BY_DEVICE[direction])


@pytest.mark.parametrize(
    ("part", "counter", "value"),
    [
        ("nic", "tx_tls_bytes", 98 * SEALED_RECORD),
        ("nic", "tx_tls_records", 98),
        ("driver", "tx_tls_encrypted_bytes", 98 * SEALED_RECORD),
        ("driver", "tx_tls_fallback", 1),
        ("tls", "TlsTxSw", 1),
        ("tls", "TlsDecryptError", 1),
        ("nic", "rx_tls_auth_fail", 1),
        ("nic", "rx_tls_records", 1),
    ],
)
def test_each_counter_can_contradict(part: str, counter: str, value: int) -> None:
    good = BY_DEVICE["tx"]
    changed = Counter(getattr(good, part))
    changed[counter] = value
    with pytest.raises(BedError, match=counter):
        prove(Arm("tx", "offload"), SENT, replace(good, **{part: changed}))  # type: ignore[arg-type]


def test_figures_of_all_arms() -> None:
    """Each ratio is of the same round; the control arm is plain TCP in the direction of the arms."""
    results = {
        name: [
            Outcome(
                float(number + place + 1),
                2.0,
                {"vcpus": 2.0 + number, "nic": 0.5, "peer": 0.5 - number, "machine": 9.0},
                {"x": float(place)},
            )
            for place in range(3)
        ]
        for number, name in enumerate(ARMS)
    }
    found = {measured.name: measured for measured in figures(results, {"cpu": "max"})}
    assert set(RATIOS) | {f"{name}_gbit" for name in ARMS} <= set(found)
    assert found["tx_offload_over_plain"].samples == [2 / 1, 3 / 2, 4 / 3]
    assert found["tx_offload_over_plain"].control == [1.0, 2.0, 3.0]
    assert found["rx_offload_over_software"].control == [5.0, 6.0, 7.0]
    assert found["sendfile_offload_over_plain"].control == [9.0, 10.0, 11.0]
    assert found["cpu_per_gb_offload_over_plain"].value == 1.0
    assert found["tx_offload_over_plain_guest_bound"].samples == [2 / 3] * 3
    assert found["rx_offload_over_plain_guest_bound"].samples == [6 / 7] * 3
    assert found["plain_tx_gbit"].details == {
        "cpu": "max", "x": 1.0, "cpu_seconds_per_gb_vcpus": 1.0, "cpu_seconds_per_gb_nic": 0.25,
        "cpu_seconds_per_gb_peer": 0.25, "cpu_seconds_per_gb_machine": 4.5,
    }  # fmt: skip
    assert RECORDS * RECORD == PERIOD


def test_a_profile_s_shares() -> None:
    found = shares({"tlsnic_tx_post [tlsnic]": 1, "tls_push_data [tls]": 2, "user": 3, "memset": 1, "tcp_ack": 3})
    assert found["parts"] == {
        "driver": 10,
        "tls": 20,
        "programs": 30,
        "clearing of new memory": 10,
        "rest of the kernel": 30,
    }
    assert found["functions"]["tcp_ack"] == 30
    with pytest.raises(BedError, match="idle"):
        shares({})


def test_a_sample_is_inside_all_that_had_called_it() -> None:
    found = counted(
        [
            (("default_idle", "do_idle"), 5),
            (("user",), 1),
            (("copy", "send", "copy", "entry"), 2),
            (("irq", "default_idle", "do_idle"), 1),
            (("send", "entry"), 3),
        ]
    )
    assert found["idle"] == 5
    assert found["functions"] == {"user": 1, "copy": 2, "irq": 1, "send": 3}
    assert found["inside"] == {"user": 1, "copy": 2, "send": 5, "entry": 5, "irq": 1, "default_idle": 1, "do_idle": 1}


def test_the_middle_of_profiles() -> None:
    assert middle([{"a": 1.0, "b": 9.0}, {"a": 3.0}, {"a": 2.0, "b": 8.0}], 2) == {"b": 8.0, "a": 2.0}
    assert list(middle([{"a": 1.0, "b": 9.0}], 1)) == ["b"]
