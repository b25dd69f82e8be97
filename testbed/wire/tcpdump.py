"""tcpdump where the wire is: python -m testbed.wire.tcpdump ARGUMENTS becomes `tcpdump -Z root ARGUMENTS`.

Distributions build tcpdump so that it gives up root, and even with `-Z root` it sets its supplementary groups and
ends when it may not. In the user namespace of an ordinary user that is always so (user_namespaces(7): setgroups
is denied). There the call is made to succeed without doing anything, by a seccomp filter; nothing is lost, as
there is only one user.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path
from typing import Final

PR_SET_SECCOMP: Final = 22
SECCOMP_MODE_FILTER: Final = 2
SECCOMP_RET_ERRNO: Final = 0x0005_0000  # with error number 0: the call returns success
SECCOMP_RET_ALLOW: Final = 0x7FFF_0000
BPF_LD_W_ABS: Final = 0x20
BPF_JMP_JEQ_K: Final = 0x15
BPF_RET_K: Final = 0x06
SETGROUPS: Final = 116  # x86-64


def _ignore_setgroups() -> None:
    """Install the filter in this process; needs the rights of root in its user namespace. Raises OSError."""
    steps = (
        (BPF_LD_W_ABS, 0, 0, 0),  # the system call's number stands first in struct seccomp_data
        (BPF_JMP_JEQ_K, 0, 1, SETGROUPS),
        (BPF_RET_K, 0, 0, SECCOMP_RET_ERRNO),
        (BPF_RET_K, 0, 0, SECCOMP_RET_ALLOW),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main() -> None:
    """Become tcpdump."""
    if Path("/proc/self/setgroups").read_text().strip() == "deny":
        _ignore_setgroups()
    try:
        os.execvp("tcpdump", ["tcpdump", "-Z", "root", *sys.argv[1:]])
    except FileNotFoundError:
        sys.exit("tcpdump is not installed")


if __name__ == "__main__":
    main()
