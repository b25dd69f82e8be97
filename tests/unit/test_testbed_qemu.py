"""QEMU's command line as a function of the machine, and which QEMU is chosen."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.errors import SetupError
from testbed.vm import accel
from testbed.vm.guest import kernel_complaints
from testbed.vm.qemu import (
    SOCKET_PATH_MAX,
    Accel,
    Machine,
    Qemu,
    TapNic,
    UserNic,
    VhostUserNic,
    command_line,
    kernel_command_line,
)
from testbed.vm.runtime import RuntimeFolder

NEW = Qemu(("qemu",), (10, 0, 13), "system")
OLD = Qemu(("qemu",), (7, 2, 22), "system")
MACHINE = Machine(NEW, Accel("tcg"), Path("/k"), Path("/i"), (Path("/root,1"), Path("/modules")))


def arguments(machine: Machine) -> dict[str, list[str]]:
    """Option -> its values, in order."""
    argv = command_line(machine, Path("/run/s"), Path("/log/console"))
    options: dict[str, list[str]] = {}
    for option, value in itertools.pairwise(argv):
        if option.startswith("-"):
            options.setdefault(option, []).append(value)
    return options


def test_memory_is_shared_and_as_large_as_the_machine() -> None:
    options = arguments(replace(MACHINE, memory_mib=768))
    assert options["-object"] == ["memory-backend-memfd,id=ram,size=768M,share=on"]
    assert options["-machine"] == ["q35,memory-backend=ram"]
    assert options["-m"] == ["768"]


@pytest.mark.parametrize(("name", "argument"), [("tcg", "tcg,thread=multi"), ("kvm", "kvm")])
def test_accelerator(name: str, argument: str) -> None:
    assert arguments(replace(MACHINE, accel=Accel(name)))["-accel"] == [argument]


@pytest.mark.parametrize(
    ("accel", "cpu", "model"),
    [("tcg", None, "max,-erms,-fsrm"), ("kvm", None, "max"), ("tcg", "qemu64", "qemu64"), ("kvm", "host", "host")],
)
def test_an_emulated_processor_does_not_advertise_fast_string_moves(accel: str, cpu: str | None, model: str) -> None:
    assert arguments(replace(MACHINE, accel=Accel(accel), cpu=cpu))["-cpu"] == [model]


def test_a_panic_ends_qemu_and_the_console_is_kept() -> None:
    options = arguments(MACHINE)
    assert "-no-reboot" in options
    assert {"panic=-1", "oops=panic", "console=ttyS0"} <= set(options["-append"][0].split())
    assert "file,id=console,path=/log/console" in options["-chardev"]


def test_kernel_command_line_names_the_driver_and_ends_with_the_callers_words() -> None:
    words = kernel_command_line(replace(MACHINE, driver="virtio_net", cmdline=("a=1", "b"))).split()
    assert "tlsnic.driver=virtio_net" in words
    assert words[-2:] == ["a=1", "b"]


@pytest.mark.parametrize(
    ("qemu", "accelerator", "nic", "chardev", "device"),
    [
        (NEW, "tcg", VhostUserNic("/s"), "reconnect-ms=1000", "virtio-net-pci,netdev=n0,romfile="),
        (NEW, "kvm", VhostUserNic("/s", queues=4), "reconnect-ms=1000", "mq=on,vectors=10"),
        (OLD, "tcg", VhostUserNic("/s"), "reconnect=1", "vectors=0"),
        (OLD, "tcg", VhostUserNic("/s", queues=2), "reconnect=1", "mq=on,vectors=0"),
        (OLD, "kvm", VhostUserNic("/s", queues=2), "reconnect=1", "mq=on,vectors=6"),
        (NEW, "tcg", VhostUserNic("/s", mtu=9000), "reconnect-ms=1000", "host_mtu=9000"),
        (NEW, "tcg", VhostUserNic("/s", mac="02:00:00:00:00:01"), "reconnect-ms=1000", "mac=02:00:00:00:00:01"),
    ],
)
def test_vhost_user_nic(qemu: Qemu, accelerator: str, nic: VhostUserNic, chardev: str, device: str) -> None:
    options = arguments(replace(MACHINE, qemu=qemu, accel=Accel(accelerator), nics=(nic,)))
    assert f"socket,id=c0,path=/s,{chardev}" in options["-chardev"]
    assert options["-netdev"] == [f"vhost-user,id=n0,chardev=c0,queues={nic.queues}"]
    assert options["-device"][-1].endswith(device)


def test_several_nics_of_several_kinds() -> None:
    options = arguments(replace(MACHINE, nics=(UserNic(), TapNic(7), VhostUserNic("/a,b"))))
    assert options["-netdev"] == ["user,id=n0", "tap,id=n1,fd=7", "vhost-user,id=n2,chardev=c2,queues=1"]
    assert "socket,id=c2,path=/a,,b,reconnect-ms=1000" in options["-chardev"]


def test_commas_in_paths_are_doubled() -> None:
    assert any("filename=/root,,1," in value for value in arguments(MACHINE)["-blockdev"])


def test_sockets_fit_however_deep_the_checkout_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    folder = RuntimeFolder()
    assert len(str(folder.path / "agent.sock")) <= SOCKET_PATH_MAX
    assert folder.path.stat().st_mode & 0o777 == 0o700
    folder.remove()
    folder.remove()
    assert not folder.path.exists()


def test_the_folder_of_a_killed_run_is_swept_and_that_of_a_living_one_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    mine = RuntimeFolder()
    program = "from testbed.vm.runtime import RuntimeFolder; f = RuntimeFolder(); print(f.path, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        (theirs / "socket").touch()
        RuntimeFolder().remove()
        assert theirs.exists()
        other.kill()
        other.wait()
        last = RuntimeFolder()
    assert not theirs.exists()
    assert mine.path.exists()
    for folder in (mine, last):
        folder.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", (7, 2, 22)),
        ("QEMU emulator version 10.0.8 (Debian)\nCopyright", (10, 0, 8)),
    ],
)
def test_version(said: str, version: tuple[int, int, int]) -> None:
    assert accel.parse_version(said) == version


def test_something_that_is_no_qemu() -> None:
    with pytest.raises(SetupError, match="not a QEMU"):
        accel.parse_version("hello")


@pytest.mark.parametrize(
    ("system", "kvm", "environ", "expected"),
    [
        (OLD, True, {}, ("system", "kvm")),
        (OLD, False, {}, ("trixie", "tcg")),
        (NEW, False, {}, ("system", "tcg")),
        (None, True, {}, ("trixie", "kvm")),
        (OLD, False, {"QEMU": "system"}, ("system", "tcg")),
        (NEW, False, {"QEMU": "trixie"}, ("trixie", "tcg")),
        (NEW, True, {"ACCEL": "tcg"}, ("system", "tcg")),
        (OLD, True, {"ACCEL": "tcg"}, ("trixie", "tcg")),
        (OLD, False, {"ACCEL": "kvm"}, ("system", "kvm")),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch,
    system: Qemu | None,
    kvm: bool,
    environ: dict[str, str],
    expected: tuple[str, str],
) -> None:
    monkeypatch.setattr(accel, "system_qemu", lambda: system)
    monkeypatch.setattr(accel, "unpack_qemu", lambda _: True)
    monkeypatch.setattr(accel, "unpacked_qemu", lambda suite: Qemu(("q",), (10, 0, 0), suite))
    monkeypatch.setattr(accel, "_kvm_present", lambda: "")
    monkeypatch.setattr(accel, "kvm_works", lambda *_: kvm)
    qemu, found = accel.choose(Path("/k"), "6.12", environ)
    assert (qemu.origin, found.name) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"ACCEL": "xen"}, "choose kvm or tcg"),
        ({"QEMU": "system"}, "install qemu-system-x86"),
        ({"QEMU": "/no/such/qemu"}, "No such file"),
        ({"QEMU": "/bin/echo"}, "not a QEMU"),
    ],
)
def test_overrides_that_cannot_be_met(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], message: str) -> None:
    monkeypatch.setattr(accel, "system_qemu", lambda: None)
    with pytest.raises(SetupError, match=message):
        accel.choose(Path("/k"), "6.12", environ)


@pytest.mark.parametrize(
    "line",
    [
        "[    1.0] BUG: kernel NULL pointer dereference, address: 0",
        "[    1.0] WARNING: CPU: 0 PID: 1 at net/tls/tls_device.c:1",
        "[    1.0] RIP: 0010:tls_device_sendmsg+0x1/0x2 [tls]",
        "[    1.0] INFO: task kworker/0:1:7 blocked for more than 120 seconds.",
        "[    1.0] unreferenced object 0xffff888003a4c000 (size 64):",
        "[    1.0] WARNING: possible circular locking dependency detected",
        "[    1.0] watchdog: BUG: soft lockup - CPU#0 stuck for 22s!",
    ],
)
def test_a_complaint_of_the_kernel_is_seen(line: str) -> None:
    assert kernel_complaints(f"[    0.5] hello\n{line}\n[    1.1] bye") == [line]


def test_a_healthy_kernel_log_is_clean() -> None:
    log = "[    0.0] Command line: panic=-1 oops=panic\n[    1.0] tlsnic: loading out-of-tree module taints kernel."
    assert kernel_complaints(log) == []
