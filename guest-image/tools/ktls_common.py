"""What the guest's traffic tools share: the byte stream they send, the kernel's TLS counters, one JSON line of
result.

Standard library only. testbed/peers/stream.py makes the same stream on the host; a test compares the two.
"""

import array
import errno
import hashlib
import json
import sys

BLOCK = 512


def stream(seed, size):
    """`size` bytes in blocks of 512: their number (8 bytes, big-endian) and a random rest that `seed` chooses."""
    blocks = -(-size // BLOCK)
    data = bytearray(hashlib.shake_128(f"tlsnic stream {seed}".encode()).digest(BLOCK) * blocks)
    numbers = array.array("Q", range(blocks))
    if sys.byteorder == "little":
        numbers.byteswap()
    packed = numbers.tobytes()
    for place in range(8):  # all numbers at once, byte by byte: the guest's processor may be an emulated one
        data[place::BLOCK] = packed[place::8]
    del data[size:]
    return data


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def tls_stat():
    """/proc/net/tls_stat as a dictionary; empty when the kernel has no TLS."""
    try:
        with open("/proc/net/tls_stat") as file:
            return {name: int(value) for name, value in map(str.split, file)}
    except FileNotFoundError:
        return {}


def tls_stat_report(before):
    """Counters then and now, and what changed between."""
    after = tls_stat()
    delta = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    return {"before": before, "after": after, "delta": delta}


def error_name(error):
    """EBADMSG and the like."""
    return errno.errorcode.get(error.errno, str(error.errno))


def explain(error):
    """An OSError as something a test can compare."""
    if isinstance(error, OSError):
        return {"errno": error_name(error), "message": str(error)}
    return {"errno": None, "message": f"{type(error).__name__}: {error}"}


def say(message):
    """One line of JSON, at once."""
    print(json.dumps(message), flush=True)
