"""Run the test that a mutation names, and say what became of it.

Theory of operation: only a test that failed while it ran, because something was not as it expects, has caught a
mutation. One that passed has not: the mutation survived. One that could not begin (a collection or fixture error), or
that met code that is no program any more (a name or an import that does not exist), or that ran out of time, tells
nothing: the mutation is broken. Both have to be repaired, the test or the mutation.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from tests.mutants import tree
from tests.mutants.mutation import BadMutation, Mutation

CAUGHT, SURVIVED, BROKEN = "caught", "survived", "broken"
# No verdict of a test: the program fell apart, or the machine was too slow.
_NO_VERDICT = re.compile(
    r"(\w+\.)*(ImportError|ModuleNotFoundError|NameError|UnboundLocalError|SyntaxError|IndentationError|TypeError"
    r"|AttributeError)\b|Failed: Timeout"
)


class Outcome(NamedTuple):
    """What one run of pytest came to."""

    status: str
    message: str  # its first line
    test: str = ""  # whose message it is


@dataclass(frozen=True)
class Verdict:
    """What became of a mutation."""

    mutation: Mutation
    status: str
    message: str
    seconds: float

    def as_json(self) -> dict[str, object]:
        """The object in build/mutants.json."""
        told = {key: value for key, value in asdict(self.mutation).items() if key not in ("replace", "by")}
        return {**told, "kind": self.mutation.kind, "status": self.status, "message": self.message} | {
            "seconds": round(self.seconds, 1)
        }


def run_tests(copy: Path, tests: Sequence[str], *options: str) -> Outcome:
    """Run these tests in a copy. SURVIVED if all of them passed, else the first that did not decides."""
    report = copy / "outcome.xml"
    # It ends with us, and so do the guests that it boots; the seed makes Hypothesis repeatable.
    command = ["setpriv", "--pdeathsig", "TERM", "--", sys.executable, "-m", "pytest", "-q"]
    options = ("-p", "no:cacheprovider", "--hypothesis-seed=0", f"--junit-xml={report}", *options)
    done = subprocess.run(
        [*command, *options, *tests],
        cwd=copy,
        env=tree.environment(copy),
        capture_output=True,
        text=True,
        check=False,
    )
    output = (done.stdout + done.stderr).strip().splitlines()
    complaint = next(
        (line for line in output if line.startswith("ERROR")), output[-1] if output else "pytest is silent"
    )
    if done.returncode not in (0, 1) or not report.exists():
        return Outcome(BROKEN, complaint)
    return _outcome(report)


def _outcome(report: Path) -> Outcome:
    cases = list(ET.parse(report).iter("testcase"))
    for case in cases:
        failure = case.find("failure")
        if failure is not None:
            message = _first_line(failure)
            return Outcome(BROKEN if _NO_VERDICT.match(message) else CAUGHT, message, case.get("name", ""))
    for case in cases:
        for part in ("error", "skipped"):
            if (found := case.find(part)) is not None:
                return Outcome(BROKEN, f"{part}: {_first_line(found)}", case.get("name", ""))
    return Outcome(SURVIVED, f"{len(cases)} passed") if cases else Outcome(BROKEN, "no test ran")


def _first_line(element: ET.Element) -> str:
    return (element.get("message") or "").strip().split("\n")[0]


def judge(pristine: Path, mutation: Mutation, folder: Path) -> Verdict:
    """Break a copy of the snapshot, made in the new folder `folder`, and run the named test in it."""
    began = time.monotonic()
    with tree.copied(pristine, folder, guest=mutation.kind == "driver") as copy:
        try:
            mutation.apply(copy)
            status, message, _ = run_tests(copy, [mutation.test], "-x")
        except BadMutation as error:
            status, message = BROKEN, str(error)
    return Verdict(mutation, status, message, time.monotonic() - began)
