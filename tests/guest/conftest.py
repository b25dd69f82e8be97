"""Fixtures of the guest tests: one guest with the NIC per process, and what must hold after every test."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testbed.bed import Bed, running
from testbed.setup import Assets, prepare
from testbed.stages import BUILD

SETTLE_SECONDS = 15


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Iterator[None]:
    """Beside a failure, show what the guest's kernel and the NIC said last."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.failed:
        since = time.time() - call.duration - 60
        logs = [path for kind in ("console", "nic") for path in sorted((BUILD / "log").glob(f"*.{kind}"))]
        for path in (path for path in logs if path.stat().st_mtime > since):
            tail = "\n".join(path.read_text(errors="replace").splitlines()[-25:])
            report.sections.append((f"end of {path.name}", tail))


@pytest.fixture(scope="session")
def assets() -> Assets:
    return prepare()


@pytest.fixture(scope="session")
def shared_bed(assets: Assets) -> Iterator[Bed]:
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    with running(assets, name=f"test{worker}") as bed:
        yield bed


@pytest.fixture
def bed(shared_bed: Bed) -> Iterator[Bed]:
    """The process' guest; after the test nothing of it may be left and nothing may have broken."""
    yield shared_bed
    assert_settled(shared_bed)


@pytest.fixture
def capture_path(tmp_path: Path) -> Path:
    """Where a capture of the wire goes; tcpdump may write only names that end so."""
    return tmp_path / "wire.pcap"


def wait_until(condition: Callable[[], bool], what: str, seconds: float = SETTLE_SECONDS) -> None:
    """Poll until `condition` holds; fails the test with `what` otherwise."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def contexts_of_the_driver(bed: Bed) -> int:
    """Those that the kernel has made and not deleted."""
    counters = bed.ethtool()
    return sum(counters[f"{name}_tls_ctx"] - counters[f"{name}_tls_del"] for name in ("tx", "rx"))


def assert_settled(bed: Bed, drops: tuple[str, ...] = ()) -> None:
    """No context is left in device, driver and kernel; the kernel has nothing to complain about; the NIC lives."""
    wait_until(lambda: not bed.nic.contexts(), "the device's contexts are gone")
    stat = bed.tls_stat()
    assert stat["TlsCurrTxDevice"] == stat["TlsCurrRxDevice"] == 0
    wait_until(lambda: not contexts_of_the_driver(bed), "the driver's contexts are gone")
    assert bed.guest.kernel_complaints() == []
    assert bed.nic.alive()
    nic = bed.nic.stats()
    errors = {name for name, n in nic.items() if n and ("_drop_" in name or name.endswith("_ring_errors"))}
    assert errors <= {"rx_drop_queue_down", *drops}
