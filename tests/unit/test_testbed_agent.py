"""Both sides of the agent's protocol over a socket pair: the guest's file runs as a plain process of this machine."""

from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.errors import AgentError, AgentTimeout, GuestDied
from testbed.vm import agent as host
from testbed.vm.agent import GuestAgent

GUEST_FILE = Path(__file__).parents[2] / "guest-image" / "agent.py"


@pytest.fixture
def guest() -> Iterator[tuple[GuestAgent, subprocess.Popen[bytes]]]:
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-I", "-S", str(GUEST_FILE), str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    agent = GuestAgent(ours, lambda: "last words")
    try:
        yield agent, process
    finally:
        agent.close()
        assert process.wait(10) in (0, -signal.SIGKILL)


@pytest.fixture
def agent(guest: tuple[GuestAgent, subprocess.Popen[bytes]]) -> GuestAgent:
    return guest[0]


def test_both_files_number_the_frames_alike() -> None:
    assigned: dict[str, int] = {}
    for node in ast.parse(GUEST_FILE.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            assert isinstance(node.value, ast.Tuple)
            names = [name.id for name in node.targets[0].elts if isinstance(name, ast.Name)]
            assigned.update(zip(names, ast.literal_eval(node.value), strict=True))
    assert len(assigned) == 12
    assert {name: getattr(host, name) for name in assigned} == assigned


def test_ping(agent: GuestAgent) -> None:
    assert agent.ping()["kernel"] == os.uname().release


def test_run_returns_both_streams_and_the_status(agent: GuestAgent) -> None:
    done = agent.run(["sh", "-c", "cat; echo oops >&2; exit 3"], input=b"hello", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"hello", b"oops\n")


def test_a_failing_program_raises_unless_told_otherwise(agent: GuestAgent) -> None:
    with pytest.raises(AgentError, match="exit status 3: oops"):
        agent.run(["sh", "-c", "echo oops >&2; exit 3"])


def test_environment_and_directory(agent: GuestAgent, tmp_path: Path) -> None:
    done = agent.run(["sh", "-c", "echo $WHAT; pwd"], env={"WHAT": "x"}, cwd=str(tmp_path))
    assert done.text == f"x\n{tmp_path}\n"


def test_a_missing_program_is_one_clear_error_and_the_agent_lives(agent: GuestAgent) -> None:
    with pytest.raises(AgentError, match="No such file"):
        agent.run(["/no/such/program"])
    with pytest.raises(AgentError, match="No such file"):
        agent.run(["true"], cwd="/no/such/folder")
    assert agent.ping()


def test_megabytes_through_a_program_both_ways_at_once(agent: GuestAgent) -> None:
    content = os.urandom(5 << 20)
    assert agent.run(["cat"], input=content).stdout == content


def test_input_that_nobody_reads(agent: GuestAgent) -> None:
    assert agent.run(["true"], input=bytes(1 << 20)).returncode == 0


def test_a_deadline_kills_the_whole_group_and_keeps_the_output(agent: GuestAgent) -> None:
    began = time.monotonic()
    with pytest.raises(AgentTimeout) as caught:
        agent.run(["sh", "-c", "echo begun; sleep 60; true"], timeout=2)
    assert caught.value.stdout == b"begun\n"
    assert time.monotonic() - began < 30, "it waited for the command"
    assert agent.ping()


def test_a_daemon_left_behind_does_not_delay_the_end(agent: GuestAgent) -> None:
    began = time.monotonic()
    done = agent.run(["sh", "-c", "sleep 60 & echo $!"])
    assert time.monotonic() - began < 30, "it waited for the daemon"
    agent.run(["sh", "-c", f"kill {done.text.strip()}"])


def test_several_at_once_each_with_its_own_stream(agent: GuestAgent) -> None:
    cats = [agent.spawn(["cat"]) for _ in range(5)]
    for number, cat in enumerate(cats):
        cat.write(b"%d\n" % number)
    assert [cat.read(5) for cat in cats] == [b"%d\n" % number for number in range(5)]
    assert all(cat.running for cat in cats)
    for cat in cats:
        cat.close_input()
    assert [cat.wait(5) for cat in cats] == [0] * 5
    assert cats[0].read(5) == b""


def test_kill_and_output_to_wait_for(agent: GuestAgent) -> None:
    program = agent.spawn(["sh", "-c", "echo ready; exec sleep 60"])
    program.wait_for_output(b"ready", 5)
    program.kill(signal.SIGTERM)
    assert program.wait(5) == -signal.SIGTERM
    with pytest.raises(AgentError, match="ended without"):
        program.wait_for_output(b"never", 5)


def test_a_terminal_of_its_own(agent: GuestAgent) -> None:
    shell = agent.spawn(["sh"], env={"PS1": "$ "}, terminal=(31, 97))
    shell.write(b"stty size; test -t 0 && echo con-trol | tr -d -\n")
    shell.wait_for_output(b"control", 5)
    assert b"31 97" in shell.stdout
    shell.resize(12, 34)
    shell.write(b"stty size\nexit 5\n")
    assert shell.wait(5) == 5
    assert b"12 34" in shell.stdout


def test_files_travel_with_their_mode(agent: GuestAgent, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    path = tmp_path / "new" / "folder" / "file"
    agent.put(str(path), content, mode=0o750)
    assert path.read_bytes() == content
    assert path.stat().st_mode & 0o7777 == 0o750
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    assert agent.get(str(path)) == content
    agent.put(str(path), b"")
    assert agent.get(str(path)) == b""


def test_file_errors(agent: GuestAgent) -> None:
    with pytest.raises(AgentError, match="No such file"):
        agent.get("/no/such/file")
    with pytest.raises(AgentError, match="No such file"):
        agent.put("/proc/self/nothing/here", b"x")
    assert agent.ping()


def test_death_reaches_every_waiter_with_the_console(guest: tuple[GuestAgent, subprocess.Popen[bytes]]) -> None:
    agent, process = guest
    program = agent.spawn(["cat"])
    assert agent.ping()
    process.kill()
    with pytest.raises(GuestDied) as caught:
        program.wait(10)
    assert caught.value.console == "last words"
    with pytest.raises(GuestDied):
        agent.run(["true"])


def test_the_guest_ends_its_programs_when_the_host_goes(guest: tuple[GuestAgent, subprocess.Popen[bytes]]) -> None:
    agent, process = guest
    program = agent.spawn(["sh", "-c", "echo $$; exec sleep 60"])
    program.wait_for_output(b"\n", 5)
    pid = int(bytes(program.stdout))
    agent.close()
    assert process.wait(10) == 0
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
