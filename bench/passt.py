"""passt, of Debian trixie, as a vhost-user back end: the C program that many use where a NIC needs no privileges.

It has no wire: it ends the guest's connections itself and opens ones of its own, here in the namespace of our taps, to
its loopback. Its large packets are an MTU of 65520, since it offers no segmentation offload.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from testbed.assets import debian
from testbed.errors import SetupError
from testbed.stages import BUILD, build_lock, cached, digest, say
from testbed.wire.namespace import Wire

SUITE: Final = "trixie"
FOLDER: Final = BUILD / f"passt-{SUITE}"
HOST: Final = "192.0.2.1"  # to the guest: the namespace's loopback
GUEST: Final = "192.0.2.2"
MTU: Final = 65520
START_SECONDS: Final = 20


def unpack() -> bool:
    """Put it under build/, with its libraries; False when it was there."""
    log = BUILD / "log" / "passt.log"
    with build_lock(say):
        return cached(FOLDER, digest(SUITE, "passt"), lambda out: debian.extract(out, [SUITE], ["passt"], log))


def program() -> list[str]:
    """How it is started, through its own dynamic loader; the faster build of it where the processor can run that."""
    libraries = FOLDER / "usr/lib/x86_64-linux-gnu"
    name = "passt.avx2" if " avx2 " in Path("/proc/cpuinfo").read_text() else "passt"
    return [
        str(libraries / "ld-linux-x86-64.so.2"),
        *("--library-path", str(libraries)),
        str(FOLDER / "usr/bin" / name),
    ]


@contextmanager
def running(wire: Wire, path: Path) -> Iterator[int]:
    """One that listens at `path` for QEMU, for the time of the block; its process id. Raises SetupError."""
    argv = [*program(), "--foreground", "--quiet", "--vhost-user", "--socket", str(path), "--ipv4-only"]
    argv += ["--address", GUEST, "--netmask", "24", "--gateway", HOST, "--map-host-loopback", HOST]
    argv += ["--mtu", str(MTU), "--runas", "0:0"]
    log = BUILD / "log" / "bench-passt.passt"
    with open(log, "wb") as output, wire.popen(argv, stdout=output, stderr=output) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while not path.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SetupError(f"passt does not start: {log.read_text(errors='replace').strip()[-500:]}")
                time.sleep(0.02)
            yield process.pid
        finally:
            process.kill()
