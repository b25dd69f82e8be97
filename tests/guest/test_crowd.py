"""Hundreds of offloaded sockets at once; `make soak` does it with 2,000, on every kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from testbed.bed import Bed
from tests.guest.test_matrix import SEED
from tests.soak.invariants import Baseline
from tests.soak.sockets import run

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]


@pytest.mark.conformance(13)
@pytest.mark.conformance(101)
def test_sockets_that_open_talk_and_close_while_segments_are_lost(bed: Bed, capture_path: Path) -> None:
    """All are the device's at the same time, every stream arrives, and nothing of them is left."""
    outcome = run(bed, 256, SEED, capture_path, Baseline.of(bed))
    assert outcome.lost > 0
    assert outcome.rx_share > 0.9
