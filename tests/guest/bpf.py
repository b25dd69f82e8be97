"""Small BPF programs for the guest, which has no compiler: assembled here, loaded there by bpf(2), pinned to a path."""

from __future__ import annotations

import struct
from typing import Final

from testbed.bed import Bed

SCHED_CLS, XDP = 3, 6  # enum bpf_prog_type
FOLDER: Final = "/sys/fs/bpf"
# bpf(2): command 5 loads, 6 pins; union bpf_attr
LOAD: Final = """
import ctypes, os, struct, sys
kind, path, program = int(sys.argv[1]), sys.argv[2].encode(), bytes.fromhex(sys.argv[3])
libc = ctypes.CDLL(None, use_errno=True)
def bpf(command, attributes):
    made = libc.syscall(321, command, ctypes.c_char_p(attributes), len(attributes))
    if made < 0:
        sys.exit(os.strerror(ctypes.get_errno()))
    return made
code, name, text = (ctypes.create_string_buffer(t) for t in (program, b"GPL", path))
load = struct.pack("<IIQQ", kind, len(program) // 8, ctypes.addressof(code), ctypes.addressof(name))
prog = bpf(5, load.ljust(48, b"\\0"))
bpf(6, struct.pack("<QI", ctypes.addressof(text), prog).ljust(16, b"\\0"))
"""


def op(code: int, registers: int, offset: int, immediate: int) -> bytes:
    """One instruction; `registers` is source << 4 | destination."""
    return struct.pack("<BBhi", code, registers, offset, immediate)


def load(bed: Bed, kind: int, *program: bytes, name: str) -> str:
    """Load a program and return the path it is pinned to; to be removed by whoever asked for it."""
    path = f"{FOLDER}/{name}"
    bed.agent.run(["sh", "-c", f"mountpoint -q {FOLDER} || mount -t bpf bpf {FOLDER}"])
    bed.agent.run(["python3", "-c", LOAD, str(kind), path, b"".join(program).hex()])
    return path
