"""Contexts: how fast they come and go, and what memory each takes.

Commands are chains of the tx ring, as the Linux driver posts them: CTX_ADD in an indirect table with room for the
reply, which the driver reads. Memory is that of a fresh process, as the kernel counts it (RssAnon: Python's objects and
libcrypto's, not the guest's memory), at the command line's defaults but for --max-contexts: of a context that has
nothing but its place, and of one that has encrypted or decrypted a record. `bytes_per_context` is the most of these.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from bench.child import Child, Talk
from bench.device_rx import RxArm
from bench.device_tx import RING, ROUNDS, measured
from bench.registry import Group, Measured, Session
from bench.rig import Rig, Run, Shape
from bench.work import SEALED
from nicdev.abi import Direction

MAX_CONTEXTS: Final = 1 << 17
DIRECTIONS: Final = [direction.name.lower() for direction in Direction]


def installs(session: Session) -> Iterator[Measured]:
    """CTX_ADD of both directions, and CTX_DEL."""
    count = session.scaled(50_000, 1_000)
    runs: dict[str, list[Run]] = {"rx": [], "tx": [], "delete": []}
    with Rig(Shape(RING, {"commands": {}}, max_contexts=MAX_CONTEXTS)) as rig:
        for _ in range(session.rounds(ROUNDS)):
            for direction in DIRECTIONS:
                for work in (f"add_{direction}", "delete"):
                    rig.again(work)
                    runs[work.removeprefix("add_")].append(rig.run(work, count, count // 10))
    rates = {name: [max(run.pieces) for run in found] for name, found in runs.items()}
    # a socket has one of each
    both = [2 / (1 / rx + 1 / tx) for rx, tx in zip(rates["rx"], rates["tx"], strict=True)]
    yield Measured("installs_per_s", "1/s", both, details={"contexts": count, "half_of_them": "rx"})
    for name, found in runs.items():
        figure = "deletes_per_s" if name == "delete" else f"installs_{name}_per_s"
        yield measured(figure, "1/s", found, lambda rate: rate)


def anonymous_bytes() -> int:
    """Memory of this process that is not a file's, nor shared."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return int(found) * 1024


def footprint_tx(talk: Talk, contexts: int, warm: int, use: bool) -> None:
    """Bytes per tx context; with `use` after each has encrypted a record of 16 KiB."""
    works: dict[str, dict[str, int]] = {"commands": {}, "flows": {"flows": warm + contexts}}
    with Rig(Shape(RING, works, max_contexts=MAX_CONTEXTS)) as rig:
        sizes = []
        for count in (warm, contexts):
            rig.run("add_tx", count)
            if use:
                rig.run("each", count)
            sizes.append(anonymous_bytes())
        talk.tell((sizes[1] - sizes[0]) / contexts)


def footprint_rx(talk: Talk, contexts: int, warm: int, use: bool) -> None:
    """Bytes per rx context; with `use` after each has decrypted a record of 16 KiB."""
    with ExitStack() as stack:
        arm = RxArm(stack, 1, SEALED)
        sizes = []
        for flows in (range(warm), range(warm, warm + contexts)):
            arm.add(len(flows))
            if use:
                arm.run(flows)
            sizes.append(anonymous_bytes())
        talk.tell((sizes[1] - sizes[0]) / contexts)


def memory(session: Session) -> Iterator[Measured]:
    """100,000 contexts more than the few that were there, which have filled the memory that all share."""
    sizes = {"contexts": session.scaled(100_000, 1_000), "warm": session.scaled(5_000, 100)}

    def grown(direction: str, use: bool) -> float:
        with Child(f"bench.device_contexts:footprint_{direction}", use=use, **sizes) as child:
            return float(child.hear())

    used = {}
    for direction in DIRECTIONS:
        idle, used[direction] = grown(direction, use=False), grown(direction, use=True)
        yield Measured(f"bytes_per_context_{direction}_idle", "bytes", [idle], details=sizes)
        yield Measured(f"bytes_per_context_{direction}", "bytes", [used[direction]], details=sizes)
    yield Measured("bytes_per_context", "bytes", [max(used.values())], details=sizes)


GROUPS: Final = (
    Group("device-installs", "device", "CTX_ADD and CTX_DEL out of a tx ring", installs),
    Group("device-memory", "device", "memory of 100,000 contexts", memory),
)
