"""A capture that can go no further ends, and packets pass as without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pcapng import FileScanner, blocks

from nicdev.edge.capture import Capture
from nicdev.errors import ConfigError
from nicdev.observer import View

# python-pcapng, of its own option
pytestmark = pytest.mark.filterwarnings("ignore:Field type should not be:DeprecationWarning")
FRAME = bytes(60)


def show(capture: Capture, number: int) -> None:
    capture.packet(number, View.WIRE, "rx", FRAME, "")


def test_whoever_opens_it_early_can_read_it(tmp_path: Path) -> None:
    capture = Capture(tmp_path / "nic.pcapng")
    with open(tmp_path / "nic.pcapng", "rb") as file:
        section, *interfaces = FileScanner(file)
    assert isinstance(section, blocks.SectionHeader)
    assert [interface.options["if_name"] for interface in interfaces] == ["host0", "wire0"]
    capture.close()


def test_a_full_disk_at_the_start() -> None:
    with pytest.raises(ConfigError, match=r"^cannot write capture file /dev/full: No space left on device$"):
        Capture(Path("/dev/full"))


def test_a_reader_that_goes_ends_the_capture_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    capture = Capture(path)
    show(capture, 1)
    assert FRAME in os.read(reader, 65536)
    os.close(reader)
    for number in (2, 3):
        show(capture, number)
    assert [record.getMessage() for record in caplog.records] == [
        f"the capture ends here: cannot write {path}: Broken pipe"
    ]
    capture.close()


def test_a_file_that_another_nic_writes_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "nic.pcapng"
    path.write_bytes(b"what an earlier run left")
    first = Capture(path)
    show(first, 1)
    written = path.read_bytes()
    assert not written.startswith(b"what")
    with pytest.raises(ConfigError, match=r"^capture file .*nic\.pcapng is being written by another NIC"):
        Capture(path)
    assert path.read_bytes() == written
    first.close()
    Capture(path).close()
