"""The whole matrix, then 2,000 sockets, on every kernel: python -m tests.soak [--kernel 6.12] [--run N] [--strength 2]

A line per run, a summary, and build/soak.json. What goes wrong is kept in build/soak/ (capture, account), and its line
says how to repeat it. SEED chooses the matrix and everything random in it. After a failure the guest is started anew.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from testbed.bed import Bed, running
from testbed.setup import prepare
from testbed.stages import BUILD
from tests.soak import disorder, sockets
from tests.soak.invariants import Baseline
from tests.soak.plan import FACTORS, Setting, settings

FOLDER = BUILD / "soak"


@dataclass
class Job:
    """One line of the report; `do` takes bed, capture and baseline and returns what came of it."""

    number: int
    kernel: str
    title: str
    do: Callable[[Bed, Path, Baseline], Any]
    result: dict[str, Any] = field(default_factory=dict)

    def run(self, bed: Bed, baseline: Baseline) -> bool:
        """Whether all was as it must be."""
        capture = FOLDER / f"run-{self.number}.pcap"
        began = time.monotonic()
        try:
            outcome = asdict(self.do(bed, capture, baseline))
        except Exception as error:  # noqa: BLE001 - what goes wrong in one run is its result
            capture.with_suffix(".txt").write_text(traceback.format_exc())
            self.result = {"ok": False, "error": f"{type(error).__name__}: {error}".split("\n")[0][:300]}
        else:
            capture.unlink(missing_ok=True)
            self.result = {"ok": True, **outcome}
        self.result["seconds"] = round(time.monotonic() - began, 1)
        return bool(self.result["ok"])


def disorder_job(number: int, seed: int, setting: Setting) -> Job:
    """A run of the matrix, with a seed of its own."""
    own = seed * 1000 + number
    return Job(
        number, setting.kernel, str(setting), lambda bed, path, base: disorder.run(bed, setting, own, path, base)
    )


def sockets_job(number: int, seed: int, kernel: str, count: int) -> Job:
    """Many sockets at once."""
    return Job(
        number, kernel, f"{kernel} {count} sockets", lambda bed, path, base: sockets.run(bed, count, seed, path, base)
    )


def beds(kernel: str) -> Generator[tuple[Bed, Baseline], None, None]:
    """A guest; and after each time that this is asked again, another one."""
    while True:
        with running(prepare(kernel), name=f"soak-{kernel}", mtu=9000) as bed:
            yield bed, Baseline.of(bed)


def work(jobs: Sequence[Job], tell: Callable[[Job], None]) -> None:
    """All jobs of one kernel."""
    fresh = beds(jobs[0].kernel)
    bed, baseline = next(fresh)
    for job in jobs:
        good = job.run(bed, baseline)
        tell(job)
        if not good and job is not jobs[-1]:
            bed, baseline = next(fresh)
    fresh.close()


def line(job: Job, of: int, again: str) -> str:
    """What is said of a run; `again` repeats it."""
    found = dict(job.result)
    seconds = found.pop("seconds")
    if not found.pop("ok"):
        return f"[{job.number}/{of}] {job.title}: FAILED, {found['error']}; again: {again} --run {job.number}"
    told = ", ".join(
        f"{name} {value:.0%}" if name.endswith("share") else f"{name} {value}" for name, value in found.items()
    )
    return f"[{job.number}/{of}] {job.title}: {told}, {seconds} s"


def main(argv: Sequence[str]) -> int:
    """Command line; 0 when all runs passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kernel", action="append", choices=FACTORS["kernel"], help="only on this one")
    parser.add_argument("--run", action="append", type=int, help="only this number")
    parser.add_argument(
        "--strength", type=int, default=3, choices=(2, 3), help="2: pairwise, 3 (default): every triple"
    )
    parser.add_argument("--sockets", type=int, default=2000, help="how many at once, after the matrix (default 2000)")
    arguments = parser.parse_args(argv)
    seed = int(os.environ.get("SEED") or 1)
    matrix = settings(seed, arguments.strength)
    jobs = [disorder_job(number, seed, setting) for number, setting in enumerate(matrix, 1)]
    for number, kernel in enumerate(FACTORS["kernel"], len(jobs) + 1):
        jobs.append(sockets_job(number, seed, kernel, arguments.sockets))
    of = len(jobs)
    jobs = [job for job in jobs if not arguments.run or job.number in arguments.run]
    jobs = [job for job in jobs if not arguments.kernel or job.kernel in arguments.kernel]
    jobs.sort(key=lambda job: FACTORS["kernel"].index(job.kernel))
    FOLDER.mkdir(parents=True, exist_ok=True)
    again = f"SEED={seed} python -m tests.soak --strength {arguments.strength} --sockets {arguments.sockets}"
    began = time.monotonic()
    print(f"{len(jobs)} of {of} runs, SEED={seed}", flush=True)
    for _, group in groupby(jobs, key=lambda job: job.kernel):
        work(list(group), lambda job: print(line(job, of, again), flush=True))
    failed = [job.number for job in jobs if not job.result["ok"]]
    seconds = round(time.monotonic() - began)
    report = {"seed": seed, "runs": len(jobs), "failed": failed, "seconds": seconds}
    runs = [{"number": job.number, "kernel": job.kernel, "what": job.title, **job.result} for job in jobs]
    (BUILD / "soak.json").write_text(json.dumps({**report, "results": runs}, indent=1) + "\n")
    print(f"{len(jobs) - len(failed)} of {len(jobs)} passed in {seconds} s; see {BUILD.name}/soak.json")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
