"""A guest comes up, does what the test bed builds on, and fails in ways that can be told apart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.errors import AgentError, BootFailed, GuestDied
from testbed.setup import Assets, prepare
from testbed.stages import PROJECT
from testbed.vm.guest import Guest
from testbed.vm.qemu import Machine, UserNic

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

GATEWAY = "10.0.2.2"  # QEMU's user-mode network
ADDRESS = "10.0.2.15/24"


@pytest.fixture(scope="module")
def assets() -> Assets:
    return prepare(with_driver=False)


@pytest.fixture(scope="module")
def machine(assets: Assets) -> Machine:
    return replace(assets.machine, nics=(UserNic(),), driver="virtio_net", name="test-boot")


@pytest.fixture(scope="module")
def guest(machine: Machine) -> Iterator[Guest]:
    with Guest(machine) as running:
        yield running


def gone(pid: int) -> bool:
    """Whether a process has ended within ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def test_the_chosen_kernel_answers_in_seconds(guest: Guest, assets: Assets) -> None:
    assert guest.about == {"kernel": assets.kernel.release, "driver": "virtio_net", "driver_error": ""}
    assert assets.kernel.release.startswith(f"{assets.kernel.name}.")
    assert guest.boot_seconds < 30


def test_kernel_log_is_whole_and_clean(guest: Guest) -> None:
    assert "Linux version" in guest.agent.kernel_log()
    assert guest.kernel_complaints() == []
    assert guest.kernel_log_clean()
    assert "Linux version" in guest.console()


def test_what_the_guest_was_promised(guest: Guest) -> None:
    loaded = {line.split()[0] for line in guest.agent.get("/proc/modules").decode().splitlines()}
    assert {"tls", "aesni_intel", "virtio_net"} <= loaded
    mounted = {tuple(line.split()[1:3]) for line in guest.agent.get("/proc/mounts").decode().splitlines()}
    assert {("/sys/kernel/debug", "debugfs"), ("/sys/kernel/tracing", "tracefs"), ("/dev/pts", "devpts")} <= mounted
    assert "-ktls" in guest.agent.run(["sh", "-c", "openssl s_server -help 2>&1"]).text
    programs = ["python3", "openssl", "ethtool", "ip", "tc", "ss", "tcpdump", "iperf3", "socat", "curl", "nginx"]
    guest.agent.run(["sh", "-c", "for p; do command -v $p || exit 1; done", "sh", *programs])


def test_files_and_bulk_data(guest: Guest) -> None:
    content = os.urandom(8 << 20)
    guest.agent.put("/root/folder/file", content, mode=0o700)
    assert guest.agent.get("/root/folder/file") == content
    assert guest.agent.run(["cat"], input=content, timeout=60).stdout == content
    with pytest.raises(AgentError, match="No such file"):
        guest.agent.get("/root/nothing")


def test_the_stock_driver_reaches_the_network(guest: Guest) -> None:
    links = guest.agent.run(["ip", "-o", "link"]).text
    name = next(line.split(":")[1].strip() for line in links.splitlines() if "LOOPBACK" not in line)
    guest.agent.run(["ip", "link", "set", name, "up"])
    guest.agent.run(["ip", "address", "add", ADDRESS, "dev", name])
    guest.agent.run(["ping", "-c", "1", "-W", "5", GATEWAY])
    guest.agent.run(["ping", "-c", "1", "-W", "5", "127.0.0.1"])


def test_qmp(guest: Guest) -> None:
    assert guest.qmp("query-status") == {"status": "running", "running": True}


def test_an_orphan_is_reaped(guest: Guest) -> None:
    orphan = guest.agent.run(["sh", "-c", "sleep 0.2 & echo $!"]).text.strip()
    deadline = time.monotonic() + 10
    while guest.agent.run(["test", "-e", f"/proc/{orphan}"], check=False).returncode == 0:
        assert time.monotonic() < deadline


def test_a_panic_is_reported_with_the_console_and_nothing_stays(machine: Machine) -> None:
    with Guest(replace(machine, name="test-panic")) as guest:
        pid = guest.pid
        with pytest.raises(GuestDied, match="Kernel panic - not syncing: sysrq triggered crash") as caught:
            guest.agent.run(["sh", "-c", "echo c >/proc/sysrq-trigger"])
        assert "Call Trace:" in caught.value.console
    assert gone(pid)


def test_a_driver_that_does_not_load_is_named_and_not_retried(machine: Machine) -> None:
    notes: list[str] = []
    with pytest.raises(BootFailed, match=r"driver nonsense does not load: .*nonsense not found"):
        Guest(replace(machine, driver="nonsense", name="test-driver"), note=notes.append).start()
    assert notes == []


def test_a_panic_at_boot_is_tried_once_more_and_then_said(machine: Machine, tmp_path: Path) -> None:
    empty = tmp_path / "initrd"
    empty.touch()
    notes: list[str] = []
    with pytest.raises(BootFailed, match="guest kernel: Kernel panic - not syncing: VFS"):
        Guest(replace(machine, initrd=empty, name="test-no-root"), note=notes.append).start()
    assert len(notes) == 1
    assert "trying once more" in notes[0]


def test_a_hang_at_boot_ends_at_the_deadline(machine: Machine) -> None:
    hanging = replace(machine, extra=("-S",), name="test-hang")
    with pytest.raises(BootFailed, match="no answer within 2 s; last: nothing on its console"):
        Guest(hanging, timeout=2, note=lambda text: None).start()


def test_missing_files_and_bad_qemu_arguments_are_one_line(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(BootFailed, match="nothing is missing; run"):
        Guest(replace(machine, kernel=tmp_path / "nothing")).start()
    with pytest.raises(BootFailed, match=r"QEMU ended: .*--nonsense"):
        Guest(replace(machine, extra=("--nonsense",)), note=lambda text: None).start()


def test_nothing_is_left_when_the_launcher_is_killed(machine: Machine) -> None:
    program = (
        "from dataclasses import replace; from testbed.vm.guest import Guest; from testbed.setup import prepare;"
        "guest = Guest(replace(prepare(with_driver=False).machine, name='test-killed'));"
        "guest.start(); print('pid', guest.pid, flush=True); guest.agent.run(['sleep', '600'], timeout=600)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    with launcher.stdout:
        pid = next(int(line.split()[1]) for line in launcher.stdout if line.startswith("pid "))
        launcher.send_signal(signal.SIGKILL)
        launcher.wait(10)
    assert gone(pid)
