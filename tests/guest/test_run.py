"""`make` as people use it: mistakes, interruptions and several runs at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from testbed.errors import SetupError
from testbed.stages import PROJECT
from testbed.vm.runtime import RuntimeFolder
from testbed.watch import going_on
from tests.guest.conftest import wait_until

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

# not those of the make that runs the tests
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
BOOT_SECONDS = 120


def make(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *words],
        cwd=PROJECT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=BOOT_SECONDS,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["demo", "KERNEL=next"], "error: KERNEL=next is not offered; choose one of 6.1, 6.12, 7.2"),
        (["demo", "ACCEL=x"], "error: ACCEL=x: choose kvm or tcg"),
        (["demo", "QEMU=/nonexistent"], "error: QEMU /nonexistent: No such file or directory"),
        (["demo", "QEMU=/bin/true"], "error: not a QEMU: it says 'true (GNU coreutils"),
        (["demo", "NIC=--nonsense"], "error: vhost-user-tlsnic: unrecognized arguments: --nonsense"),
        (["shell"], "error: a shell needs a terminal; without one use `make demo`"),
    ],
)
def test_a_mistake_is_one_line(words: Sequence[str], line: str) -> None:
    done = make(*words)
    assert done.returncode == 2
    said, makes_own = done.stderr.splitlines()
    assert said.startswith(line)
    assert makes_own.startswith("make: ***")


def children(pid: int) -> Iterator[int]:
    """All descendants of a process."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            yield child
            yield from children(child)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def demonstration() -> Iterator[subprocess.Popen[str]]:
    """`make demo` with its guest answering."""
    argv = ["env", "--default-signal=INT", "make", "demo"]  # what runs us in the background may ignore it
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, cwd=PROJECT, env=ENVIRONMENT, stdout=pipe, stderr=subprocess.STDOUT, text=True) as run:
        try:
            yield run
        finally:
            run.kill()


def await_guest(run: subprocess.Popen[str]) -> None:
    assert run.stdout is not None
    said = []
    for line in run.stdout:
        said.append(line)
        if line.startswith("guest answers"):
            return
    pytest.fail("".join(said))


def command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def folders(pids: Sequence[int]) -> set[Path]:
    """The run folders that these processes were told to use."""
    named = (re.findall(rb"/[\w/]+/tlsnic-run-\w+", command(pid)) for pid in pids)
    return {Path(os.fsdecode(path)) for found in named for path in found}


def swept(paths: set[Path]) -> bool:
    """Whether the next run has removed them."""
    RuntimeFolder().remove()
    return not any(path.exists() for path in paths)


def test_two_runs_at_once_and_nothing_stays_of_the_killed() -> None:
    with ExitStack() as stack:
        both = [stack.enter_context(demonstration()) for _ in range(2)]
        for run in both:
            await_guest(run)
        seen = make("tcpdump", "ARGS=-c 3")
        assert seen.returncode == 0, seen.stderr
        assert len(seen.stdout.splitlines()) == 3
        address = make("wire", "ARGS=ip -brief -4 address show wire0").stdout
        assert address.split()[-1] == "198.51.100.1/24"
        assert make("ctl", "ARGS=personality").stdout == "rx ideal, tx rebuild\n"
        family = [pid for run in both for pid in (run.pid, *children(run.pid))]
        for program in (b"nicdev.cli", b"qemu-system"):
            assert len([pid for pid in family if program in command(pid)]) == 2
        used = folders(family)
        assert len(used) == 4  # one of the bed and one of the guest, twice
        python = next(
            pid for pid in children(both[1].pid) if b"testbed.run" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        os.kill(both[0].pid, signal.SIGKILL)  # make itself: what it runs is told to end
        os.kill(python, signal.SIGKILL)
        wait_until(lambda: not any(map(runs, family)), "every process of both is gone")
    assert swept(used)
    with pytest.raises(SetupError, match="no run is going on; start `make run` in another terminal first"):
        going_on()
    done = make("tcpdump")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no run is going on; start `make run` in another terminal first\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_and_says_so(number: int) -> None:
    with demonstration() as run:
        await_guest(run)
        family = list(children(run.pid))
        used = folders(family)
        assert len(used) == 2
        python = next(pid for pid in family if b"testbed.run" in command(pid))
        os.kill(python, number)
        assert run.stdout is not None
        said = run.stdout.read()
        assert run.wait(20) == 2
        assert "interrupted" in said.splitlines()
        assert "Traceback" not in said
        wait_until(lambda: not any(map(runs, family)), "every process is gone")
    assert not any(path.exists() for path in used)
