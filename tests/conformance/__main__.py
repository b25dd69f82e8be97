"""`python -m tests.conformance [pytest arguments]`: run what proves the checklist, print and write the answers.

Emulated guests on a busy machine: a test that fails in a guest is run once more, by itself, said so, and written down.

KERNELS="6.12 7.2" names the kernels of the tests in guests (all by default). Ends with 0 if every item that applies is
held, with 1 if one is not, with 2 if a run of pytest broke off.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from testbed.assets.image import KERNELS
from tests.conformance.verdict import judge, load_items, merged, summary, table

PROJECT = Path(__file__).resolve().parents[2]
RESULT = PROJECT / "build" / "conformance.json"
WITHOUT_GUEST = ("tests/unit", "tests/abi", "tests/device")
IN_GUEST = ("tests/guest",)
# passed; some failed; none selected (a narrow choice of arguments)
COMPLETE = (0, 1, 5)


def run(kernel: str, folders: Sequence[str], arguments: Sequence[str], scratch: Path) -> dict[str, Any]:
    """One run of pytest, seen by the user. Raises SystemExit if it did not come to its end."""
    found = scratch / f"{kernel or 'host'}.json"
    options = ["-p", "tests.conformance.plugin", f"--conformance={found}", "-v", "-rN", "--no-header"]
    # it ends when we end
    guard = ["setpriv", "--pdeathsig", "TERM", "--"]
    environment = {**os.environ, "KERNEL": kernel}
    if not kernel:
        del environment["KERNEL"]
    done = subprocess.run(
        [*guard, sys.executable, "-m", "pytest", *options, *folders, *arguments],
        cwd=PROJECT,
        env=environment,
        check=False,
    )
    if done.returncode not in COMPLETE or not found.exists():
        print(
            f"error: the tests of {kernel or 'what needs no guest'} broke off (status {done.returncode})",
            file=sys.stderr,
        )
        raise SystemExit(2)
    result: dict[str, Any] = json.loads(found.read_text())
    return result


def run_in_guest(kernel: str, arguments: Sequence[str], scratch: Path) -> dict[str, Any]:
    """The same for the tests in guests, the failed ones twice; `again` has those that passed then."""
    result = run(kernel, IN_GUEST, arguments, scratch)
    if any(test["outcome"] == "failed" for test in result["tests"].values()):
        print(f"== again, the failed ones only, kernel {kernel}", flush=True)
        only = ["--last-failed", "--last-failed-no-failures", "none"]
        second = run(kernel, IN_GUEST, [*arguments, *only], scratch)
        result = merged(result, second)
    return result


def main() -> int:
    """All runs, one after the other."""
    kernels = os.environ.get("KERNELS", "").split() or list(KERNELS)
    if unknown := set(kernels) - set(KERNELS):
        print(
            f"error: KERNELS={' '.join(sorted(unknown))} is not offered; choose of {' '.join(KERNELS)}", file=sys.stderr
        )
        return 2
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="tlsnic-") as scratch:
        print("== conformance: without a guest", flush=True)
        runs = [run("", WITHOUT_GUEST, sys.argv[1:], Path(scratch))]
        for kernel in kernels:
            print(f"== conformance: in a guest, kernel {kernel}", flush=True)
            runs.append(run_in_guest(kernel, sys.argv[1:], Path(scratch)))
    verdicts = judge(load_items(), runs)
    count = summary(verdicts)
    print(f"== conformance, kernels {' '.join(kernels)}\n{table(verdicts)}")
    again = [f"{found['kernel']} {name}" for found in runs for name in found.get("again", ())]
    if again:
        print("\n".join(["passed only when run again:", *again]))
    written = {"held": count["held"], "total": count["total"], "kernels": kernels, "again": again}
    RESULT.write_text(json.dumps({**written, "items": [verdict.as_json() for verdict in verdicts]}, indent=1) + "\n")
    print(f"written: {RESULT.relative_to(PROJECT)}")
    return 0 if count["held"] == count["total"] else 1


if __name__ == "__main__":
    sys.exit(main())
