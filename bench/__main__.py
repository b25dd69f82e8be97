"""Measure, print a table, write build/bench.json: python -m bench [--only GROUP,...] [--full | --smoke] [--show]"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from bench.registry import Group, Session, groups
from bench.results import Results, entry, qualified, surroundings
from bench.table import table
from testbed.errors import BedError
from testbed.stages import BUILD


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench", description="Figures with targets and anchors; docs/performance.md")
    parser.add_argument("--only", help="these groups, separated by commas")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--full", action="store_true", help="all groups, at least seven rounds")
    length.add_argument("--smoke", action="store_true", help="tiny sizes, nothing written unless --output says so")
    parser.add_argument("--list", action="store_true", help="say which groups there are")
    parser.add_argument("--show", action="store_true", help="measure nothing, print what the file has")
    parser.add_argument("--output", type=Path, help="instead of build/bench.json")
    return parser.parse_args(argv)


def chosen(arguments: argparse.Namespace) -> list[Group]:
    """The groups to run. Raises BedError for a name that is none."""
    everything = groups()
    if not arguments.only:
        return [group for group in everything if arguments.full or not group.only_full]
    by_name = {group.name: group for group in everything}
    wanted = arguments.only.split(",")
    if unknown := [name for name in wanted if name not in by_name]:
        raise BedError(f"no group {', '.join(unknown)}; there are {', '.join(by_name)}")
    return [by_name[name] for name in wanted]


def measure(session: Session, selected: Sequence[Group], results: Results) -> tuple[list[str], list[str]]:
    """Run the groups, put what they measure into the file; names of the figures, and of the groups that failed."""
    names: list[str] = []
    failed: list[str] = []
    more = [option for option, given in (("--full", session.full), ("--smoke", session.smoke)) if given]
    for number, group in enumerate(selected, 1):
        began = time.monotonic()
        session.say(f"[{number}/{len(selected)}] {group.name}: {group.about}")
        try:
            for measured in group.measure(session):
                assets = session.assets if group.kind == "guest" else None
                name = qualified(measured.name, assets)
                where = surroundings(["--only", group.name, *more], assets)
                results.add(name, entry(measured, group.kind, where, name))
                names.append(name)
        except (BedError, AssertionError, OSError) as error:  # an hour's other figures are not its fault
            print(f"error: {group.name}: {error}", file=sys.stderr, flush=True)
            failed.append(group.name)
            with suppress(BedError, OSError):  # what broke may not end in order
                session.close()
        session.say(f"  {time.monotonic() - began:.0f} s")
    return names, failed


def run(session: Session, arguments: argparse.Namespace) -> None:
    """Do what the command line says. Raises BedError if a group failed, when the others are done."""
    selected = chosen(arguments)
    if arguments.list:
        for group in selected:
            session.say(f"{group.name:<18} {group.kind:<11} {group.about}")
        return
    results = Results(arguments.output or (None if session.smoke else BUILD / "bench.json"))
    names, failed = (list(results.figures), []) if arguments.show else measure(session, selected, results)
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print(table({name: results.figures[name] for name in names}, session.smoke))
    if failed:
        raise BedError(f"not measured to the end: {', '.join(failed)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Fails if something could not be measured or offload was not proven; a missed target is only said."""
    arguments = arguments_of(argv)
    session = Session(arguments.smoke, arguments.full)
    try:
        run(session, arguments)
    except (BedError, AssertionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    finally:
        session.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
