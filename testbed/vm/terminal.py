"""Lend this process's terminal to a program in the guest, with a terminal of its own on the other side."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator, Sequence

from testbed.errors import AgentTimeout, GuestDied
from testbed.vm.agent import GuestAgent, Request

LEAVE = 0x1D  # Ctrl-]
HANGUP_SECONDS = 2.0  # for the program to end when the user leaves
SHELL = ("bash", "--login")


@contextlib.contextmanager
def _raw(fd: int) -> Iterator[None]:
    saved = termios.tcgetattr(fd)
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, saved)


def _show(program: Request, finished: int) -> None:
    """Copy the program's output to ours until it ends (in a thread); that a guest died is for the caller to see."""
    try:
        with contextlib.suppress(GuestDied):
            while program.running or program.unread:
                with contextlib.suppress(AgentTimeout):
                    data = program.read(1.0)
                    while data:
                        data = data[os.write(sys.stdout.fileno(), data) :]
    finally:
        os.close(finished)


def interact(agent: GuestAgent, argv: Sequence[str] = SHELL) -> int | None:
    """Run `argv` on this terminal until it ends (its exit status) or the user presses Ctrl-] (None)."""
    columns, rows = shutil.get_terminal_size()
    environment = {"TERM": os.environ.get("TERM", "linux")}
    program = agent.spawn(argv, env=environment, terminal=(rows, columns))
    ended, finished = os.pipe()
    output = threading.Thread(target=_show, args=(program, finished), daemon=True)
    keyboard = sys.stdin.fileno()

    def resized(*_: object) -> None:
        width, height = shutil.get_terminal_size()
        program.resize(height, width)

    previous = signal.signal(signal.SIGWINCH, resized)
    try:
        with _raw(keyboard):
            output.start()
            while True:
                ready, _, _ = select.select([keyboard, ended], [], [])
                if ended in ready:
                    break
                typed = os.read(keyboard, 4096)
                if not typed or LEAVE in typed:
                    program.kill(signal.SIGHUP)
                    output.join(HANGUP_SECONDS)
                    return None
                program.write(typed)
        return program.wait(5)
    finally:
        signal.signal(signal.SIGWINCH, previous)
        os.close(ended)
