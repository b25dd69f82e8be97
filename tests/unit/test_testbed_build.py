"""The build's own machinery: archives, module order, caching, and where packages come from."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from testbed import stages
from testbed.assets import cpio, debian, image
from testbed.errors import SetupError


def members(archive: bytes) -> list[tuple[str, int, bytes]]:
    """(name, mode, content) of a newc archive, read as the kernel's format document describes it."""
    found: list[tuple[str, int, bytes]] = []
    position = 0
    while True:
        assert archive[position : position + 6] == b"070701"
        fields = [int(archive[start : start + 8], 16) for start in range(position + 6, position + 110, 8)]
        name_start = position + 110
        name = archive[name_start : name_start + fields[11] - 1].decode()
        start = -(-(name_start + fields[11]) // 4) * 4
        if name == "TRAILER!!!":
            assert len(archive) == start
            return found
        found.append((name, fields[1], archive[start : start + fields[6]]))
        position = -(-(start + fields[6]) // 4) * 4


def test_archive_holds_what_was_put_in_with_its_folders_first() -> None:
    entries = [cpio.file("a/b/c", b"12345", 0o755), cpio.symlink("l", "a/b"), cpio.file("a/d", b"")]
    assert members(cpio.archive(entries)) == [
        ("a", 0o040755, b""),
        ("a/b", 0o040755, b""),
        ("a/b/c", 0o100755, b"12345"),
        ("l", 0o120777, b"a/b"),
        ("a/d", 0o100644, b""),
    ]


@pytest.mark.parametrize("size", range(5))
def test_archive_stays_aligned(size: int) -> None:
    archive = cpio.archive([cpio.file("x" * size + "n", bytes(size)), cpio.file("last", b"end")])
    assert len(archive) % 4 == 0
    assert members(archive)[1] == ("last", 0o100644, b"end")


def test_device_node() -> None:
    archive = cpio.archive([cpio.char_device("console", 5, 1)])
    assert int(archive[14:22], 16) == 0o020600
    assert (int(archive[78:86], 16), int(archive[86:94], 16)) == (5, 1)


def test_modules_load_after_what_they_need() -> None:
    table = {"d.ko": ["c.ko", "b.ko"], "c.ko": ["a.ko"], "b.ko": ["a.ko"], "a.ko": [], "z.ko": []}
    order = image.closure(table, ["d.ko", "b.ko"])
    assert order == ["a.ko", "c.ko", "b.ko", "d.ko"]


def test_payload_carries_driver_agent_and_tools(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    for name in ("init", "agent.py", "tools/one.py"):
        (tmp_path / name).write_text(name)
    found = {name: content for name, mode, content in members(image.payload(b"elf", tmp_path)) if mode & 0o100000}
    assert found == {
        "payload/opt/tlsnic/init": b"init",
        "payload/opt/tlsnic/agent.py": b"agent.py",
        "payload/opt/tlsnic/tlsnic.ko": b"elf",
        "payload/opt/tlsnic/tools/one.py": b"tools/one.py",
    }


@pytest.mark.parametrize("name", ["6", "6.1.2", "../6.1", "6.12-rt", "newest"])
def test_what_is_no_kernel_is_one_line_with_the_choice(name: str) -> None:
    choice = "choose one of 6.1, 6.12, 7.2, or another version that trixie-backports has, such as 7.0"
    with pytest.raises(SetupError, match=re.escape(f"KERNEL={name} is not offered; {choice}")):
        image.kernel_named(name)


def test_other_versions_are_of_the_suite_that_has_many() -> None:
    kernel = image.kernel_named("6.19")
    assert (kernel.name, kernel.suites, kernel.moves_on) == ("6.19", ("trixie", "trixie-backports"), True)
    assert kernel.folder.name == "kernel-6.19"


def test_of_a_version_that_its_suite_has_left_the_newest_release_is_taken() -> None:
    kernel = image.KERNELS["7.2"]
    releases = ["7.2.9+deb13", "7.2.12+deb13", "7.2.11+deb13", "7.20.1+deb13", "7.3.4+deb13", "6.12.99+deb13"]
    names = [f"linux-image-{release}-{kind}" for release in releases for kind in ("amd64", "cloud-amd64", "amd64-dbg")]
    assert image.newest_release(kernel, ["linux-image-amd64", *names]) == "7.2.12+deb13-amd64"
    left = [name for name in names if "-7.2." not in name]
    with pytest.raises(SetupError, match=r"^KERNEL=7\.2: Debian's trixie-backports has 6\.12, 7\.3, 7\.20$"):
        image.newest_release(kernel, left)
    with pytest.raises(SetupError, match=r"^KERNEL=7\.2: Debian's trixie-backports has no kernel$"):
        image.newest_release(kernel, ["linux-image-amd64"])


def test_a_mirror_that_does_not_answer_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its packages would seem to be gone."""
    monkeypatch.setattr(debian, "sources", lambda *_: [f"deb file:{tmp_path}/nowhere trixie main"])
    monkeypatch.setattr(debian, "host_codename", lambda: "trixie")
    monkeypatch.setattr(stages, "PROJECT", tmp_path)
    with pytest.raises(SetupError, match="apt-get failed"):
        debian.package_names(["trixie"], "linux-image-", tmp_path / "log")


def test_mirror_is_the_hosts_own() -> None:
    targets = "http://other/deb bookworm contrib\nhttp://third/x stable main\nhttp://mirror/debian bookworm main\n"
    assert debian.pick_mirror(targets, "bookworm") == "http://mirror/debian"
    with pytest.raises(SetupError, match="no Debian mirror for trixie"):
        debian.pick_mirror(targets, "trixie")


def test_security_updates_come_from_the_hosts_own_mirror_of_them() -> None:
    targets = "http://mirror/debian bookworm main\nhttp://safe/deb bookworm-security main\n"
    suites = ["trixie", "trixie-security", "trixie-backports"]
    main = ["deb http://mirror/debian trixie main", "deb http://mirror/debian trixie-backports main"]
    assert debian.sources(suites, targets, "bookworm") == [main[0], "deb http://safe/deb trixie-security main", main[1]]
    without = targets.splitlines()[0]
    assert debian.sources(suites, without, "bookworm") == main
    with pytest.raises(SetupError, match="no Debian mirror for trixie"):
        debian.sources(suites, targets, "trixie")


def writer(text: str) -> Callable[[Path], None]:
    """A build step that makes a file."""

    def build(out: Path) -> None:
        out.write_text(text)

    return build


def test_a_stage_runs_once_per_key(tmp_path: Path) -> None:
    product = tmp_path / "product"
    assert stages.cached(product, "k1", writer("one"))
    assert not stages.cached(product, "k1", lambda out: pytest.fail("built twice"))
    assert stages.cached(product, "k2", writer("two"))
    assert product.read_text() == "two"


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    product = tmp_path / "product"

    def build(name: str) -> None:
        def make(out: Path) -> None:
            out.mkdir()
            (out / name).touch()

        assert stages.cached(product, name, make)

    build("old")
    build("new")
    assert [path.name for path in product.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".product.key", "product"]


def test_a_failing_stage_leaves_the_old_product_and_the_next_run_works(tmp_path: Path) -> None:
    product = tmp_path / "product"
    stages.cached(product, "k1", writer("one"))

    def fail(out: Path) -> None:
        out.write_text("half")
        raise SetupError("no")

    with pytest.raises(SetupError):
        stages.cached(product, "k2", fail)
    assert product.read_text() == "one"
    assert stages.cached(product, "k2", writer("two"))
    assert product.read_text() == "two"


def test_digest_sees_names_modes_and_contents(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    seen = {stages.digest(tmp_path)}
    file.write_text("y")
    seen.add(stages.digest(tmp_path))
    file.chmod(0o755)
    seen.add(stages.digest(tmp_path))
    file.rename(tmp_path / "other")
    seen.add(stages.digest(tmp_path))
    assert len(seen) == 4


def _hold(build: Path, entered: multiprocessing.synchronize.Event, leave: multiprocessing.synchronize.Event) -> None:
    stages.BUILD = build
    with stages.build_lock(lambda text: None):
        entered.set()
        leave.wait(10)


def test_a_second_run_waits_and_says_so_then_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("spawn")
    entered, leave = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, entered, leave))
    other.start()
    assert entered.wait(20)
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel" / ".tmp-root").mkdir()
    monkeypatch.setattr(stages, "BUILD", tmp_path)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        leave.set()

    with stages.build_lock(say):
        assert said == ["another run is preparing the test bed; waiting for it"]
        assert list((tmp_path / "kernel").iterdir()) == []
    other.join(10)
    assert other.exitcode == 0


def test_a_failing_command_is_one_line_from_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "PROJECT", tmp_path)
    with pytest.raises(SetupError, match=r"sh failed \(log\): one \| two"):
        stages.command(["sh", "-c", "echo one; echo two >&2; exit 3"], tmp_path / "log")
    with pytest.raises(SetupError, match="not installed"):
        stages.command(["/no/such/program"], tmp_path / "log")


@pytest.mark.parametrize("script", ["guest-image/init", "guest-image/initramfs-init", "testbed/bootstrap"])
def test_shell_scripts_parse(script: str) -> None:
    shell = "bash" if script.endswith("bootstrap") else "sh"
    assert os.access(stages.PROJECT / script, os.X_OK)
    assert shutil.which(shell)
    subprocess.run([shell, "-n", stages.PROJECT / script], check=True)


def test_the_kernel_is_found_in_its_boot_image() -> None:
    boot_image = bytearray(0x2000)
    boot_image[0x1F1] = 3  # sectors of real-mode code, besides the first
    boot_image[0x248:0x250] = (0x200).to_bytes(4, "little") + (5).to_bytes(4, "little")
    boot_image[4 * 512 + 0x200 : 4 * 512 + 0x205] = b"inner"
    assert image.payload_of(bytes(boot_image)) == b"inner"
