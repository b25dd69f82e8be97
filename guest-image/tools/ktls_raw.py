#!/usr/bin/env python3
"""Real kTLS sockets by raw setsockopt, with fixed keys and no handshake: ktls_raw.py JOB

JOB is JSON, or `-` to read it from the first line of stdin. A job is one connection, or a list under "connections"
whose members override it; all connections run at once, each in a thread. The last line printed is the result.

    connect: [host, port]   or   listen: [host, port] (port 0: any; announced as {"event": "listening", ...})
    family: "4" (default), "6", or "mapped" (an IPv6 socket; give host as ::ffff:a.b.c.d)
    cipher: "aes-128-gcm" or "aes-256-gcm"
    keys: {"tx": {"key": hex, "salt": hex, "iv": hex, "rec_seq": number}, "rx": {...}}; a missing direction stays clear
    seed: names the byte stream that is sent (default "")
    timeout: seconds until a blocked call fails with EAGAIN (default 60)
    ss: false to do without asking `ss` how the socket is offloaded
    options: {"TCP_MAXSEG": 536, "SO_SNDBUF": 65536, ...} set before connecting
    first_seq: TCP's sequence number of the SYN, if it is this side that connects
    steps: a list of
        {"do": "install", "dirs": ["tx", "rx"]}     switch these to TLS, in this order; without such a step, done first
                                                    for every key given
        {"do": "send", "size": n, "write": n, "more": bool, "how": ...}    "more": MSG_MORE on all writes but the last;
                                                    "how": see SENDERS of ktls_calls.py
        {"do": "sendfile", "size": n, "write": n}  the same stream, out of a file
        {"do": "overwrite", "at": n, "data": hex}, {"do": "restore", "at": n, "size": n}    change that file
        {"do": "refused", "flags": n, "errno": name}    sending a byte with these MSG_... must fail so
        {"do": "record", "kind": n, "data": hex}    one control record
        {"do": "recv", "size": n, "read": n, "how": ...}    application data; control records on the way are noted;
                                                    "how": see RECEIVERS of ktls_calls.py
        {"do": "recv_aside", "size": n}             the same, while the next steps are done; until the last of them
        {"do": "recv_record"}                       wait for one control record
        {"do": "send_clear", "data": hex}, {"do": "recv_clear", "size": n}    before "install"; not counted
        {"do": "eof"}                               the peer must end without more data
        {"do": "shutdown"}                          no more to send
        {"do": "close"}, {"do": "reset"}
        {"do": "wait"}  all connections meet here: {"event": "waiting"}; go on after a line on stdin
        {"do": "refused_option", "name": ..., "value": n, "errno": name}
        {"do": "option", "name": ..., "value": n}   as under "options"; also those of TLS_OPTIONS

"tx" is what this program sends, "rx" what it receives. `seconds` runs from the end of the set-up to the last step.
"""

import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time

from ktls_calls import RECEIVERS, SENDERS
from ktls_common import error_name, explain, say, sha256, stream, tls_stat, tls_stat_report

# include/uapi/linux/tls.h and tcp.h
SOL_TLS = 282
TCP_ULP = 31
DIRECTIONS = {"tx": 1, "rx": 2}
TLS_OPTIONS = {  # number, type of the value
    "TLS_TX_ZEROCOPY_RO": (3, "=I"),
    "TLS_RX_EXPECT_NO_PAD": (4, "=I"),
    "TLS_TX_MAX_PAYLOAD_LEN": (5, "=H"),  # Linux 7.2
}
TLS_SET_RECORD_TYPE, TLS_GET_RECORD_TYPE = 1, 2
TLS_1_2_VERSION = 0x0303
APPLICATION_DATA = 23
CIPHERS = {"aes-128-gcm": (51, 16), "aes-256-gcm": (52, 32)}

# include/uapi/linux/tcp.h
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_SEND_QUEUE = 19, 20, 21, 2

FAMILIES = {"4": socket.AF_INET, "6": socket.AF_INET6, "mapped": socket.AF_INET6}
CONTROL_SPACE = socket.CMSG_SPACE(1)


def crypto_info(cipher, key, salt, iv, rec_seq):
    """struct tls12_crypto_info_aes_gcm_128 or _256; version and cipher in host byte order."""
    number, key_size = CIPHERS[cipher]
    key, salt, iv = bytes.fromhex(key), bytes.fromhex(salt), bytes.fromhex(iv)
    if (len(key), len(salt), len(iv)) != (key_size, 4, 8):
        raise ValueError(f"{cipher} wants a key of {key_size} bytes, a salt of 4 and an iv of 8")
    return struct.pack("=HH", TLS_1_2_VERSION, number) + iv + key + salt + struct.pack(">Q", rec_seq)


def set_option(sock, name, value):
    if name in TLS_OPTIONS:
        number, form = TLS_OPTIONS[name]
        sock.setsockopt(SOL_TLS, number, struct.pack(form, value))
    else:
        sock.setsockopt(
            socket.IPPROTO_TCP if name.startswith("TCP_") else socket.SOL_SOCKET, getattr(socket, name), value
        )


def set_first_seq(sock, number):
    """Only a socket under repair may be told (tcp_setsockopt); it may not stay so, or it connects without a word."""
    steps = ((TCP_REPAIR, 1), (TCP_REPAIR_QUEUE, TCP_SEND_QUEUE), (TCP_QUEUE_SEQ, number), (TCP_REPAIR, 0))
    for option, value in steps:
        sock.setsockopt(socket.IPPROTO_TCP, option, struct.pack("=I", value))


def refused(errno, call):
    """The call must fail with this error."""
    try:
        call()
    except OSError as error:
        if error_name(error) == errno:
            return
        raise
    raise ValueError(f"the kernel does not say {errno}")


class Connection:
    """One socket and its steps. What is sent is made, and what is received is hashed, outside the measured time."""

    def __init__(self, index, job, meeting):
        self.index, self.job, self.meeting = index, job, meeting
        self.steps = list(job.get("steps", []))
        if not any(step["do"] == "install" for step in self.steps):
            self.steps.insert(0, {"do": "install", "dirs": list(job.get("keys", {}))})

        def total(*verbs):
            return sum(step["size"] for step in self.steps if step["do"] in verbs)

        self.outgoing = memoryview(stream(job.get("seed", ""), total("send", "sendfile")))
        self.incoming = memoryview(bytearray(total("recv", "recv_aside")))
        self.timeout = float(job.get("timeout", 60))
        self.sent = self.received = 0
        self.source = None  # the stream as a file, once somebody wants it
        self.aside = None  # receives while other steps are done
        self.installed = False
        self.result = {"ok": False, "records": []}

    def open(self):
        job = self.job
        sock = socket.socket(FAMILIES[job.get("family", "4")], socket.SOCK_STREAM)
        # Kernel timeouts rather than settimeout(), which would make the socket non-blocking.
        limit = struct.pack("@ll", int(self.timeout), 0)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, limit)
        for name, value in job.get("options", {}).items():
            set_option(sock, name, value)
        if "first_seq" in job:
            set_first_seq(sock, job["first_seq"])
        if "connect" in job:
            sock.connect(tuple(job["connect"]))
            return sock
        with sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(tuple(job["listen"]))
            sock.listen(1)
            say({"event": "listening", "connection": self.index, "port": sock.getsockname()[1]})
            accepted, _ = sock.accept()
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            accepted.setsockopt(socket.SOL_SOCKET, option, limit)
        return accepted

    def run(self):
        """All steps; the outcome is in `result`. Never raises: a test reads JSON, not tracebacks."""
        result, number = self.result, None
        began = time.monotonic()
        try:
            with self.open() as self.socket:
                result["local"], result["remote"] = self.socket.getsockname()[:2], self.socket.getpeername()[:2]
                began = time.monotonic()
                for number, step in enumerate(self.steps):  # noqa: B007 - read by the handler below
                    arguments = {name: value for name, value in step.items() if name != "do"}
                    getattr(self, "do_" + step["do"])(**arguments)
                    if step["do"] == "install":
                        began = time.monotonic()
                self.join()
                result["seconds"] = time.monotonic() - began
            result["ok"] = True
        except Exception as error:  # noqa: BLE001 - whatever it is, the result line tells it
            result["seconds"] = time.monotonic() - began
            result["error"] = {"step": number, **explain(error)}
            self.meeting.abort()
        result.update(sent=self.sent, received=self.received)
        result.update(
            sha256_sent=sha256(self.outgoing[: self.sent]), sha256_received=sha256(self.incoming[: self.received])
        )

    def do_install(self, dirs):
        if not dirs:
            return
        if not self.installed:
            self.socket.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
        for direction in dirs:
            info = crypto_info(self.job["cipher"], **self.job["keys"][direction])
            self.socket.setsockopt(SOL_TLS, DIRECTIONS[direction], info)
            self.installed = True
        if self.job.get("ss", True):
            self.result.update(self.offload())

    def offload(self):
        """{"txconf": "hw", "rxconf": "sw"} as `ss` says of this socket, which it finds by its two ports."""
        ports = tuple(str(name()[1]) for name in (self.socket.getsockname, self.socket.getpeername))
        listing = subprocess.run(["ss", "-OHtin"], capture_output=True, text=True, check=False).stdout
        for line in listing.splitlines():
            words = line.split()
            if tuple(word.rpartition(":")[2] for word in words[3:5]) == ports:
                return dict(re.findall(r"([rt]xconf): *(\S+)", line))
        return {}

    def do_send(self, size, write=1 << 20, more=False, how="plain"):
        sender = SENDERS["more" if more else how]
        sender(self, self.outgoing[self.sent : self.sent + size], write)
        self.sent += size

    def file(self):
        """A descriptor of the stream as a file."""
        if self.source is None:
            self.source = os.memfd_create("stream")
            os.write(self.source, self.outgoing)
        return self.source

    def do_sendfile(self, size, write=1 << 20):
        end = self.sent + size
        while self.sent < end:
            self.sent += os.sendfile(self.socket.fileno(), self.file(), self.sent, min(write, end - self.sent))

    def do_overwrite(self, at, data):
        os.pwrite(self.file(), bytes.fromhex(data), at)

    def do_restore(self, at, size):
        os.pwrite(self.file(), self.outgoing[at : at + size], at)

    def do_refused(self, flags, errno):
        refused(errno, lambda: self.socket.send(b"x", flags))

    def do_refused_option(self, name, value, errno):
        refused(errno, lambda: set_option(self.socket, name, value))

    def do_record(self, kind, data):
        self.socket.sendmsg([bytes.fromhex(data)], [(SOL_TLS, TLS_SET_RECORD_TYPE, bytes([kind]))])

    def receive(self, buffer, flags=0):
        """One call: (record type, bytes read). A clear socket has no record types and counts as application data."""
        size, control, _, _ = self.socket.recvmsg_into([buffer], CONTROL_SPACE, flags)
        for level, name, value in control:
            if (level, name) == (SOL_TLS, TLS_GET_RECORD_TYPE) and value[0] != APPLICATION_DATA:
                self.result["records"].append({"kind": value[0], "data": bytes(buffer[:size]).hex()})
                return value[0], size
        return APPLICATION_DATA, size

    def take(self, buffer, flags=0):
        """Application data of one call into `buffer`; control records on the way are noted."""
        while True:
            kind, got = self.receive(buffer, flags)
            if kind == APPLICATION_DATA:
                if got == 0:
                    raise EOFError(f"the peer ended {len(buffer)} bytes early")
                self.received += got
                return got

    def do_recv(self, size, read=1 << 30, how="plain"):
        end = self.received + size
        RECEIVERS[how](self, self.incoming[self.received : end], read)
        self.received = end

    def do_recv_aside(self, size):
        def receive():
            try:
                self.do_recv(size)
            except Exception as error:  # noqa: BLE001 - told by `join`
                failed.append(error)

        failed = []
        thread = threading.Thread(target=receive)
        self.aside = thread, failed
        thread.start()

    def join(self):
        """Until what is received aside has come."""
        if self.aside is not None:
            thread, failed = self.aside
            thread.join()
            if failed:
                raise failed[0]

    def do_recv_record(self):
        kind, size = self.receive(memoryview(bytearray(1 << 14)))
        if kind == APPLICATION_DATA:
            raise ValueError(f"{size} bytes of application data instead of a control record")

    def do_send_clear(self, data):
        self.socket.sendall(bytes.fromhex(data))

    def do_recv_clear(self, size):
        if len(self.socket.recv(size, socket.MSG_WAITALL)) < size:
            raise EOFError("the peer ended early")

    def do_eof(self):
        while True:
            kind, size = self.receive(memoryview(bytearray(1 << 14)))
            if kind == APPLICATION_DATA:
                break
        if size:
            raise ValueError(f"at least {size} bytes more than expected")

    def do_shutdown(self):
        self.socket.shutdown(socket.SHUT_WR)

    def do_close(self):
        self.socket.close()

    def do_reset(self):
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def do_wait(self):
        self.meeting.wait()

    def do_option(self, name, value):
        set_option(self.socket, name, value)


def hold():
    """All connections have met: say so, and go on when told."""
    say({"event": "waiting"})
    sys.stdin.readline()


def main():
    text = sys.argv[1] if len(sys.argv) == 2 else "-"
    try:
        job = json.loads(sys.stdin.readline() if text == "-" else text)
        members = job.pop("connections", [{}])
        meeting = threading.Barrier(len(members), hold)
        connections = [Connection(i, {**job, **member}, meeting) for i, member in enumerate(members)]
    except (ValueError, KeyError, TypeError) as error:
        say({"ok": False, "error": explain(error)})
        return 2
    before = tls_stat()
    threads = [threading.Thread(target=connection.run) for connection in connections]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = [connection.result for connection in connections]
    ok = all(result["ok"] for result in results)
    say({"ok": ok, "connections": results, "tls_stat": tls_stat_report(before)})
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
