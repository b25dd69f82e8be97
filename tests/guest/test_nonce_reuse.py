"""A file that changes between its first transmission and the next, although the program promised that it does not.

TLS_TX_ZEROCOPY_RO hands the file's own pages to TCP. What TCP repeats is then encrypted anew, other bytes under the
same nonce. The device remembers what it sent and drops that.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from testbed.assets.image import KERNELS
from testbed.bed import Bed, running
from testbed.setup import prepare
from tests.guest.cases import DEAF, ZEROCOPY, install
from tests.guest.conftest import assert_settled, wait_until
from tests.guest.exchange import CIPHERS, WAIT, Running, Step, exchange, tx_case

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

SIZE = 9000  # less than what TCP sends at first


@pytest.fixture(scope="module", params=KERNELS)
def kernel_bed(request: pytest.FixtureRequest) -> Iterator[Bed]:
    with running(prepare(request.param), name=f"test-reuse-{request.param}") as bed:
        yield bed


@pytest.fixture
def bed(kernel_bed: Bed) -> Iterator[Bed]:
    yield kernel_bed
    assert_settled(kernel_bed, drops=("tx_drop_nonce_reuse",))


def counted(bed: Bed, name: str, least: int) -> bool:
    return bed.nic.stats()[name] >= least


@pytest.mark.conformance(124)
@pytest.mark.parametrize("cipher", CIPHERS)
def test_a_file_that_changes_does_not_leave_under_the_same_nonce(bed: Bed, capture_path: Path, cipher: str) -> None:
    """Not one changed byte is on the wire; when the file is again what it was, the connection goes on."""
    at = 700
    changed: Step = {"do": "overwrite", "at": at, "data": "5a" * 64}
    seed = f"changes {cipher}"
    case = tx_case(
        seed, install("tx"), ZEROCOPY, WAIT, {"do": "sendfile", "size": SIZE}, WAIT, changed, WAIT,
        {"do": "restore", "at": at, "size": 64}, size=SIZE, cipher=cipher,
        guest_job={"options": {"TCP_CORK": 1}},  # or TCP would send, and repeat, the record's header by itself
    )  # fmt: skip

    def meanwhile(run: Running) -> None:
        run.guest_waits()
        sent = bed.nic.stats()["tx_tls_bytes"]
        with bed.nic.faults(DEAF):
            run.go_on()
            run.guest_waits()
            wait_until(partial(counted, bed, "tx_tls_bytes", sent + SIZE), "the file is on the wire")
            dropped = bed.nic.stats()["tx_drop_nonce_reuse"]
            run.go_on()
            wait_until(partial(counted, bed, "tx_drop_nonce_reuse", dropped + 2), "repetitions are dropped")
            run.guest_waits()
            run.go_on()

    seen = exchange(bed, [case], capture_path, meanwhile)
    seen.arrived()
    seen.wire_is_encrypted()  # no byte was ever sent again with another value
    seen.kernel_offloads()
    assert seen.nic["tx_drop_nonce_reuse"] >= 2
    assert seen.driver["tx_tls_device_drop"] >= 1
    assert seen.driver["tx_tls_fallback"] == 0
