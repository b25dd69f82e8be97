"""Fixtures of the device tests: a socket, and a front end listening there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nicdev.edge.unix_socket import listen_at
from tests.support.frontend_bench import Bench, mappings, open_fds


@pytest.fixture
def path() -> Iterator[Path]:
    """A socket path short enough for any machine."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "nic.sock"


@pytest.fixture
def bench(path: Path) -> Iterator[Bench]:
    """A listening front end; at the end no fd and no mapping is left of all that happened."""
    before = open_fds(), mappings()
    bench = Bench(listen_at(path), path)
    yield bench
    bench.frontend.close()
    assert not path.exists()
    assert (open_fds(), mappings()) == before
    assert bench.device.rings == {}
