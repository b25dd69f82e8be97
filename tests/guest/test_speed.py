"""The throughput arms run, prove who did the TLS, and measure what has a goal; what they measure is not judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import speed_bulk, speed_loss, speed_many, speed_profile, speed_small
from bench.__main__ import main
from bench.goals import GOALS, SPEED

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

GROUPS = (speed_bulk.GROUP, speed_small.GROUP, speed_loss.GROUP, speed_many.GROUP)
ELSEWHERE = ("_qemu_7_2", "_over_passt")  # another QEMU; a package more


def test_smoke_run(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    assert main(["--smoke", "--only", ",".join(group.name for group in GROUPS), "--output", str(path)]) == 0
    figures = json.loads(path.read_text())["figures"]
    found = {name.partition("_linux_")[0].removesuffix("_qemu_7_2"): figure for name, figure in figures.items()}
    wanted = {name for name in SPEED if not name.endswith(ELSEWHERE)}
    wanted |= {"rr_latency_over_qemu", "install_time_offload_over_software", "cpu_per_gb_offload_over_plain"}
    assert wanted <= set(GOALS)
    assert wanted | {"small_transfer_over_software_guest_bound"} <= set(found)
    assert all(figure["value"] > 0 for figure in found.values())


def test_smoke_run_of_the_profile(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    assert main(["--smoke", "--only", speed_profile.GROUP.name, "--output", str(path)]) == 0
    figures = json.loads(path.read_text())["figures"]
    parts = {name: figure["details"]["parts"] for name, figure in figures.items()}
    arms = ("plain_tx", "offload_tx", "small_offload", "small_software")
    assert set(parts) == {f"guest_share_driver_{arm}" for arm in arms}
    assert all(99 < sum(found.values()) < 101 for found in parts.values())
    assert all({"driver", "rest of the kernel"} <= set(found) for found in parts.values())
    assert all("copies" in parts[f"guest_share_driver_{arm}"] for arm in arms[:2])
    steps = {arm: figures[f"guest_share_driver_{arm}"]["details"]["us_per_connection"] for arm in arms[2:]}
    assert steps["small_offload"]["tls_device_sendmsg [tls]"] > 0
    assert steps["small_software"]["tls_sw_sendmsg [tls]"] > 0
    assert parts["guest_share_driver_offload_tx"]["tls"] > parts["guest_share_driver_plain_tx"].get("tls", 0)
