"""`python -m tests.mutants [--kind device|driver] [--list] [NAME ...]`: break the project, and see the tests notice.

Every named test must pass in an unbroken copy; then every mutation must make its test fail. NAME may hold wildcards.
Ends with 0 if all were caught, with 1 if not, with 2 if the unbroken project does not pass.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

from testbed.vm.runtime import RuntimeFolder
from tests.mutants import tree
from tests.mutants.judge import CAUGHT, SURVIVED, Verdict, judge, run_tests
from tests.mutants.mutation import BadMutation, Mutation, load

PROJECT = Path(__file__).resolve().parents[2]
RESULT = PROJECT / "build" / "mutants.json"
# One guest at a time; tests without one use a core each.
WORKERS = {"device": 2, "driver": 1}


def choose(mutations: Sequence[Mutation], kind: str | None, names: Sequence[str]) -> list[Mutation]:
    """The mutations of a kind (None: both) that one of the patterns matches (none: all)."""
    return [
        mutation
        for mutation in mutations
        if kind in (None, mutation.kind) and (not names or any(fnmatchcase(mutation.name, name) for name in names))
    ]


def needs_guest(mutations: Sequence[Mutation]) -> bool:
    """Whether a test of one of them boots a guest."""
    return any(mutation.kind == "driver" for mutation in mutations)


def check_unbroken(pristine: Path, mutations: Sequence[Mutation], folder: Path) -> None:
    """Raises BadMutation unless all named tests pass in a copy of the snapshot, and test that copy."""
    with tree.copied(pristine, folder, guest=needs_guest(mutations)) as copy:
        tree.check_imports(copy, (mutation.file for mutation in mutations))
        status, message, test = run_tests(copy, sorted({mutation.test for mutation in mutations}))
    if status != SURVIVED:
        raise BadMutation(f"the named tests do not pass before anything is broken: {test or 'pytest'}: {message}")


def verdicts(pristine: Path, mutations: Sequence[Mutation], folder: Path) -> Iterator[Verdict]:
    """Judge all of them, in order; copies are made in `folder`."""
    for kind, workers in WORKERS.items():
        chosen = choose(mutations, kind, ())
        with ThreadPoolExecutor(workers) as pool:
            try:
                yield from pool.map(lambda mutation: judge(pristine, mutation, folder / mutation.name), chosen)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def line(verdict: Verdict) -> str:
    """A verdict's line in the table."""
    mutation = verdict.mutation
    items = ",".join(map(str, mutation.items))
    test = mutation.test.rpartition("/")[2]
    return f"{verdict.status:8} {mutation.name:36} {items:12} {verdict.seconds:5.1f} s  {test}: {verdict.message[:100]}"


def report(found: Sequence[Verdict]) -> dict[str, object]:
    """What build/mutants.json holds; `items` are those of which a mutation was caught."""
    caught = [verdict for verdict in found if verdict.status == CAUGHT]
    items = sorted({item for verdict in caught for item in verdict.mutation.items})
    return {"caught": len(caught), "total": len(found), "items": items, "mutants": [v.as_json() for v in found]}


def run(project: Path, mutations: Sequence[Mutation], result: Path) -> int:
    """Everything; prints the table, writes `result`, returns the exit status."""
    folder = RuntimeFolder()
    found: list[Verdict] = []
    try:
        pristine = tree.snapshot(project, folder.path / "pristine", guest=needs_guest(mutations))
        print(f"== the tests that {len(mutations)} mutations name, in an unbroken copy", flush=True)
        check_unbroken(pristine, mutations, folder.path / "unbroken")
        print("== broken copies", flush=True)
        for verdict in verdicts(pristine, mutations, folder.path):
            found.append(verdict)
            print(line(verdict), flush=True)
    except BadMutation as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        folder.remove()
    told = report(found)
    result.parent.mkdir(exist_ok=True)
    result.write_text(json.dumps(told, indent=1) + "\n")
    print(f"== {told['caught']} of {told['total']} caught, items {told['items']}; details in {result.name}")
    return 0 if told["caught"] == told["total"] else 1


def main() -> int:
    """Command line; errors are one line."""
    parser = argparse.ArgumentParser(prog="tests.mutants", description="Break the project, and see the tests notice.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutations, default all; * is a wildcard")
    parser.add_argument("--kind", choices=list(WORKERS), help="what is broken; driver needs guests")
    parser.add_argument("--list", action="store_true", help="print their names, items and tests, and break nothing")
    arguments = parser.parse_args()
    try:
        chosen = choose(load(), arguments.kind, arguments.names)
        if not chosen:
            raise BadMutation("no mutation is called so")
        if arguments.list:
            print("\n".join(f"{m.name:36} {','.join(map(str, m.items)):12} {m.test}" for m in chosen))
            return 0
        if needs_guest(chosen):
            subprocess.run([PROJECT / "testbed" / "bootstrap"], check=True)
        return run(PROJECT, chosen, RESULT)
    except (BadMutation, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
