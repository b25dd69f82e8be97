"""A part of a measurement in a process of its own, for what one process cannot do, or must not leave behind.

    python -m bench.child MODULE:FUNCTION ARGUMENTS          (a JSON object; see Child, which starts it)

The function is called with the arguments by name, and `talk`. What it tells goes to the parent as lines of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from types import TracebackType
from typing import Any, Self

from bench.rig import DIES_WITH_US
from nicdev.errors import ConfigError
from testbed.errors import BedError
from testbed.stages import PROJECT


class Talk:
    """The child's end."""

    def tell(self, value: Any) -> None:
        """Send the parent something."""
        print(json.dumps(value), flush=True)

    def wait(self) -> None:
        """Until the parent says go on. Raises BedError if it is gone."""
        if not sys.stdin.readline():
            raise BedError("the benchmark has ended")


class Child:
    """The parent's end: runs `function` ("module:name")."""

    def __init__(self, function: str, **arguments: Any) -> None:
        self._process = subprocess.Popen(
            [*DIES_WITH_US, sys.executable, "-m", "bench.child", function, json.dumps(arguments)],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def hear(self) -> Any:
        """What the child tells next. Raises BedError with its last words if it failed."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        words = self._process.communicate()[1].decode().strip().splitlines()
        raise BedError(words[-1].removeprefix("error: ") if words else "a part of the benchmark ended without a word")

    def go_on(self) -> None:
        """What the child waits for."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()


def main(argv: list[str]) -> int:
    """Call the function."""
    module, _, name = argv[0].partition(":")
    try:
        getattr(import_module(module), name)(Talk(), **json.loads(argv[1]))
    except (BedError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
