"""Build stages: each makes one thing under build/, is cached by a key, says one line, and is safe to kill.

A stage writes to a temporary name and renames at its end; its key (a hash of everything it depends on) is stored
beside the product. So an interrupted run leaves only `.tmp-*` names, which the next run removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from testbed.errors import SetupError

PROJECT = Path(__file__).resolve().parents[1]
BUILD = PROJECT / "build"
TEMPORARY = ".tmp-"


def digest(*parts: str | bytes | Path) -> str:
    """One hash over texts, bytes and the contents (names, modes) of files and folders."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            files = sorted(path for path in part.rglob("*") if path.is_file()) if part.is_dir() else [part]
            for path in files:
                total.update(f"{path.relative_to(part.parent)} {path.stat().st_mode:o}\0".encode())
                total.update(hashlib.sha256(path.read_bytes()).digest())
        else:
            total.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return total.hexdigest()


@contextlib.contextmanager
def build_lock(say: Callable[[str], None]) -> Iterator[None]:
    """Only one process builds at a time; a second waits and says so. Also sweeps what a killed run left."""
    BUILD.mkdir(exist_ok=True)
    with open(BUILD / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run is preparing the test bed; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for pattern in (f"{TEMPORARY}*", f"*/{TEMPORARY}*"):
            for leftover in BUILD.glob(pattern):
                remove(leftover)
        yield


def remove(path: Path) -> None:
    """Delete a file or a whole tree, whatever its modes."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _key_file(product: Path) -> Path:
    return product.with_name(f".{product.name}.key")


def is_current(product: Path, key: str) -> bool:
    """Whether `product` is there and was made from what `key` hashes."""
    key_file = _key_file(product)
    return product.exists() and key_file.exists() and key_file.read_text() == key


def cached(product: Path, key: str, build: Callable[[Path], None]) -> bool:
    """Make `product` by `build(temporary path)` unless it is current; False when it was."""
    if is_current(product, key):
        return False
    product.parent.mkdir(parents=True, exist_ok=True)
    temporary = product.with_name(f"{TEMPORARY}{product.name}")
    remove(temporary)
    build(temporary)
    _key_file(product).unlink(missing_ok=True)
    if product.is_dir():
        product.rename(old := product.with_name(f"{TEMPORARY}old-{product.name}"))
        remove(old)
    temporary.rename(product)
    _key_file(product).write_text(key)
    return True


class Progress:
    """One line per stage: `[3/7] guest root file system ... 14.2 s`, or `cached`."""

    def __init__(self, total: int, first: int = 1) -> None:
        self.total = total
        self.number = first

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator[list[str]]:
        """Around one stage; text appended to the yielded list replaces the elapsed time."""
        began = time.monotonic()
        print(f"[{self.number}/{self.total}] {title} ...", end=" ", flush=True)
        self.number += 1
        outcome: list[str] = []
        try:
            yield outcome
        except BaseException:
            print("failed", flush=True)
            raise
        print(outcome[-1] if outcome else f"{time.monotonic() - began:.1f} s", flush=True)


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(text, flush=True)
    sys.stdout.flush()


def command(argv: Sequence[str | Path], log: Path, **options: object) -> None:
    """Run a build command with its output in `log`. Raises SetupError with the last lines."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        try:
            done = subprocess.run(argv, stdout=output, stderr=output, stdin=subprocess.DEVNULL, check=False, **options)  # type: ignore[call-overload]
        except FileNotFoundError as error:
            raise SetupError(f"{argv[0]} is not installed; run `make setup`") from error
    if done.returncode:
        raise SetupError(f"{Path(argv[0]).name} failed ({log.relative_to(PROJECT)}): {tail(log)}")


def tail(log: Path, lines: int = 3) -> str:
    """The last lines of a log, joined into one."""
    text = log.read_text(errors="replace").strip().splitlines()
    return " | ".join(line.strip() for line in text[-lines:]) or "it said nothing"


def in_root(root: Path, argv: Sequence[str], log: Path, mounts: Sequence[tuple[Path, str]] = ()) -> None:
    """Run a command with `root` as its root directory, as root or, for an ordinary user, in a user namespace.

    `mounts` are (host folder, folder in the root). They live in a mount namespace of the command's own and vanish
    with it, however it ends.
    """
    # chroot is not on the path of an ordinary user
    steps = ["PATH=$PATH:/usr/sbin:/sbin", 'cd "$1"; shift', "mount --rbind /dev dev", "mount --rbind /proc proc"]
    for source, target in mounts:
        (root / target.lstrip("/")).mkdir(parents=True, exist_ok=True)
        steps.append(f"mount --bind '{source}' '.{target}'")
    steps.append('exec chroot . env -i PATH=/usr/sbin:/usr/bin HOME=/root LC_ALL=C "$@"')
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    command(["unshare", *user, "--mount", "sh", "-ec", "\n".join(steps), "sh", root, *argv], log)
