"""Which QEMU, and with which accelerator: decided here, once, and said in one line.

/dev/kvm may be present and useless (a nested hypervisor that runs only kernels made for it), so KVM is believed only
after a guest kernel has run under it to the point where it looks for its root disk. The verdict is remembered for this
host kernel, this QEMU and this guest kernel. `ACCEL=kvm|tcg` and `QEMU=system|trixie|bookworm|/path` override.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from testbed.assets import debian
from testbed.errors import SetupError
from testbed.stages import BUILD, cached, digest
from testbed.vm.qemu import FIRST_GOOD_TCG, Accel, Qemu

UNPACKED_SUITES = ("trixie", "bookworm")  # the first is the one to prefer, the second has the oldest supported one
UNPACKED_PACKAGES = ["qemu-system-x86", "qemu-system-data", "seabios"]
OLDEST = (7, 2, 0)
PROBE_SECONDS = 15.0
# A kernel without a root disk gets here in about a second where KVM works.
PROBE_GOAL = "VFS: Unable to mount root fs"


def parse_version(text: str) -> tuple[int, int, int]:
    """`QEMU emulator version 10.0.8 (...)` as three numbers."""
    found = re.search(r"version (\d+)\.(\d+)\.(\d+)", text)
    if not found:
        said = (text.strip().splitlines() or ["nothing"])[0]
        raise SetupError(f"not a QEMU: it says {said[:80]!r} about its version")
    return int(found[1]), int(found[2]), int(found[3])


def _qemu(argv: tuple[str, ...], origin: str) -> Qemu:
    try:
        said = subprocess.run([*argv, "--version"], capture_output=True, text=True, check=False, timeout=20)
    except OSError as error:
        raise SetupError(f"QEMU {argv[0]}: {error.strerror}") from error
    qemu = Qemu(argv, parse_version(said.stdout + said.stderr), origin)
    if qemu.version < OLDEST:
        raise SetupError(f"{qemu} is too old; 7.2 or later is needed")
    return qemu


def system_qemu() -> Qemu | None:
    """The QEMU that the host has installed, if any."""
    path = shutil.which("qemu-system-x86_64")
    return _qemu((path,), "system") if path else None


def unpack_qemu(suite: str) -> bool:
    """Put a Debian suite's QEMU under build/, with its libraries and firmware; False when it was there."""
    log = BUILD / "log" / f"qemu-{suite}.log"
    key = digest(suite, *UNPACKED_PACKAGES)
    return cached(_folder(suite), key, lambda out: debian.extract(out, [suite], UNPACKED_PACKAGES, log))


def _folder(suite: str) -> Path:
    return BUILD / f"qemu-{suite}"


def unpacked_qemu(suite: str) -> Qemu:
    """A suite's QEMU, started through its own dynamic loader, so the host's C library does not matter."""
    root = _folder(suite)
    libraries = root / "usr/lib/x86_64-linux-gnu"
    # 7.2 has its emulator in a module, which it looks for where it was built to be installed
    argv = ["env", f"QEMU_MODULE_DIR={libraries / 'qemu'}"]
    argv += [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries)]
    argv += [str(root / "usr/bin/qemu-system-x86_64")]
    for folder in ("qemu", "seabios"):
        argv += ["-L", str(root / "usr/share" / folder)]
    return _qemu(tuple(argv), f"{suite}, unpacked")


def _kvm_present() -> str:
    """Empty when /dev/kvm can be used, else why not."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return "there is no /dev/kvm"
    except OSError as error:
        return f"/dev/kvm does not open ({(error.strerror or '').lower()})"
    return ""


def _runs_under_kvm(qemu: Qemu, kernel: Path) -> bool:
    """Whether this kernel really runs under KVM: it gets to the end of its own boot, without any disk."""
    argv = ["setpriv", "--pdeathsig", "KILL", *qemu.argv, "-accel", "kvm", "-cpu", "max", "-machine", "q35"]
    argv += ["-m", "512", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-kernel", str(kernel), "-append", "console=ttyS0 panic=-1", "-serial", "stdio"]
    log = BUILD / "log" / "kvm-probe.console"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as output:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + PROBE_SECONDS
            while time.monotonic() < deadline:
                ended = process.poll() is not None
                said = log.read_text(errors="replace")
                if PROBE_GOAL in said:
                    return True
                if ended or "KVM internal error" in said:
                    return False
                time.sleep(0.05)
            return False
        finally:
            process.kill()
            process.wait()


def kvm_works(qemu: Qemu, kernel: Path, release: str) -> bool:
    """The remembered verdict of the probe, or a new one."""
    verdicts_file = BUILD / "kvm.json"
    verdicts = json.loads(verdicts_file.read_text()) if verdicts_file.exists() else {}
    subject = f"host {os.uname().release}, {qemu}, guest {release}"
    if subject not in verdicts:
        verdicts[subject] = _runs_under_kvm(qemu, kernel)
        temporary = BUILD / ".tmp-kvm.json"
        temporary.write_text(json.dumps(verdicts, indent=1))
        temporary.rename(verdicts_file)
    works: bool = verdicts[subject]
    return works


def check_wishes(environ: Mapping[str, str] = os.environ) -> None:
    """Judge the overrides as far as nothing must be built for it. Raises SetupError."""
    wish = environ.get("ACCEL", "")
    if wish not in ("", "kvm", "tcg"):
        raise SetupError(f"ACCEL={wish}: choose kvm or tcg")
    if wish == "kvm" and (absent := _kvm_present()):
        raise SetupError(f"ACCEL=kvm: {absent}")
    if environ.get("QEMU", "") not in UNPACKED_SUITES:
        _wished_qemu(environ.get("QEMU", ""))


def choose(kernel: Path, release: str, environ: Mapping[str, str] = os.environ) -> tuple[Qemu, Accel]:
    """The QEMU and the accelerator for a guest kernel. Raises SetupError for overrides that cannot be met."""
    check_wishes(environ)
    wish = environ.get("ACCEL", "")
    qemu = _wished_qemu(environ.get("QEMU", ""))
    first = qemu or system_qemu() or _unpacked()
    accel = _choose_accel(wish, first, kernel, release)
    if qemu is None and accel.name == "tcg" and first.version < FIRST_GOOD_TCG:
        first = _unpacked()
    return first, accel


def _wished_qemu(wish: str) -> Qemu | None:
    if wish == "system":
        found = system_qemu()
        if found is None:
            raise SetupError("QEMU=system: there is none; install qemu-system-x86")
        return found
    if wish in UNPACKED_SUITES:
        return _unpacked(wish)
    return _qemu((wish,), wish) if wish else None


def _unpacked(suite: str = UNPACKED_SUITES[0]) -> Qemu:
    unpack_qemu(suite)
    return unpacked_qemu(suite)


def _choose_accel(wish: str, qemu: Qemu, kernel: Path, release: str) -> Accel:
    if wish:
        return Accel(wish, f"asked for by ACCEL={wish}")
    if absent := _kvm_present():
        return Accel("tcg", absent)
    if kvm_works(qemu, kernel, release):
        return Accel("kvm", "a guest kernel runs under it")
    return Accel("tcg", "/dev/kvm is present but a stock kernel does not run under it")
