"""Build our driver for a guest kernel, inside that kernel's own build root.

The sources are copied beside the root first, so that builds for several kernels do not meet in one folder and the
source tree stays clean. Kbuild then recompiles what has changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from testbed.errors import SetupError
from testbed.image import LOGS, Kernel
from testbed.stages import PROJECT, digest, in_root, remove, tail

SOURCE = PROJECT / "driver"
MODULE = "tlsnic.ko"


def _sync(source: Path, target: Path) -> None:
    """Make `target` hold the files of `source`, leaving unchanged ones and Kbuild's products alone."""
    target.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in source.iterdir() if path.is_file()}
    for stale in target.iterdir():
        if stale.suffix in (".c", ".h") and not stale.name.endswith(".mod.c") and stale.name not in names:
            remove(stale)
    for name in names:
        content = (source / name).read_bytes()
        copy = target / name
        if not copy.exists() or copy.read_bytes() != content:
            copy.write_bytes(content)


def _make(kernel: Kernel, source: Path, folder: Path, arguments: Sequence[str], log: Path) -> None:
    if not (source / "Kbuild").exists() and not (source / "Makefile").exists():
        raise SetupError(f"{source} holds no driver to build")
    _sync(source, folder)
    log.unlink(missing_ok=True)
    build = f"/usr/lib/modules/{kernel.release}/build"
    in_root(kernel.root, ["make", "-C", build, "M=/mnt", *arguments, "modules"], log, [(folder, "/mnt")])


def build(kernel: Kernel, source: Path = SOURCE) -> tuple[Path, bool]:
    """The module for `kernel`, and whether it had to be built. Raises SetupError with the compiler's last words."""
    folder = kernel.folder / "driver"
    module, stamp = folder / MODULE, folder / ".built"
    key = digest(source, kernel.release)
    if module.exists() and stamp.exists() and stamp.read_text() == key:
        return module, False
    stamp.unlink(missing_ok=True)
    _make(kernel, source, folder, [], LOGS / f"driver-{kernel.name}.log")
    stamp.write_text(key)
    return module, True


def check(kernel: Kernel, source: Path = SOURCE) -> str:
    """Everything compiled anew with W=1 and under sparse; returns the complaints, empty when there are none."""
    folder = kernel.folder / "driver-check"
    shutil.rmtree(folder, ignore_errors=True)
    log = LOGS / f"driver-check-{kernel.name}.log"
    # C=1 would be turned off: Debian's headers lack the script that looks for sparse.
    _make(kernel, source, folder, ["W=1", "KBUILD_CHECKSRC=1"], log)
    complaints = [line for line in log.read_text().splitlines() if "warning:" in line or "error:" in line]
    return "\n".join(complaints)


def last_words(kernel: Kernel) -> str:
    """The end of the last build's log."""
    return tail(LOGS / f"driver-{kernel.name}.log")
