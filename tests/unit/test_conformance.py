"""What `make conformance` makes of tests: nothing that failed, was skipped or did not run may count as held."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.conformance.verdict import (
    FAILING,
    HELD,
    NOT_APPLICABLE,
    UNTESTED,
    Item,
    judge,
    load_items,
    merged,
    summary,
    table,
)

pytest_plugins = ["pytester"]

INI = "[pytest]\nmarkers =\n    conformance\n    kernel\n"
TESTS = """
import pytest

@pytest.mark.conformance(1)
@pytest.mark.conformance(2, 3)
def test_good(): pass

@pytest.mark.conformance(2)
@pytest.mark.parametrize("n", [0, 1])
def test_bad_once(n): assert n

@pytest.fixture
def broken(): raise OSError

@pytest.mark.conformance(4)
def test_never_set_up(broken): pass

@pytest.fixture
def untidy():
    yield
    raise OSError

@pytest.mark.conformance(5)
def test_leaves_a_mess(untidy): pass

@pytest.mark.conformance(6)
def test_skipped(): pytest.skip("why")

def test_says_nothing(): pass

@pytest.mark.parametrize("n", [0, pytest.param(1, marks=pytest.mark.conformance(7))])
def test_one_case(n): pass
"""
KERNELS = """
import pytest

@pytest.mark.conformance(1)
def test_any(): pass

@pytest.mark.conformance(1)
@pytest.mark.kernel("7.2")
def test_newest(): pass

@pytest.fixture(params=["6.1", "6.12", "7.2"])
def kernel(request): return request.param

@pytest.mark.conformance(1)
@pytest.mark.parametrize("size", [[], "6"])
def test_each(kernel, size): pass
"""
Runner = Callable[..., dict[str, Any]]


@pytest.fixture
def outcomes(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Runs a file of tests as one process of `make conformance` does; what the plugin wrote."""

    def run(tests: str, *arguments: str, kernel: str = "") -> dict[str, Any]:
        monkeypatch.setenv("KERNEL", kernel)
        pytester.makeini(INI)
        pytester.makepyfile(test_it=tests)
        pytester.runpytest("-p", "tests.conformance.plugin", "--conformance=found.json", *arguments)
        found: dict[str, Any] = json.loads((pytester.path / "found.json").read_text())
        return found

    return run


def checklist(count: int, **not_applicable: str) -> dict[int, Item]:
    """Items 1 to `count`; `item_3="why"` for those that do not apply."""
    return {n: Item(n, "device", f"item {n}", not_applicable.get(f"item_{n}", "")) for n in range(1, count + 1)}


def ran(kernel: str, **tests: tuple[list[int], str]) -> dict[str, Any]:
    """A run as the plugin writes it."""
    return {"kernel": kernel, "tests": {name: {"items": n, "outcome": outcome} for name, (n, outcome) in tests.items()}}


def test_every_way_not_to_pass(outcomes: Runner) -> None:
    verdicts = judge(checklist(8), [outcomes(TESTS)])
    assert {v.item.number: v.status for v in verdicts} == {
        1: HELD,
        2: FAILING,
        3: HELD,
        4: FAILING,
        5: FAILING,
        6: UNTESTED,
        7: HELD,
        8: UNTESTED,
    }
    assert verdicts[1].failed == ["test_it.py::test_bad_once[0]"]
    assert verdicts[1].tests == [
        "test_it.py::test_good",
        "test_it.py::test_bad_once[0]",
        "test_it.py::test_bad_once[1]",
    ]
    assert verdicts[6].tests == ["test_it.py::test_one_case[1]"]


def test_tests_behind_the_end_of_a_run_fail(outcomes: Runner) -> None:
    found = outcomes(TESTS, "-x")
    assert found["tests"]["test_it.py::test_never_set_up"]["outcome"] == "not run"
    assert [v.status for v in judge(checklist(7), [found])] == [HELD, FAILING, HELD, *[FAILING] * 4]


def test_unmarked_tests_do_not_run(outcomes: Runner) -> None:
    assert not [name for name in outcomes(TESTS)["tests"] if "nothing" in name or name.endswith("one_case[0]")]


@pytest.mark.parametrize(
    ("kernel", "names"),
    [
        ("7.2", ["test_any", "test_newest", "test_each[7.2-6]", "test_each[7.2-size0]"]),
        ("6.1", ["test_any", "test_each[6.1-6]", "test_each[6.1-size0]"]),
    ],
)
def test_a_test_with_a_kernel_of_its_own_runs_there_alone(outcomes: Runner, kernel: str, names: list[str]) -> None:
    found = outcomes(KERNELS, kernel=kernel)
    assert found["kernel"] == kernel
    assert sorted(found["tests"]) == sorted(f"test_it.py::{name}" for name in names)


def test_a_number_that_is_no_item_is_a_mistake(pytester: pytest.Pytester) -> None:
    pytester.makeini(INI)
    pytester.makepyfile("import pytest\n@pytest.mark.conformance(133)\ndef test_it(): pass")
    result = pytester.runpytest("-p", "tests.conformance.plugin", "--conformance=found.json")
    result.stderr.fnmatch_lines(["*test_it: no item [[]133] in the checklist"])
    assert result.ret == pytest.ExitCode.USAGE_ERROR


def test_without_the_option_nothing_changes(pytester: pytest.Pytester) -> None:
    pytester.makeini(INI)
    pytester.makepyfile("def test_it(): pass")
    pytester.runpytest("-p", "tests.conformance.plugin").assert_outcomes(passed=1)


def test_one_kernel_is_enough_to_fail() -> None:
    runs = [
        ran("", unit=([1, 2], "passed")),
        ran("6.1", guest=([2, 3], "passed")),
        ran("7.2", guest=([2, 3], "failed"), other=([3], "passed")),
    ]
    one, two, three = judge(checklist(3), runs)
    assert (one.status, one.kernels) == (HELD, {})
    assert (two.status, two.kernels) == (FAILING, {"6.1": HELD, "7.2": FAILING})
    assert three.as_json() == {
        "number": 3,
        "tag": "device",
        "title": "item 3",
        "status": FAILING,
        "tests": ["guest", "other"],
        "failed": ["7.2 guest"],
        "kernels": {"6.1": HELD, "7.2": FAILING},
    }


def test_what_does_not_apply_counts_neither_way_unless_it_fails() -> None:
    runs = [ran("", good=([1, 2], "passed"), bad=([3], "failed"))]
    verdicts = judge(checklist(4, item_2="optional", item_3="optional", item_4="optional"), runs)
    assert [v.status for v in verdicts] == [HELD, NOT_APPLICABLE, FAILING, NOT_APPLICABLE]
    count = summary(verdicts)
    assert (count["held"], count["total"]) == (1, 2)
    assert verdicts[1].as_json()["reason"] == "optional"


def test_the_table_names_what_failed_where() -> None:
    runs = [ran("6.1", guest=([1], "passed")), ran("7.2", guest=([1], "failed"))]
    lines = table(judge(checklist(3, item_3="nobody asked"), runs)).splitlines()
    assert lines[0].split() == [
        "1",
        "[device]",
        "failing",
        "1",
        "test",
        "item",
        "1",
        "(6.1",
        "held,",
        "7.2",
        "failing)",
    ]
    assert lines[1].split() == ["7.2", "guest"]
    assert lines[2].split() == ["2", "[device]", "untested", "0", "tests", "item", "2"]
    assert lines[3].endswith("item 3: nobody asked")
    assert lines[4] == "0 of 2 held; 1 failing, 1 untested, 1 not applicable"


def test_the_checklist_is_whole() -> None:
    items = load_items()
    assert list(items) == list(range(1, 133))
    assert {item.tag for item in items.values()} == {"device", "driver", "both", "core"}
    assert [item.number for item in items.values() if item.not_applicable] == [95, 121]


def test_what_passes_when_run_again_is_held_and_named() -> None:
    def found(**outcomes: str) -> dict[str, Any]:
        return {"kernel": "7.2", "tests": {name: {"items": [1], "outcome": how} for name, how in outcomes.items()}}

    first = found(good="passed", unsteady="failed", bad="failed", lost="not run", left="failed")
    result = merged(first, found(unsteady="passed", bad="failed", lost="passed", good="failed"))
    assert result["again"] == ["unsteady"]
    outcomes = {name: test["outcome"] for name, test in result["tests"].items()}
    assert outcomes == {"good": "passed", "unsteady": "passed", "bad": "failed", "lost": "not run", "left": "failed"}
    (verdict,) = judge({1: Item(1, "core", "x")}, [result])
    assert verdict.failed == ["7.2 bad", "7.2 lost", "7.2 left"]
