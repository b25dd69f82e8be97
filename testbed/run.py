"""`make run`, `make demo` and `make shell`: prepare, boot, demonstrate, and leave the user in the guest."""

from __future__ import annotations

import argparse
import fcntl
import itertools
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table

from testbed.bed import running
from testbed.demo import Result, demonstrate, demonstration_flows
from testbed.errors import BedError, GuestError
from testbed.flows import Outcome
from testbed.setup import Assets, check_tap, prepare
from testbed.stages import BUILD, say
from testbed.vm.terminal import interact
from testbed.watch import announced

SHELL_HINT = """You are in the guest (root). The NIC is eth0; its peer is 198.51.100.1 and 2001:db8:1::1.
  ethtool -S eth0          counters of driver and device        cat /proc/net/tls_stat   the kernel's
  Ctrl-] or exit           leaves and stops the guest
In a second terminal:
  make tcpdump             the wire                          make wire   a shell at its other end; ARGS="PROGRAM ..."
  make ctl ARGS=stats      the NIC; contexts, history, personality, faults set FILE
"""
COUNTERS = ("tx_tls_encrypted_packets", "tx_tls_encrypted_bytes", "tx_tls_ooo", "rx_tls_decrypted_packets",
            "rx_tls_decrypted_bytes", "rx_tls_resync_res_ok", "tx_tls_ctx", "rx_tls_ctx")  # fmt: skip


def _line(flow: Outcome) -> None:
    good = flow.sha256_ok and flow.offloaded and not flow.problem
    rate = flow.bytes_per_s * 8 / 1e6
    family = {"4": "IPv4", "6": "IPv6", "mapped": "IPv4 (mapped)"}[flow.family]
    what = f"{flow.dir} {flow.cipher} {family}, {flow.peer}"
    say(f"  {what:<42} {rate:7.0f} Mbit/s  {'ok' if good else 'FAILED ' + flow.problem}")


def print_result(console: Console, result: Result) -> None:
    """The table of flows, the wire, the counters, and the verdict."""
    table = Table(title=f"kTLS through the NIC: kernel {result.kernel}, {result.qemu}, {result.accel}")
    for name in ("dir", "cipher", "family", "peer"):
        table.add_column(name)
    for name in ("bytes", "offloaded", "records in device / on wire", "Mbit/s", "data"):
        table.add_column(name, justify="right")
    for flow in result.flows:
        table.add_row(
            flow.dir,
            flow.cipher,
            flow.family,
            flow.peer,
            f"{flow.bytes:,}",
            "yes" if flow.offloaded else "NO",
            f"{flow.records_offloaded} / {flow.records}",
            f"{flow.bytes_per_s * 8 / 1e6:.0f}",
            "equal" if flow.sha256_ok else "DIFFERS",
        )
    console.print(table)
    wire = result.wire
    console.print(
        f"wire: {wire['records']} records, {wire['records_decrypted_ok']} decrypted by an independent decoder, "
        f"{wire['plaintext_hits']} frames with plaintext"
    )
    console.print("ethtool -S: " + ", ".join(f"{name} {result.ethtool[name]}" for name in COUNTERS))
    for problem in result.problems:
        console.print(f"problem: {problem}", style="red", markup=False)


@contextmanager
def own_name() -> Iterator[str]:
    """What the logs are called: run, or run-2 and so on while there are other runs."""
    folder = BUILD / "log"
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        name = "run" if number == 1 else f"run-{number}"
        with open(folder / f".{name}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield name
            return


def nic_options() -> list[str]:
    """What `make run NIC="..."` hands to the NIC. Raises BedError."""
    try:
        return shlex.split(os.environ.get("NIC", ""))
    except ValueError as error:
        raise BedError(f"NIC={os.environ['NIC']}: {error}") from None


def session(assets: Assets, shell: str) -> int:
    """Boot, demonstrate unless `shell` is "only", then the shell if wanted. Returns the exit status."""
    interactive = shell == "only" or (shell == "auto" and sys.stdin.isatty() and sys.stdout.isatty())
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    say(f"booting the guest: {assets.summary}")
    began = time.monotonic()
    options = nic_options()
    with own_name() as name, running(assets, name=name, nic_arguments=options) as bed, announced(bed.nic, bed.wire):
        say(f"guest answers after {bed.guest.boot_seconds:.1f} s")
        ok = True
        if shell != "only":
            say("demonstration: 16 MiB per connection, sent or received by the guest")
            result = demonstrate(bed, assets, demonstration_flows(), _line)
            result.write(BUILD / "demo.json")
            print_result(console, result)
            ok = result.ok
            say(f"{'ok' if ok else 'FAILED'} after {time.monotonic() - began:.0f} s; details in build/demo.json")
        if interactive:
            print(SHELL_HINT)
            interact(bed.agent)
    return 0 if ok else 1


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Entry point; a failure is one line (and what the guest said last), never a traceback."""
    parser = argparse.ArgumentParser(prog="testbed.run", description=__doc__)
    parser.add_argument("--shell", choices=("auto", "never", "only"), default="auto")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        if arguments.shell == "only" and not sys.stdin.isatty():
            raise BedError("a shell needs a terminal; without one use `make demo`")
        check_tap()  # before minutes are spent on preparing
        return session(prepare(), arguments.shell)
    except BedError as error:
        if isinstance(error, GuestError) and error.console:
            print(f"--- the guest's console ends with:\n{error.console}\n---", file=sys.stderr)
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
