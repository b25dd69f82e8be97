"""Build our driver for a guest kernel, inside that kernel's own build root.

The sources are copied beside the root first, so that builds for several kernels do not meet in one folder and the
source tree stays clean. Kbuild then recompiles what has changed.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from testbed.assets import debian
from testbed.assets.image import GUEST_SUITE, KERNELS, LOGS, Kernel, build_kernel, kernel_named
from testbed.errors import SetupError
from testbed.stages import BUILD, PROJECT, build_lock, cached, command, digest, in_root, remove, say

SOURCE = PROJECT / "driver"
MODULE = "tlsnic.ko"
CHECKPATCH_SOURCE = "linux-source-6.12"
CHECKPATCH_FILES = ("checkpatch.pl", "spelling.txt", "const_structs.checkpatch")
# Two things in the headers of 7.2 that Debian's sparse does not know; after an error it would fall silent.
SPARSE_FLAGS = "-D__typeof_unqual__=__typeof__ '-D__builtin_strlen(x)=(sizeof(x)-1)'"


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
    make = ["make", "-C", f"/usr/lib/modules/{kernel.release}/build", "M=/mnt", *arguments, "modules"]
    try:
        in_root(kernel.root, make, log, [(folder, "/mnt")])
    except SetupError as error:
        first = re.search(r"^.*(?:error: |\*\*\* ).*", log.read_text(errors="replace"), re.MULTILINE)
        if first is None:
            raise
        said = f"{first[0].replace('/mnt/', '').strip()} (all of it: {log.relative_to(PROJECT)})"
        raise SetupError(f"the driver does not build for kernel {kernel.name}: {said}") from error


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
    # C=1 would be turned off, as Debian's headers lack the script that looks for sparse.
    _make(kernel, source, folder, ["W=1", "KBUILD_CHECKSRC=1", f"CF={SPARSE_FLAGS}"], log)
    complaints = [line for line in log.read_text().splitlines() if "warning:" in line or "error:" in line]
    return "\n".join(complaints)


def _fetch_checkpatch(out: Path) -> None:
    """The kernel's own style checker lies in no package but the whole source's."""
    log = LOGS / "checkpatch.log"
    unpacked = out.with_name(f"{out.name}-source")
    debian.extract(unpacked, [GUEST_SUITE], [CHECKPATCH_SOURCE], log)
    out.mkdir()
    archive = unpacked / f"usr/src/{CHECKPATCH_SOURCE}.tar.xz"
    names = [f"{CHECKPATCH_SOURCE}/scripts/{name}" for name in CHECKPATCH_FILES]
    command(["tar", "-xJf", archive, "-C", out, "--strip-components=2", "--occurrence=1", *names], log)
    remove(unpacked)


def style(kernel: Kernel, source: Path = SOURCE) -> str:
    """What checkpatch --strict has to say about the sources; empty when nothing. Fetches it once (a large package)."""
    folder = BUILD / "checkpatch"
    cached(folder, digest(CHECKPATCH_SOURCE, *CHECKPATCH_FILES), _fetch_checkpatch)
    log = LOGS / "driver-style.log"
    log.unlink(missing_ok=True)
    files = [f"/mnt/{path.name}" for path in sorted(source.glob("*.[ch]"))]
    arguments = ["--no-tree", "--strict", "--terse", "--no-summary", "--show-types", "--max-line-length=100"]
    mounts = [(source, "/mnt"), (folder, "/opt")]
    with contextlib.suppress(SetupError):  # it ends with 1 when it has something to say, which the log tells
        in_root(kernel.root, ["perl", "/opt/checkpatch.pl", *arguments, "-f", *files], log, mounts)
    return log.read_text().replace("/mnt/", "").strip()


def main() -> int:
    """`python -m testbed.assets.driver [KERNEL ...]`: W=1 and sparse (on all kernels if none is named), checkpatch."""
    parser = argparse.ArgumentParser(
        prog="testbed.assets.driver", description="Check the driver: W=1, sparse, checkpatch."
    )
    parser.add_argument("kernels", nargs="*", help=f"default: {' '.join(KERNELS)}")
    clean = True
    try:
        kernels = [kernel_named(name) for name in parser.parse_args().kernels or KERNELS]
        with build_lock(say):
            for kernel in kernels:
                build_kernel(kernel)
                clean &= _report(f"W=1 and sparse, kernel {kernel.name}", check(kernel))
            clean &= _report("checkpatch --strict", style(kernels[0]))
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if clean else 1


def _report(title: str, complaints: str) -> bool:
    say(f"{title}: {complaints.count(chr(10)) + 1} complaints\n{complaints}" if complaints else f"{title}: clean")
    return not complaints


if __name__ == "__main__":
    sys.exit(main())
