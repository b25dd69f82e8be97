"""A mutation: a piece of a source file, what it is replaced by, and the test that must fail then.

Theory of operation: the text is matched literally and must occur exactly once, so that a mutation cannot quietly stop
changing what it was written for; when the code moves on, the mutation is stale and has to be written anew. The items
are those of the conformance checklist that are broken, and that the test names.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

HERE = Path(__file__).parent
FILES = (HERE / "device.toml", HERE / "driver.toml")


class BadMutation(Exception):
    """A mutation that makes no sense, or does not fit the sources any more."""


@dataclass(frozen=True)
class Mutation:
    """One table `[[mutation]]`."""

    name: str
    items: tuple[int, ...]  # of the conformance checklist
    file: str  # relative to the project
    replace: str
    by: str
    test: str  # node id; one with parameters but without brackets means all of them

    @property
    def kind(self) -> str:
        """What is broken: "driver" needs a guest, "device" does not."""
        return "driver" if self.file.startswith("driver/") else "device"

    def apply(self, project: Path) -> None:
        """Break `project`, which must be a copy. Raises BadMutation if the text is not there, or not once."""
        path = project / self.file
        text = path.read_text() if path.is_file() else ""
        count = text.count(self.replace)
        if count != 1:
            raise BadMutation(f"stale: what it replaces is {count} times in {self.file}")
        path.write_text(text.replace(self.replace, self.by))


def load(paths: Iterable[Path] = FILES) -> list[Mutation]:
    """All mutations, in the files' order. Raises BadMutation."""
    found: dict[str, Mutation] = {}
    for path in paths:
        for table in tomllib.loads(path.read_text())["mutation"]:
            mutation = _read(table, path)
            if mutation.name in found:
                raise BadMutation(f"{path.name}: two mutations are called {mutation.name}")
            found[mutation.name] = mutation
    return list(found.values())


def _read(table: dict[str, object], path: Path) -> Mutation:
    name = str(table.get("name", "one without a name"))
    if wrong := {field.name for field in fields(Mutation)} ^ set(table):
        raise BadMutation(f"{path.name}: {name}: missing or unknown: {', '.join(sorted(wrong))}")
    items = table["items"]
    if not isinstance(items, list) or not items or table["replace"] == table["by"]:
        raise BadMutation(f"{path.name}: {name}: names no item, or changes nothing")
    return Mutation(**{**table, "items": tuple(items)})  # type: ignore[arg-type]
