"""build/bench.json: figures by name, each with all that is needed to judge it, merged with those of earlier runs."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.goals import GOALS, Goal
from bench.registry import Measured
from testbed.assets.image import DEFAULT_KERNEL
from testbed.setup import Assets
from testbed.stages import PROJECT

DIGITS = 4
USUAL_QEMU = 10
KERNEL = re.compile(r"_linux_\d+_\d+")  # in qualified names


@dataclass(frozen=True)
class Surroundings:
    """Where and when a figure was measured; `qemu`, `kernel` (the guest's) and `accelerator` are None without guest."""

    command: str
    machine: str
    commit: str
    date: str
    qemu: str | None = None
    kernel: str | None = None
    accelerator: str | None = None


def machine() -> str:
    """Processors and kernel of the host."""
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
              if line.startswith("model name")]  # fmt: skip
    model = models[0] if models else platform.machine()
    return f"{os.cpu_count()} x {model}, Linux {platform.release()}"


def commit() -> str:
    """The commit, with -dirty if what is measured was changed since; "unknown" outside of a checkout."""
    said = subprocess.run(
        ["git", "-C", PROJECT, "describe", "--always", "--dirty", "--abbrev=10"],
        capture_output=True,
        text=True,
        check=False,
    )
    return said.stdout.strip() or "unknown"


def command(arguments: list[str], kernel: str | None) -> str:
    """How to make the figures of a group again; `kernel` only where it is not the default."""
    chosen = f"KERNEL={kernel} " if kernel and kernel != DEFAULT_KERNEL else ""
    return f"{chosen}make bench ARGS={shlex.quote(shlex.join(arguments))}"


def surroundings(arguments: list[str], assets: Assets | None) -> Surroundings:
    """As they are now; `assets` are those of the guest, if there was one."""
    common = (machine(), commit(), datetime.now(UTC).isoformat(timespec="seconds"))
    if assets is None:
        return Surroundings(command(arguments, None), *common)
    guest = (str(assets.qemu), assets.kernel.release, assets.accel.name)
    return Surroundings(command(arguments, assets.kernel.name), *common, *guest)


def qualified(name: str, assets: Assets | None) -> str:
    """A figure's name in the file: with the kernel and the QEMU where they are not the usual ones."""
    if assets and assets.kernel.name != DEFAULT_KERNEL:
        name += f"_linux_{assets.kernel.name.replace('.', '_')}"
    if assets and assets.qemu.version[0] != USUAL_QEMU:
        name += "_qemu_{}_{}".format(*assets.qemu.version)
    return name


def entry(measured: Measured, kind: str, where: Surroundings, name: str = "") -> dict[str, Any]:
    """A figure as it stands in the file; `name` is qualified: a QEMU may have goals of its own, a kernel has none."""
    goal = GOALS.get(KERNEL.sub("", name)) or GOALS.get(measured.name) or Goal()
    found: dict[str, Any] = {
        "value": round(measured.value, DIGITS),
        "unit": measured.unit,
        "target": goal.target,
        "anchor": goal.anchor,
        "anchor_is": goal.anchor_is or None,
        "less_is_better": goal.less_is_better,
        "met": goal.met(measured.value),
        "kind": kind,
        "rounds": len(measured.samples),
        "spread": round(measured.spread, DIGITS),
        "samples": [round(sample, DIGITS) for sample in measured.samples],
    }
    if measured.control_variation is not None:
        found["control_variation"] = round(measured.control_variation, DIGITS)
        found["unsteady"] = measured.unsteady
    return {**found, **asdict(where), "details": dict(measured.details)}


class Results:
    """The file. What was measured again replaces what was there; the rest stays."""

    def __init__(self, path: Path | None) -> None:
        """Read what is there; without a path, nothing is written. Raises ValueError if it is not what `add` writes."""
        self.path = path
        self.figures: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self.figures = dict(json.loads(path.read_text())["figures"])

    def add(self, name: str, figure: dict[str, Any]) -> None:
        """Put in a figure, at once and in one step: an interrupted run keeps what it has."""
        self.figures[name] = figure
        if self.path is None:
            return
        last = {key: figure[key] for key in Surroundings.__dataclass_fields__ if key != "command"}
        text = json.dumps({**last, "figures": dict(sorted(self.figures.items()))}, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".tmp-{self.path.name}")
        temporary.write_text(text + "\n")
        temporary.replace(self.path)
