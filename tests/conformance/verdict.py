"""From the outcomes of tests to an answer per item. Pure: no pytest, no processes.

An item is held if it has tests and every one of them passed on every kernel it ran on; it fails if one did not pass
(or was cut off before its end); else nothing is known about it. The reason of an item that is not applicable stands in
the list itself; should a test name it nevertheless and fail, it fails.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ITEMS = Path(__file__).with_name("items.toml")
NOT_RUN = "not run"  # the outcome of a test that was selected and not reached
HELD, FAILING, UNTESTED, NOT_APPLICABLE = "held", "failing", "untested", "not applicable"


@dataclass(frozen=True)
class Item:
    """One line of the checklist. `tag` says whose matter it is: device, driver, both, or the kernel's core."""

    number: int
    tag: str
    title: str
    not_applicable: str = ""  # why


@dataclass
class Verdict:
    """What is known about an item; `kernels` has the answers of the tests in guests."""

    item: Item
    status: str = UNTESTED
    tests: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # tests, with the kernel in front
    kernels: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The object in build/conformance.json."""
        found = {"number": self.item.number, "tag": self.item.tag, "title": self.item.title, "status": self.status}
        reason = {"reason": self.item.not_applicable} if self.item.not_applicable else {}
        return {**found, **reason, "tests": self.tests, "failed": self.failed, "kernels": self.kernels}


@functools.cache
def load_items(path: Path = ITEMS) -> Mapping[int, Item]:
    """The checklist by number, in order."""
    lines = sorted((int(number), line) for number, line in tomllib.loads(path.read_text()).items())
    return {number: Item(number, **line) for number, line in lines}


def _status(outcomes: Sequence[str]) -> str:
    if any(outcome in ("failed", NOT_RUN) for outcome in outcomes):
        return FAILING
    return HELD if "passed" in outcomes else UNTESTED


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """A run and the one in which its failed tests were run again; `again` names those that passed in that only."""
    again = [
        name
        for name, test in first["tests"].items()
        if test["outcome"] == "failed" and second["tests"].get(name, test)["outcome"] == "passed"
    ]
    tests = {name: {**test, "outcome": "passed"} if name in again else test for name, test in first["tests"].items()}
    return {**first, "tests": tests, "again": again}


def judge(items: Mapping[int, Item], runs: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """One verdict per item. A run is what the plugin wrote: its kernel ("" without guest), and its tests."""
    verdicts = {number: Verdict(item) for number, item in items.items()}
    outcomes: dict[int, dict[str, list[str]]] = {number: {} for number in items}
    for run in runs:
        for name, test in run["tests"].items():
            for number in test["items"]:
                outcomes[number].setdefault(run["kernel"], []).append(test["outcome"])
                verdict = verdicts[number]
                if name not in verdict.tests:
                    verdict.tests.append(name)
                if _status([test["outcome"]]) == FAILING:
                    verdict.failed.append(f"{run['kernel']} {name}".strip())
    for number, verdict in verdicts.items():
        found = outcomes[number]
        verdict.kernels = {kernel: _status(found[kernel]) for kernel in found if kernel}
        verdict.status = _status([outcome for kernel in found for outcome in found[kernel]])
        if verdict.item.not_applicable and verdict.status != FAILING:
            verdict.status = NOT_APPLICABLE
    return list(verdicts.values())


def summary(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """How many items of each status; `total` is of those that apply."""
    count = {status: sum(v.status == status for v in verdicts) for status in (HELD, FAILING, UNTESTED, NOT_APPLICABLE)}
    return {"held": count[HELD], "total": len(verdicts) - count[NOT_APPLICABLE], **count}


def table(verdicts: Sequence[Verdict]) -> str:
    """A line per item; where kernels disagree, what each says; failed tests below their item."""
    lines = []
    for verdict in verdicts:
        item = verdict.item
        tests = f"{len(verdict.tests):3} tests" if len(verdict.tests) != 1 else "  1 test "
        line = f"{item.number:3} {f'[{item.tag}]':8} {verdict.status:14} {tests}  {item.title}"
        if verdict.status == NOT_APPLICABLE:
            line += f": {item.not_applicable}"
        if len(set(verdict.kernels.values())) > 1:
            line += f" ({', '.join(f'{kernel} {status}' for kernel, status in verdict.kernels.items())})"
        lines += [line, *(f"{'':14}{name}" for name in verdict.failed)]
    count = summary(verdicts)
    rest = ", ".join(f"{count[status]} {status}" for status in (FAILING, UNTESTED, NOT_APPLICABLE))
    return "\n".join([*lines, f"{count[HELD]} of {count['total']} held; {rest}"])
