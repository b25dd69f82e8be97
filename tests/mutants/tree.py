"""Copies of the project that may be broken.

Theory of operation: a snapshot holds the files that git does not ignore, as they are when a run begins, and nothing
happens in it; the copies are made from it, so that all of a run is about the same sources. Tests run in a copy with the
project's own Python environment, in which the project is installed as "editable": PYTHONPATH puts the copy before that,
and `check_imports` makes sure of it. No byte code is written, as a file changed twice in a second could be taken for
the unchanged one.

For guest tests a snapshot shares what is under build/ by symbolic links. Build stages replace their products by
renaming, so a link is at worst replaced. Only the folder in which the driver is built is a copy: Kbuild works in place.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.mutants.mutation import BadMutation

_OWN = ("log", "driver-check")  # made anew where they are needed; so are locks and what is unfinished
_ORIGINS = (
    "import importlib.util, json, sys; print(json.dumps([importlib.util.find_spec(n).origin for n in sys.argv[1:]]))"
)


def snapshot(project: Path, target: Path, *, guest: bool) -> Path:
    """The files of `project` in the new folder `target`, which it returns; `guest`: with build/ as well."""
    target.mkdir()
    _copy_sources(project, target)
    if guest:
        _share_build(project, target)
    return target


@contextlib.contextmanager
def copied(pristine: Path, target: Path, *, guest: bool) -> Iterator[Path]:
    """A copy of a snapshot in the new folder `target`, for as long as it is needed."""
    shutil.copytree(pristine, target, symlinks=True, ignore=None if guest else shutil.ignore_patterns("build"))
    try:
        yield target
    finally:
        shutil.rmtree(target)


def _copy_sources(project: Path, target: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=project,
        capture_output=True,
        check=True,
    ).stdout
    for name in listed.decode().split("\0"):
        source = project / name
        if name and source.is_file():
            copy = target / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)


def _share_build(project: Path, target: Path) -> None:
    (target / "build").mkdir()
    for entry in (project / "build").iterdir():
        here = target / "build" / entry.name
        if not entry.name.startswith("kernel-"):
            _share(entry, here)
            continue
        here.mkdir()
        for part in entry.iterdir():
            if part.name == "driver":
                shutil.copytree(part, here / part.name)
            else:
                _share(part, here / part.name)


def _share(entry: Path, here: Path) -> None:
    unfinished = entry.name.startswith((".tmp-", ".lock", ".bootstrap-lock"))
    if entry.name not in _OWN and not unfinished:
        here.symlink_to(entry)


def environment(tree: Path) -> dict[str, str]:
    """The environment in which the copy's own code is what is imported."""
    ours = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_ADDOPTS": ""}
    return {**os.environ, **ours}


def check_imports(tree: Path, files: Iterable[str]) -> None:
    """Raises BadMutation unless the Python files among `files` are imported from `tree`."""
    paths = sorted({name for name in files if name.endswith(".py")})
    modules = [name.removesuffix(".py").replace("/", ".") for name in paths]
    done = subprocess.run(
        [sys.executable, "-c", _ORIGINS, *modules],
        cwd=tree,
        env=environment(tree),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BadMutation(f"the copy cannot be imported: {done.stderr.strip().splitlines()[-1]}")
    for name, origin in zip(paths, json.loads(done.stdout), strict=True):
        if Path(origin) != tree / name:
            raise BadMutation(f"{name} would be imported from elsewhere: {origin}")
