"""Where the front end's socket comes from: a path of ours, an inherited listener or connection, and what is none."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from nicdev.edge.unix_socket import from_fd, listen_at
from nicdev.errors import ConfigError
from tests.support.fake_driver import FakeFrontEnd
from tests.support.frontend_bench import Bench, open_fds, serves


def test_inherited_connection_is_served_once() -> None:
    before = open_fds()
    ours, theirs = socket.socketpair()
    bench = Bench(from_fd(ours.detach()))
    peer = FakeFrontEnd(theirs)
    bench.negotiate(peer)
    assert not bench.frontend.finished
    peer.close()
    bench.settle()
    assert bench.frontend.finished
    bench.frontend.close()
    assert open_fds() == before


def test_inherited_listener(path: Path) -> None:
    """The file is its maker's: it stays."""
    before = open_fds()
    bench = Bench(from_fd(listen_at(path).detach()))
    serves(bench, path)
    serves(bench, path)
    bench.frontend.close()
    assert path.exists()
    assert open_fds() == before


def test_fd_that_is_no_socket() -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(ConfigError, match="not a socket"):
        from_fd(fd)
    os.close(fd)
    with pytest.raises(ConfigError, match="not a socket"):
        from_fd(fd)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with pytest.raises(ConfigError, match="unix"):
        from_fd(udp.fileno())
    udp.close()


def test_stale_socket_is_replaced(path: Path) -> None:
    listen_at(path).close()
    assert path.exists()
    bench = Bench(listen_at(path), path)
    serves(bench, path)
    bench.frontend.close()
    assert not path.exists()


def test_live_socket_is_not(path: Path) -> None:
    first = listen_at(path)
    with pytest.raises(ConfigError, match="in use"):
        listen_at(path)
    first.close()


def test_file_that_is_no_socket_is_not_touched(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        listen_at(path)
    assert path.read_text() == "precious"


def test_socket_of_somebody_else_is_not_removed(path: Path) -> None:
    """Replaced under us, by hand or by a newer process: leave it."""
    bench = Bench(listen_at(path), path)
    path.rename(path.with_suffix(".old"))
    other = listen_at(path)
    bench.frontend.close()
    assert path.exists()
    other.close()


@pytest.mark.parametrize("extra", [1, 100, 4000])
def test_path_too_long(path: Path, extra: int) -> None:
    longest = 107 - len(os.fsencode(path.parent)) - 1
    with pytest.raises(ConfigError, match="limit is 107"):
        listen_at(path.parent / ("x" * (longest + extra)))
    listen_at(path.parent / ("x" * longest)).close()


def test_path_that_cannot_be(path: Path) -> None:
    for impossible in (path / "below", Path("/proc/nic.sock")):
        with pytest.raises(ConfigError, match="No such file"):
            listen_at(impossible)
