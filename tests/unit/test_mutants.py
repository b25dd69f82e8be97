"""The check that tests can fail must be able to fail itself. A small project stands for ours."""

from __future__ import annotations

import ast
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mutants.__main__ import PROJECT, run
from tests.mutants.mutation import BadMutation, Mutation, load

SOURCE = '''"""A pump."""

LIMIT = 10


def allowed(level: int) -> bool:
    return level < LIMIT
'''
TESTS = """import pytest

from pump import engine


def test_limit() -> None:
    assert engine.allowed(9)
    assert not engine.allowed(10)


def test_careless() -> None:
    assert engine.allowed(0)


def test_skipped() -> None:
    pytest.skip("never mind")


def test_red() -> None:
    assert not engine.allowed(0)


@pytest.fixture
def pump() -> object:
    assert engine.allowed(9)
    return engine


def test_fixture(pump: object) -> None:
    assert pump
"""
Check = Callable[..., tuple[int, list[dict[str, object]]]]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Judge mutations in a project that uses git; exit status and what was written of each."""
    # Of the installed plugins only what the command line speaks of: a run of pytest takes a third of the time.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "_hypothesis_pytestplugin")
    project = tmp_path / "project"
    for name, text in {"pump/__init__.py": "", "pump/engine.py": SOURCE, "tests/test_pump.py": TESTS}.items():
        path = project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    subprocess.run(["git", "init", "-q", project], check=True)

    def judge(*mutations: Mutation) -> tuple[int, list[dict[str, object]]]:
        result = tmp_path / "mutants.json"
        status = run(project, mutations, result)
        assert (project / "pump/engine.py").read_text() == SOURCE
        return status, json.loads(result.read_text())["mutants"] if result.exists() else []

    return judge


def mutation(replace: str, by: str, test: str = "test_limit", name: str = "one") -> Mutation:
    return Mutation(name, (1,), "pump/engine.py", replace, by, f"tests/test_pump.py::{test}")


def test_caught_and_survived(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    careful = mutation("level < LIMIT", "level <= LIMIT", name="careful")
    careless = mutation("level < LIMIT", "level <= LIMIT", "test_careless", name="careless")
    status, (caught, survived) = check(careful, careless)
    assert status == 1
    assert (caught["status"], caught["message"]) == ("caught", "assert not True")
    assert (survived["status"], survived["message"]) == ("survived", "1 passed")
    printed = capsys.readouterr().out
    assert "1 of 2 caught, items [1]" in printed
    assert [line.split()[:2] for line in printed.splitlines()[2:4]] == [["caught", "careful"], ["survived", "careless"]]


def test_no_verdict_is_not_caught(check: Check) -> None:
    ways = [
        ("level < LIMIT", "level < LIMITS", "test_limit", "NameError"),
        ('"""A pump."""', "import nowhere", "test_limit", "ERROR"),
        ("level < LIMIT", "level < 0", "test_fixture", "error: failed on setup"),
    ]
    broken = [mutation(old, new, test, str(number)) for number, (old, new, test, _) in enumerate(ways)]
    status, found = check(*broken)
    assert status == 1
    assert [only["status"] for only in found] == ["broken"] * len(ways)
    for (*_, message), only in zip(ways, found, strict=True):
        assert message in str(only["message"])


def test_stale_text(check: Check) -> None:
    gone, twice = mutation("level > LIMIT", "True", name="gone"), mutation("LIMIT", "LIMIT + 1", name="twice")
    moved = Mutation("moved", (1,), "pump/motor.py", "a", "b", "tests/test_pump.py::test_limit")
    status, found = check(gone, twice)
    assert status == 1
    assert [(only["status"], only["message"]) for only in found] == [
        ("broken", "stale: what it replaces is 0 times in pump/engine.py"),
        ("broken", "stale: what it replaces is 2 times in pump/engine.py"),
    ]
    with pytest.raises(BadMutation, match="0 times in pump/motor"):
        moved.apply(PROJECT)


@pytest.mark.parametrize(
    ("test", "message"),
    [("test_red", "test_red: assert not True"), ("test_skipped", "test_skipped: skipped"), ("test_missing", "ERROR")],
)
def test_nothing_is_broken_unless_all_is_well_before(
    check: Check, capsys: pytest.CaptureFixture[str], test: str, message: str
) -> None:
    assert check(mutation("level < LIMIT", "level <= LIMIT", test)) == (2, [])
    said = capsys.readouterr().err
    assert "do not pass before anything is broken" in said
    assert message in said


def test_the_copy_is_what_is_imported(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if the project itself were installed."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "project"))
    assert check(mutation("level < LIMIT", "level <= LIMIT"))[0] == 0
    elsewhere = Mutation("elsewhere", (1,), "json/decoder.py", "a", "b", "tests/test_pump.py::test_limit")
    assert check(elsewhere)[0] == 2
    assert "json/decoder.py would be imported from elsewhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "x"', "x: missing or unknown: by, file, items, replace, test"),
        ('name = "x"\nitems = []\nfile = "f"\nreplace = "a"\nby = "b"\ntest = "t"', "names no item"),
        ('name = "x"\nitems = [1]\nfile = "f"\nreplace = "a"\nby = "a"\ntest = "t"', "changes nothing"),
        ('name = "x"\nitems = [1]\nfile = "f"\nreplace = "a"\nby = "b"\ntest = "t"\nwhy = ""', "unknown: why"),
    ],
)
def test_mutations_that_make_no_sense(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "some.toml"
    path.write_text(f"[[mutation]]\n{text}\n")
    with pytest.raises(BadMutation, match=message):
        load([path])


def named_items(test: str) -> set[int]:
    """The numbers in the conformance marks of a test function."""
    file, _, function = test.partition("::")
    for node in ast.parse((PROJECT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == function.partition("[")[0]:
            calls = [mark for mark in node.decorator_list if isinstance(mark, ast.Call)]
            marks = [call for call in calls if ast.unparse(call.func) == "pytest.mark.conformance"]
            return {ast.literal_eval(number) for mark in marks for number in mark.args}
    raise AssertionError(f"there is no test {test}")


@pytest.mark.parametrize("each", load(), ids=lambda each: each.name)
def test_ours_fit_the_sources_and_the_named_test_names_the_items(each: Mutation) -> None:
    """So that a change that makes one stale is noticed by `make check`: write it anew, see docs/testing.md."""
    assert (PROJECT / each.file).read_text().count(each.replace) == 1
    assert set(each.items) <= named_items(each.test)


def test_ours_are_enough() -> None:
    """At least twenty items of the checklist, of device and driver."""
    mutations = load()
    assert len({item for each in mutations for item in each.items}) >= 20
    assert {each.kind for each in mutations} == {"device", "driver"}
