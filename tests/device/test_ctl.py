"""`tlsnic-ctl` as people use it: every mistake is one line, and what a NIC says of itself leads where it says."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

DEADLINE = 20


@contextmanager
def nic(path: Path, *arguments: str) -> Iterator[str]:
    """A NIC with its control socket at `path`.control; gives the line with which it begins."""
    sockets = ["--socket-path", str(path), "--control", f"{path}.control"]
    argv = [sys.executable, "-m", "nicdev.cli", *sockets, *arguments]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            yield process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE) == 0
        finally:
            process.kill()


def ctl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "nicdev.ctl", *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE, check=False)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "the following arguments are required: SOCKET, cmd"),
        (["/nic.control"], "the following arguments are required: cmd"),
        (["/nic.control", "personality", "--colour"], "unrecognized arguments: --colour"),
        (["/nic.control", "faults", "set"], "the following arguments are required: FILE"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], line: str) -> None:
    done = ctl(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"tlsnic-ctl: {line}\n")


def test_personalities_are_shown_and_changed(tmp_path: Path) -> None:
    path = tmp_path / "nic"
    control = f"{path}.control"
    with nic(path, "--port", "null", "--rx-personality", "driver-req"):
        assert ctl(control, "personality").stdout == "rx driver-req, tx rebuild\n"
        changed = ctl(control, "personality", "--rx", "core-next-hint", "--tx", "next-record", "--nic", "0")
        assert changed.stdout == "rx core-next-hint, tx next-record\n"
        assert ctl(control, "personality").stdout == changed.stdout
        wrong = ctl(control, "personality", "--rx", "psychic")
        line = "tlsnic-ctl: rx is one of core-next-hint, driver-req, driver-req-async, ideal\n"
        assert (wrong.returncode, wrong.stdout, wrong.stderr) == (2, "", line)


def test_the_first_line_names_sockets_and_port(tmp_path: Path) -> None:
    with nic(tmp_path / "nic", "--port", "null") as line:
        assert line == f"tlsnic: serving {tmp_path}/nic on port null\n"


@pytest.mark.needs_netns
def test_the_first_line_says_how_programs_get_to_the_wire(tmp_path: Path) -> None:
    with nic(tmp_path / "nic", "--port", "tap:address=198.51.100.1/24") as line:
        head, way = line.rstrip(")\n").split(" (programs get there by: ")
        assert head == f"tlsnic: serving {tmp_path}/nic on tap wire0"
        argv = shlex.split(way.replace("PROGRAM", "ip -brief -4 address show wire0"))
        shown = subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE, check=True).stdout
        assert shown.split() == ["wire0", "UNKNOWN", "198.51.100.1/24"]
