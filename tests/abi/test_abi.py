"""nicdev/abi.py and driver/tlsnic_abi.h declare one interface: a C probe prints its half, every value must agree."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

import pytest

from nicdev import abi

HEADER = Path(__file__).parents[2] / "driver" / "tlsnic_abi.h"
STRUCTS = {
    "tlsnic_hello": abi.HELLO,
    "tlsnic_hello_reply": abi.HELLO_REPLY,
    "tlsnic_tx_tls": abi.TX_TLS,
    "tlsnic_command": abi.COMMAND,
    "tlsnic_ctx_add": abi.CTX_ADD,
    "tlsnic_rx_resync": abi.RX_RESYNC,
    "tlsnic_reply": abi.REPLY,
    "tlsnic_rx_tls": abi.RX_TLS,
    "tlsnic_event": abi.EVENT,
}
FIELDS: dict[str, type] = {
    "tlsnic_hello": abi.Hello,
    "tlsnic_hello_reply": abi.HelloReply,
    "tlsnic_tx_tls": abi.TxTls,
    "tlsnic_command": abi.CommandHeader,
    "tlsnic_ctx_add": abi.CtxAdd,
    "tlsnic_rx_resync": abi.RxResync,
    "tlsnic_reply": abi.Reply,
    "tlsnic_rx_tls": abi.RxTls,
    "tlsnic_event": abi.Event,
}
ENUMS: dict[str, type[IntEnum]] = {
    "TLSNIC_EXT_": abi.ExtType,
    "TLSNIC_OP_": abi.Opcode,
    "TLSNIC_STATUS_": abi.Status,
    "TLSNIC_EVENT_": abi.EventCode,
    "TLSNIC_DIR_": abi.Direction,
}
FLAGS = {
    "TLSNIC_CIPHER_": abi.CipherCap,
    "TLSNIC_CAP_": abi.Cap,
    "TLSNIC_TX_F_": abi.TxTlsFlag,
    "TLSNIC_ADD_F_": abi.AddFlag,
    "TLSNIC_RX_F_": abi.RxTlsFlag,
    "TLSNIC_HELLO_F_": abi.HelloFlag,
}
PERSONALITIES: dict[str, type[IntEnum]] = {"TLSNIC_TX_": abi.TxPersonality, "TLSNIC_RX_": abi.RxPersonality}
SCALARS = {
    "TLSNIC_ABI_VERSION": abi.ABI_VERSION,
    "TLSNIC_HDR_F_EXT": abi.HDR_F_EXT,
    "TLSNIC_HELLO_ETHERTYPE": abi.HELLO_ETHERTYPE,
    "TLSNIC_MAX_RECORD_PREFIX": abi.MAX_RECORD_PREFIX,
    "TLSNIC_STAT_NAME_LEN": abi.STAT_NAME_LEN,
}


def python_constants() -> dict[str, int]:
    values = dict(SCALARS)
    for table in (ENUMS, FLAGS, PERSONALITIES):
        for prefix, members in table.items():
            values |= {prefix + member.name: int(member) for member in members if member.name}
    return values


def header_constants() -> set[str]:
    """Names of every enumerator and numeric macro the header declares."""
    text = HEADER.read_text()
    macros = set(re.findall(r"^#define\s+(TLSNIC_\w+)[ \t]+[\d(]", text, re.MULTILINE))
    return macros | set(re.findall(r"^\s+(TLSNIC_\w+)\s*=", text, re.MULTILINE))


def header_fields() -> dict[str, list[str]]:
    """Fields of each struct in the header, reserved ones left out."""
    structs = re.findall(r"^struct (\w+) \{(.*?)^\}", HEADER.read_text(), re.MULTILINE | re.DOTALL)
    return {
        name: [f for f in re.findall(r"^\s+__\w+\s+(\w+)", body, re.MULTILINE) if not f.startswith("reserved")]
        for name, body in structs
    }


def struct_fields(layout: struct.Struct) -> Iterator[tuple[int, int]]:
    """(offset, size) of every value of a `struct` format without alignment."""
    assert layout.format.startswith("<")
    at = 0
    for count, code in re.findall(r"(\d*)([a-zA-Z])", layout.format[1:]):
        repeat = int(count or 1)
        each, times = (repeat, 1) if code in "sx" else (struct.calcsize("<" + code), repeat)
        for _ in range(times):
            if code != "x":
                yield at, each
            at += each


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    compiler = shutil.which("gcc") or shutil.which("cc")
    assert compiler, "a C compiler is needed (apt install gcc)"
    folder = tmp_path_factory.mktemp("abi")
    (folder / "linux").mkdir()
    (folder / "linux" / "types.h").write_text(
        "#include <stdint.h>\n"
        + "".join(f"typedef uint{n}_t __u{n}, __le{n}, __be{n};\n" for n in (16, 32, 64))
        + "typedef uint8_t __u8;\n#define __packed __attribute__((packed))\n"
    )
    names = sorted(header_constants())
    lines = [f'printf("{name} %lld\\n", (long long){name});' for name in names]
    for name, fields in header_fields().items():
        lines.append(f'printf("sizeof.{name} %zu\\n", sizeof(struct {name}));')
        for field in fields:
            lines.append(f'printf("offset.{name}.{field} %zu\\n", offsetof(struct {name}, {field}));')
            lines.append(f'printf("size.{name}.{field} %zu\\n", sizeof(((struct {name} *)0)->{field}));')
    source = folder / "probe.c"
    body = "\n".join(lines)
    source.write_text(
        f'#include <stdio.h>\n#include <stddef.h>\n#include "{HEADER}"\nint main(void)\n{{\n{body}\nreturn 0;\n}}\n'
    )
    subprocess.run([compiler, "-Wall", "-Werror", f"-I{folder}", "-o", folder / "probe", source], check=True)
    output = subprocess.run([folder / "probe"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in output.splitlines())}


def test_constants_are_equal_and_complete(probe: dict[str, int]) -> None:
    in_c = {name: value for name, value in probe.items() if "." not in name}
    assert in_c == python_constants()


def test_header_has_exactly_the_structs() -> None:
    assert set(header_fields()) == set(STRUCTS)


@pytest.mark.parametrize("name", STRUCTS)
def test_layout_is_equal(probe: dict[str, int], name: str) -> None:
    fields = header_fields()[name]
    in_c = [(probe[f"offset.{name}.{f}"], probe[f"size.{name}.{f}"]) for f in fields]
    assert in_c == list(struct_fields(STRUCTS[name]))
    assert probe[f"sizeof.{name}"] == STRUCTS[name].size
    assert fields == list(FIELDS[name]._fields)  # type: ignore[attr-defined]


def test_magic() -> None:
    assert f'"{abi.HELLO_MAGIC.decode()}"' in HEADER.read_text()


def test_ctx_add_unpacks_alike_with_secrets_in_place() -> None:
    body = bytearray(range(abi.CTX_ADD.size))
    copied = abi.CtxAdd._make(abi.CTX_ADD.unpack(body))
    viewed = abi.unpack_ctx_add(memoryview(body))
    assert tuple(bytes(v) if isinstance(v, memoryview) else v for v in viewed) == tuple(copied)
    body[:] = bytes(len(body))
    assert not any(viewed.key) and not any(viewed.salt) and not any(viewed.iv)  # noqa: PT018
