"""Who may import whom, read from the imports themselves, so that the core stays without I/O."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "nicdev"
OPERATING_SYSTEM = {
    "asyncio",
    "fcntl",
    "mmap",
    "multiprocessing",
    "os",
    "resource",
    "select",
    "selectors",
    "signal",
    "socket",
    "subprocess",
    "time",
}
# The one place that needs the platform: the store-load barrier is a matter of the processor.
BARRIER_IMPORTS = {"ctypes", "platform", "threading"}
BASE = {"abi", "errors", "stats"}
MAY_IMPORT = {
    "abi": set(),
    "errors": {"abi", "stats"},  # for annotations only
    "stats": set(),
    "wire": BASE,
    "tls": BASE | {"wire"},
    "virtio": BASE | {"wire"},
    "vhost": BASE | {"wire", "virtio"},
    "faults": BASE | {"wire", "tls"},
    "control": BASE | {"tls", "faults"},
    "messages": BASE | {"wire"},
    "observer": BASE,
    "nic": BASE | {"wire", "tls", "virtio", "control", "messages", "observer"},
    "queues": BASE | {"wire", "virtio", "nic"},
}


def imports(path: Path) -> set[str]:
    """Full names of the modules `path` imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "nicdev" else {node.module}
            )
    return found


def core_files() -> list[Path]:
    files = [
        p for p in CORE.rglob("*.py") if p.relative_to(CORE).parts[0] not in ("edge", "cli.py", "ctl.py", "__init__.py")
    ]
    assert files
    return files


@pytest.mark.parametrize("path", core_files(), ids=lambda p: str(p.relative_to(CORE)))
def test_core_imports(path: Path) -> None:
    parts = path.relative_to(CORE).with_suffix("").parts
    layer = parts[0]
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "nicdev":
            assert rest[0] == layer or rest[0] in MAY_IMPORT[layer], f"{layer} must not import {name}"
        elif top == "cryptography":
            assert parts == ("tls", "aead"), "cryptography belongs to tls/aead.py"
        else:
            assert top in sys.stdlib_module_names, f"the core needs {name}"
            assert top not in OPERATING_SYSTEM, f"{name} belongs to the edge"
            assert top not in BARRIER_IMPORTS or parts == ("virtio", "barrier"), f"{name} belongs to the edge"


@pytest.mark.parametrize("path", sorted((CORE / "edge").glob("*.py")), ids=lambda p: p.name)
def test_edge_does_not_know_the_command_line_or_the_testbed(path: Path) -> None:
    assert not {n for n in imports(path) if n.startswith(("nicdev.cli", "testbed", "tests"))}


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=lambda p: str(p.relative_to(CORE)))
def test_device_does_not_know_its_surroundings(path: Path) -> None:
    assert not {n for n in imports(path) if n.split(".")[0] in ("testbed", "tests", "scapy", "pytest")}


JUDGES = [path for folder in ("wire", "peers") for path in sorted((ROOT / "testbed" / folder).glob("*.py"))]


@pytest.mark.parametrize("path", JUDGES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_decoder_and_peers_share_nothing_with_the_engine(path: Path) -> None:
    assert not {n for n in imports(path) if n.startswith("nicdev")}
