"""What the guest boots from, made of Debian packages.

    build/guest.squashfs             user space (trixie), shared by all kernels
    build/kernel-K/root/             the kernel's packages, its headers and the compiler it was built with, unpacked
    build/kernel-K/vmlinux           the kernel, uncompressed
    build/kernel-K/modules.squashfs  the modules a network test can want, uncompressed, with fresh dependency files
    build/kernel-K/initramfs.cpio    busybox, the modules up to the root disk, guest-image/initramfs-init
    build/kernel-K/driver/           our driver, built inside root/
    build/kernel-K/initrd            initramfs.cpio followed by the payload: driver, guest-image/init, agent, tools

The images are read-only; the guest lays a tmpfs over them, so every boot is a first boot. Only the payload changes
while one works on the driver or the guest's tools, and it is made in well under a second.
"""

from __future__ import annotations

import lzma
import re
import shutil
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from testbed.assets import cpio, debian
from testbed.errors import SetupError
from testbed.stages import BUILD, PROJECT, cached, command, digest, in_root, remove

SOURCES = PROJECT / "guest-image"
LOGS = BUILD / "log"
GUEST_SUITE = "trixie"
PAYLOAD = "payload/opt/tlsnic"

XZ_MAGIC = b"\xfd7zXZ\0"
BOOT_MODULES = ["virtio_pci", "virtio_blk", "squashfs", "overlay"]


@dataclass(frozen=True)
class Kernel:
    """A kernel the guest can run: the name users give and where Debian keeps it."""

    name: str
    suites: tuple[str, ...]  # the first is the base system's
    # The last suite's own kernel is not this one for ever: the newest of this version is taken that it still has.
    moves_on: bool = False

    @property
    def folder(self) -> Path:
        """Where everything about it lies."""
        return BUILD / f"kernel-{self.name}"

    @property
    def root(self) -> Path:
        """The unpacked build root."""
        return self.folder / "root"

    @property
    def release(self) -> str:
        """The full version, e.g. 6.12.9-amd64; the kernel must have been unpacked."""
        return next((self.root / "usr/lib/modules").iterdir()).name

    @property
    def image(self) -> Path:
        """What QEMU boots."""
        return self.folder / "vmlinux"


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("6.1", ("bookworm", "bookworm-security")),
        Kernel("6.12", ("trixie", "trixie-security")),
        Kernel("7.2", ("trixie", "trixie-backports"), moves_on=True),
    )
}
DEFAULT_KERNEL = "6.12"
RELEASE = re.compile(r"linux-image-((\d+\.\d+)\.(\d+)\+deb\d+-amd64)")


def words(name: str) -> list[str]:
    """The words of a list in guest-image/, without its comments."""
    lines = (SOURCES / name).read_text().splitlines()
    return [word for line in lines for word in line.split("#")[0].split()]


def kernel_named(name: str) -> Kernel:
    """One of those that are tested, or any other version of the newest one's suite. Raises SetupError for nonsense."""
    if name in KERNELS:
        return KERNELS[name]
    *_, newest = KERNELS.values()
    if not re.fullmatch(r"\d+\.\d+", name):
        choice = f"{', '.join(KERNELS)}, or another version that {newest.suites[-1]} has, such as 7.0"
        raise SetupError(f"KERNEL={name} is not offered; choose one of {choice}")
    return replace(newest, name=name)


def build_guest(image: Path = BUILD / "guest.squashfs") -> bool:
    """The user space; False when it was cached."""
    packages = words("packages")
    hooks = ['mkdir -p "$1/opt/tlsnic" "$1/usr/lib/modules"', 'rm -rf "$1/boot" "$1"/var/cache/*']
    key = digest(GUEST_SUITE, *packages, *hooks)
    log = LOGS / "guest.log"
    return cached(image, key, lambda out: debian.install_to_squashfs(out, GUEST_SUITE, packages, hooks, log))


def build_kernel(kernel: Kernel) -> bool:
    """Unpack the kernel with its build root and make module image and initramfs; False when all was cached."""
    tools = words("build-packages")
    log = LOGS / f"kernel-{kernel.name}.log"

    def unpack(out: Path) -> None:
        wanted = _release_wanted(kernel, log)
        debian.extract(out, kernel.suites, [f"linux-image-{wanted}", f"linux-headers-{wanted}", *tools], log)
        (out / "usr/bin/awk").symlink_to("gawk")
        found = [path.name for path in (out / "usr/lib/modules").iterdir()]
        if len(found) != 1 or not found[0].startswith(f"{kernel.name}."):
            raise SetupError(f"KERNEL={kernel.name}: Debian's {kernel.suites[-1]} has {' '.join(found)}")
        _run_depmod(out, found[0], out / "usr", log)

    root_key = digest(kernel.name, *kernel.suites, *tools)
    built = cached(kernel.root, root_key, unpack)
    key = digest(root_key, kernel.release)
    built |= cached(kernel.image, key, lambda out: _unpack_kernel(kernel, out, log))
    modules_key = digest(key, *words("modules"))
    image = kernel.folder / "modules.squashfs"
    built |= cached(image, modules_key, lambda out: _pack_modules(kernel, out, log))
    init = SOURCES / "initramfs-init"
    initramfs = kernel.folder / "initramfs.cpio"
    built |= cached(initramfs, digest(key, init, *BOOT_MODULES), lambda out: _write_initramfs(kernel, out, init))
    return built


def _release_wanted(kernel: Kernel, log: Path) -> str:
    """What follows "linux-image-" in what apt is to be asked for; "amd64" is a suite's own kernel."""
    if not kernel.moves_on:
        return "amd64"
    suite = kernel.suites[-1]
    # what it depends on may be of that suite, too, as apt sees by its name
    return f"{newest_release(kernel, debian.package_names([suite], 'linux-image-', log))}/{suite}"


def newest_release(kernel: Kernel, packages: Iterable[str]) -> str:
    """The newest release of the kernel's version of which there is a package. Raises SetupError: which there are."""
    known = [match for match in map(RELEASE.fullmatch, packages) if match]
    found = [(int(match[3]), match[1]) for match in known if match[2] == kernel.name]
    if not found:
        versions = sorted({match[2] for match in known}, key=lambda version: [int(part) for part in version.split(".")])
        raise SetupError(f"KERNEL={kernel.name}: Debian's {kernel.suites[-1]} has {', '.join(versions) or 'no kernel'}")
    return max(found)[1]


def payload_of(image: bytes) -> bytes:
    """The compressed kernel inside a bzImage (fields of the kernel's Documentation/arch/x86/boot.rst)."""
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    return image[start : start + length]


def _unpack_kernel(kernel: Kernel, out: Path, log: Path) -> None:
    """The ELF kernel, which QEMU starts through its PVH entry: emulated, unpacking itself would take it seconds."""
    places = [kernel.root / f"boot/vmlinuz-{kernel.release}", kernel.root / f"usr/lib/modules/{kernel.release}/vmlinuz"]
    packed = payload_of(next(place for place in places if place.exists()).read_bytes())
    if packed.startswith(XZ_MAGIC):
        out.write_bytes(lzma.LZMADecompressor().decompress(packed))
        return
    folder = out.with_name(f"{out.name}-packed")
    folder.mkdir(exist_ok=True)
    # The four bytes behind the frame are the unpacked size, which zstd would take for the start of another.
    (folder / "kernel.zst").write_bytes(packed[:-4])
    in_root(kernel.root, ["zstd", "-dqf", "/mnt/kernel.zst"], log, [(folder, "/mnt")])
    (folder / "kernel").rename(out)
    remove(folder)


def _dependencies(kernel: Kernel) -> dict[str, list[str]]:
    """Module file -> files it needs, both relative to the modules folder (the format of modules.dep)."""
    folder = kernel.root / "usr/lib/modules" / kernel.release
    table = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        module, _, needs = line.partition(":")
        table[module] = needs.split()
    return table


def module_name(path: str) -> str:
    """A module file's name as the kernel knows it."""
    return Path(path).name.split(".ko")[0].replace("-", "_")


def closure(table: dict[str, list[str]], wanted: Iterable[str]) -> list[str]:
    """The wanted module files and all they need, in an order in which they can be loaded."""
    ordered: dict[str, None] = {}

    def visit(module: str) -> None:
        if module not in ordered:
            for needed in table[module]:
                visit(needed)
            ordered[module] = None

    for module in wanted:
        visit(module)
    return list(ordered)


def _module_bytes(path: Path) -> bytes:
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def _pack_modules(kernel: Kernel, out: Path, log: Path) -> None:
    source = kernel.root / "usr/lib/modules" / kernel.release
    table = _dependencies(kernel)
    listed = words("modules")
    folders = tuple(f"kernel/{word}" for word in listed if word.endswith("/"))
    wanted = [path for path in table if path.startswith(folders) or module_name(path) in listed]
    tree = out.with_name(f"{out.name}-tree")
    target = tree / "lib/modules" / kernel.release
    for module in closure(table, wanted):
        copy = target / module.removesuffix(".xz")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(_module_bytes(source / module))
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copyfile(source / name, target / name)
    _run_depmod(kernel.root, kernel.release, tree, log)
    pack = [
        "mksquashfs",
        str(tree / "lib/modules"),
        str(out),
        "-comp",
        "lz4",
        "-all-root",
        "-noappend",
        "-no-progress",
        "-quiet",
    ]
    command(pack, log)
    shutil.rmtree(tree)


def _run_depmod(root: Path, release: str, folder: Path, log: Path) -> None:
    """(Re)write the dependency files under folder/lib/modules, with the build root's own depmod."""
    in_root(root, ["depmod", "-b", "/mnt", release], log, [(folder, "/mnt")])


def _write_initramfs(kernel: Kernel, out: Path, init: Path) -> None:
    table = _dependencies(kernel)
    modules = closure(table, [path for path in table if module_name(path) in BOOT_MODULES])
    folder = kernel.root / "usr/lib/modules" / kernel.release
    names = [f"{module_name(path)}.ko" for path in modules]
    entries = [cpio.directory(name) for name in ("dev", "proc", "sys", "lower", "over", "new", "payload")]
    entries += [
        cpio.char_device("dev/console", 5, 1),
        cpio.file("bin/busybox", (kernel.root / "usr/bin/busybox").read_bytes(), 0o755),
        cpio.file("init", init.read_bytes(), 0o755),
        cpio.file("modules/order", "".join(f"{name}\n" for name in names).encode()),
    ]
    pairs = zip(names, modules, strict=True)
    entries += [cpio.file(f"modules/{name}", _module_bytes(folder / path)) for name, path in pairs]
    out.write_bytes(cpio.archive(entries))


def payload(driver: bytes | None, sources: Path = SOURCES) -> bytes:
    """The archive with what changes often: driver, init, agent, tools."""
    entries = [
        cpio.file(f"{PAYLOAD}/init", (sources / "init").read_bytes(), 0o755),
        cpio.file(f"{PAYLOAD}/agent.py", (sources / "agent.py").read_bytes()),
    ]
    if driver is not None:
        entries.append(cpio.file(f"{PAYLOAD}/tlsnic.ko", driver))
    for tool in sorted((sources / "tools").glob("*.py")):
        entries.append(cpio.file(f"{PAYLOAD}/tools/{tool.name}", tool.read_bytes(), 0o755))
    return cpio.archive(entries)


def write_initrd(kernel: Kernel, driver: Path | None) -> Path:
    """Join initramfs and payload; returns the file QEMU loads. Guests without our driver do not disturb the others."""
    initrd = kernel.folder / ("initrd" if driver else "initrd-plain")
    temporary = initrd.with_name(f".tmp-{initrd.name}")
    content = payload(driver.read_bytes() if driver else None)
    temporary.write_bytes((kernel.folder / "initramfs.cpio").read_bytes() + content)
    temporary.rename(initrd)
    return initrd
