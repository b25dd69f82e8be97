"""A few runs of the disorder matrix on the session's guest; `make soak` runs all of it on every kernel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from testbed.bed import Bed
from testbed.setup import Assets
from tests.soak.disorder import run
from tests.soak.invariants import Baseline
from tests.soak.plan import Setting

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

SEED = int(os.environ.get("SEED") or 1)
A128, A256 = "aes-128-gcm", "aes-256-gcm"
# rx, tx, loss, reorder, duplicate, corrupt, faulty, cipher, family, mtu, segments: each personality in order and in
# disorder of both directions, every value of everything else that a link of 1500 bytes allows
CHOSEN = (
    ("ideal", "rebuild", 0, 0, 0, 0, "both", A128, "4", 1500, "wire"),
    ("ideal", "rebuild", 5, 5, 1, 0.1, "both", A256, "6", 1500, "wire"),
    ("ideal", "next-record", 10, 1, 0, 0, "rx", A128, "6", 576, "wire"),
    ("driver-req", "next-record", 1, 5, 1, 0, "both", A256, "4", 1500, "whole"),
    ("driver-req", "rebuild", 10, 25, 0, 0.1, "tx", A128, "6", 576, "wire"),
    ("driver-req-async", "rebuild", 5, 25, 1, 0, "both", A128, "4", 576, "wire"),
    ("core-next-hint", "rebuild", 1, 0, 0, 0.1, "both", A256, "4", 1500, "wire"),
    ("core-next-hint", "next-record", 0, 0, 0, 0, "both", A128, "6", 1500, "whole"),
)


@pytest.fixture(scope="module")
def baseline(shared_bed: Bed) -> Baseline:
    return Baseline.of(shared_bed)


@pytest.mark.parametrize("row", CHOSEN, ids=lambda row: " ".join(map(str, row)))
def test_nothing_is_lost(
    bed: Bed, assets: Assets, capture_path: Path, baseline: Baseline, row: tuple[str, ...]
) -> None:
    """The invariants of tests/soak hold; a failure is repeated with the same SEED."""
    setting = Setting(assets.kernel.name, *row)  # type: ignore[arg-type]
    run(bed, setting, SEED, capture_path, baseline)
