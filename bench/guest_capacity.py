"""What the NIC can hold and do: contexts, how fast they are installed, and throughput, for each direction.

The kernel's document asks that a NIC be characterised by these four, and warns that sizes matter: so throughput is
measured over records and segments of different sizes. A capture of the wire runs beside, since offload has to be
proven.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

from bench.goals import flat
from bench.registry import Group, Measured, Session, interleaved
from testbed.bed import TOOLS, WIRE4, Bed, running
from testbed.peers.flowkeys import FlowKeys
from testbed.setup import Assets
from tests.guest.conftest import wait_until
from tests.guest.exchange import BOTH, CIPHERS, exchange, rx_case, send, tx_case

RECORDS: Final = (256, 1024, 16384)
SEGMENTS: Final = ("whole", "wire")  # packets of up to 64 KiB, or one segment each
SECONDS: Final = 60
CUT: Final = '[rx]\nsegments = "wire"\n'
LISTEN: Final = (
    f"import socket, sys; s = socket.create_server(('{WIRE4}', 0), backlog=4000)\n"
    "print(s.getsockname()[1], flush=True); sys.stdin.readline()\n"
)
INSTALL: Final = """
import json, socket, sys, time
sys.path.insert(0, sys.argv[1])
from ktls_raw import crypto_info
job, seconds = json.loads(sys.argv[2]), {}
sockets = [socket.create_connection(tuple(job["connect"])) for _ in range(job["count"])]
for s in sockets:
    s.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
for name, number in (("tx", 1), ("rx", 2)):
    info, seconds[name] = crypto_info(job["cipher"], **job["keys"][name]), []
    for s in sockets:
        began = time.monotonic()
        s.setsockopt(282, number, info)
        seconds[name].append(time.monotonic() - began)
for s in sockets:
    s.send(b"x")
print(json.dumps(seconds), flush=True)
sys.stdin.readline()
"""


def installs(bed: Bed, count: int, number: int = 0, *, offloaded: bool = True) -> dict[str, float]:
    """Install contexts on `count` open connections, one after the other: seconds for one (median), and how many in one.

    AssertionError if they are not all in the device, or none of them if they are not to be.
    """
    with ExitStack() as stack:
        sink = stack.enter_context(
            bed.wire.popen(["python3", "-c", LISTEN], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        )
        stack.callback(sink.kill)
        assert sink.stdout is not None
        keys = FlowKeys.from_seed(CIPHERS[0], f"install {number}").as_job(*BOTH)
        job = {"count": count, "connect": [WIRE4, int(sink.stdout.readline())], **keys}
        tool = bed.agent.spawn(["python3", "-c", INSTALL, TOOLS, json.dumps(job)])
        stack.callback(lambda: tool.kill() if tool.running else None)
        tool.wait_for_output(b"\n", SECONDS)
        contexts = 2 * count * offloaded  # the device hears of one that sends with its first packet
        wait_until(lambda: len(bed.nic.contexts()) == contexts, "all contexts are in the device, or none")
        seconds: dict[str, list[float]] = json.loads(bytes(tool.stdout).splitlines()[0])
        tool.write(b"\n")
        tool.wait(SECONDS)
    found = {f"{name}_install_latency": 1e6 * median(times) for name, times in seconds.items()}
    return found | {f"{name}_install_rate": count / sum(times) for name, times in seconds.items()}


@contextmanager
def cut(bed: Bed, segments: str) -> Iterator[None]:
    """Packets of single segments, in both directions."""
    if segments == "whole":
        yield
        return
    limit = ["ip", "link", "set", "dev", "eth0", "gso_max_segs"]
    bed.agent.run([*limit, "1"])
    try:
        with bed.nic.faults(CUT):
            yield
    finally:
        bed.agent.run([*limit, "65535"])


def throughput(bed: Bed, size: int, direction: str, sizes: tuple[int, str], number: int) -> float:
    """Gbit/s of plaintext of one connection with these RECORDS and SEGMENTS. AssertionError if it was not offloaded."""
    record, segments = sizes
    name = f"{direction} {record} {segments} {number}"
    if direction == "tx":
        case = tx_case(name, send(size, write=record), size=size)
    else:
        case = rx_case(name, send(size, records=[record]), size=size)
    with tempfile.TemporaryDirectory(prefix="tlsnic-bench-") as folder, cut(bed, segments):
        seen = exchange(bed, [case], Path(folder) / "wire.pcap")
    seen.arrived()
    seen.wire_is_encrypted()
    seen.kernel_offloads()
    receiver = seen.peers[0] if direction == "tx" else seen.guest[0]
    return 8e-9 * size / float(receiver["seconds"])


@contextmanager
def plain(assets: Assets) -> Iterator[Bed]:
    """For Session.guest: a guest without more."""
    with running(assets, name="bench-capacity") as bed:
        yield bed


def figures(session: Session, bed: Bed) -> Iterator[Measured]:
    """All of it, on a guest that runs."""
    rounds = session.rounds()
    yield Measured("contexts_max", "contexts", [float(bed.nic.ask("info")["max_contexts"])])
    results = [installs(bed, session.scaled(200, 4), number) for number in range(rounds)]
    for name in results[0]:
        unit = "us" if name.endswith("latency") else "contexts/s"
        yield Measured(name, unit, [result[name] for result in results])
    arms = {
        flat(direction, "throughput", f"{record}_byte_records", f"{segments}_packets"): partial(
            throughput, bed, session.scaled(8 << 20, 1 << 15), direction, (record, segments)
        )
        for direction in BOTH
        for record in RECORDS
        for segments in SEGMENTS
    }
    for name, samples in interleaved(arms, rounds).items():
        yield Measured(name, "Gbit/s", samples)


def measure(session: Session) -> Iterator[Measured]:
    """The group."""
    yield from figures(session, session.guest(plain))


GROUP: Final = Group(
    "capacity", "guest", "contexts, their installation, throughput by sizes of records and packets", measure
)
