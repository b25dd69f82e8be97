"""The whole path on every kernel: what `make demo` shows, with less data and with the loopholes closed."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from testbed.bed import running
from testbed.demo import demonstrate, demonstration_flows
from testbed.setup import prepare

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

SIZE = 2 << 20


@pytest.mark.parametrize("kernel", ["6.1", "6.12", "7.2"])
def test_every_flow_is_offloaded_and_the_wire_is_encrypted(kernel: str) -> None:
    assets = prepare(kernel)
    with running(assets, name=f"test-{kernel}") as bed:
        result = demonstrate(bed, assets, demonstration_flows(SIZE), lambda _: None)
    assert result.problems == []
    assert len(result.flows) == 18
    assert {(f.dir, f.cipher, f.family, f.peer) for f in result.flows} >= {
        (d, c, f, p)
        for d in ("tx", "rx")
        for c in ("aes-128-gcm", "aes-256-gcm")
        for f in ("4", "6")
        for p in ("openssl", "raw")
    }
    for flow in result.flows:
        assert flow.offloaded
        assert flow.sha256_ok
        assert flow.records >= SIZE >> 14
        assert flow.records_offloaded > flow.records * 0.97
    assert result.wire["records"] == result.wire["records_decrypted_ok"] > 18 * (SIZE >> 14)
    assert result.wire["plaintext_hits"] == 0
    assert result.tls_stat["TlsTxDevice"] >= 9
    assert result.tls_stat["TlsRxDevice"] >= 9
    assert result.ethtool["tx_tls_encrypted_bytes"] > 9 * SIZE
    assert result.ethtool["rx_tls_decrypted_bytes"] > 8.5 * SIZE


def test_on_the_oldest_qemu() -> None:
    """QEMU 7.2 without KVM crashes with a vhost-user NIC that uses MSI-X, so the NIC gets a plain interrupt."""
    assets = prepare(environ={**os.environ, "QEMU": "bookworm", "ACCEL": "tcg"})
    assert assets.qemu.version[:2] == (7, 2)
    with running(assets, name="test-qemu") as bed:
        nic = bed.agent.run(["sh", "-c", "basename $(readlink /sys/class/net/eth0/device)"]).text.strip()
        interrupts = bed.agent.run(["cat", "/proc/interrupts"]).text
        assert nic in interrupts
        assert f"{nic}-input" not in interrupts  # what a vector of its own would be called
        result = demonstrate(bed, assets, demonstration_flows(SIZE)[-4:], lambda _: None)
    assert result.problems == []


def test_a_device_without_tls_leaves_sockets_to_software() -> None:
    assets = prepare()
    flows = [replace(flow, size=1 << 20) for flow in demonstration_flows()[-2:]]
    with running(assets, name="test-off", nic_arguments=["--tls", "off"]) as bed:
        result = demonstrate(bed, assets, flows, lambda _: None)
    assert [flow.offloaded for flow in result.flows] == [False, False]
    assert not result.ok
    assert [flow.sha256_ok for flow in result.flows] == [True, True]
    assert result.wire["records"] == result.wire["records_decrypted_ok"] > 0
    assert result.wire["plaintext_hits"] == 0
    assert result.tls_stat["TlsTxSw"] == result.tls_stat["TlsRxSw"] == 1
