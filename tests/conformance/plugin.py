"""A pytest plugin: `--conformance=FILE` runs only tests that name an item, and writes to FILE what became of each.

Every named test that was selected is in the file, with the outcome "not run" if the run ended before it.
A test that boots a kernel of its own choice (a parameter that is a kernel's name, or the mark `kernel(name)`) is left
to the run of that kernel.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from testbed.assets.image import KERNELS
from tests.conformance.verdict import NOT_RUN, load_items

# Of several phases (setup, call, teardown) the worst counts.
RANK = {NOT_RUN: 0, "passed": 1, "skipped": 2, "failed": 3}


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that turns all this on."""
    parser.addoption("--conformance", type=Path, metavar="FILE", help="run tests that name an item; outcomes to FILE")


def pytest_configure(config: pytest.Config) -> None:
    """Without the option the plugin does nothing."""
    if path := config.getoption("--conformance"):
        config.pluginmanager.register(Recorder(path, os.environ.get("KERNEL", "")))


def numbers(test: pytest.Item) -> list[int]:
    """The items a test names."""
    return sorted({number for mark in test.iter_markers("conformance") for number in mark.args})


def own_kernel(test: pytest.Item) -> str:
    """The kernel a test boots by its own choice; empty if KERNEL chooses."""
    if mark := test.get_closest_marker("kernel"):
        return str(mark.args[0])
    parameters = (
        test.callspec.params.values() if isinstance(test, pytest.Function) and hasattr(test, "callspec") else ()
    )
    return next((value for value in parameters if isinstance(value, str) and value in KERNELS), "")


class Recorder:
    """Chooses the tests and keeps their outcomes."""

    def __init__(self, path: Path, kernel: str) -> None:
        self.path = path
        self.kernel = kernel
        self.tests: dict[str, dict[str, object]] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Only tests that name an item, and of those the ones for this kernel."""
        keep = [test for test in items if numbers(test) and own_kernel(test) in ("", self.kernel)]
        known = load_items()
        for test in keep:
            if unknown := [number for number in numbers(test) if number not in known]:
                raise pytest.UsageError(f"{test.nodeid}: no item {unknown} in the checklist")
        config.hook.pytest_deselected(items=[test for test in items if test not in keep])
        items[:] = keep
        self.tests = {test.nodeid: {"items": numbers(test), "outcome": NOT_RUN} for test in keep}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The worst of its phases is a test's outcome; setup alone proves nothing."""
        test = self.tests[report.nodeid]
        if report.when != "setup" or not report.passed:
            test["outcome"] = max(str(test["outcome"]), report.outcome, key=RANK.__getitem__)

    def pytest_sessionfinish(self) -> None:
        """Write it all down."""
        self.path.write_text(json.dumps({"kernel": self.kernel, "tests": self.tests}, indent=1))
