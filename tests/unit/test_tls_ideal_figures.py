"""How many records the kernel finds wholly decrypted under loss and reordering: the figures that rx `ideal` promises.

The benchmark prints them for more rates and suites: python -m bench --only simulation
"""

from __future__ import annotations

import pytest

from tests.support.tls_figures import bulk, run
from tests.support.tls_oracle import GCM_1_2, SUITES, Suite
from tests.support.tls_path import Path

FIGURES = [  # path, share of records that must be offloaded, of TLS 1.2 AES-GCM
    (Path(), 0.99),
    *((Path(window, loss=0.01), 0.97) for window in (64, 256)),
    *((Path(window, loss=0.05), 0.90) for window in (64, 256)),
    (Path(reorder=0.02), 0.95),
    (Path(reorder=0.05), 0.90),
]


@pytest.mark.parametrize(("path", "share"), FIGURES)
def test_share_of_records_offloaded(path: Path, share: float) -> None:
    result = run(bulk(GCM_1_2, 400), path)
    assert result.offloaded >= share
    assert result.dropped == 0
    assert result.state == "in_sync"


@pytest.mark.parametrize("suite", SUITES[1:], ids=str)
def test_other_suites_complete_under_loss(suite: Suite) -> None:
    """Without nonces that tell numbers, a hidden header costs a record more."""
    result = run(bulk(suite, 200), Path(loss=0.01, reorder=0.01))
    assert result.offloaded >= 0.93
    assert result.dropped == 0
