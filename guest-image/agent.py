#!/usr/bin/env python3
"""The test bed's hands inside the guest: run programs, move files, over one byte stream to the host.

Every frame is `id u32, kind u8, length u32` in network order and then `length` bytes. The host opens a request with a
fresh id; all frames of that request, both ways, carry it, so any number of requests run at once. Requests:

    PING    {}                                  -> HELLO {json}
    SPAWN   {argv, env, cwd, pty, rows, cols}   -> OUT*, ERR*, then EXIT or FAIL; DATA feeds stdin, empty closes it
    PUT     {path, mode}                        -> DATA* carry the content, an empty one ends it; then EXIT or FAIL
    GET     {path}                              -> OUT*, then EXIT or FAIL
    SIGNAL  one byte, WINDOW two u16            to the running SPAWN of that id; no reply

EXIT carries the exit status as decimal text, negative for a signal. One thread, one selector, standard library only.
The other side is testbed/vm/agent.py, which repeats the frame constants; a unit test joins the two over a socket pair.
"""

import contextlib
import fcntl
import glob
import json
import os
import selectors
import signal
import struct
import subprocess
import sys
import termios

HEADER = struct.Struct("!IBI")
PING, SPAWN, PUT, GET, DATA, SIGNAL, WINDOW = 1, 2, 3, 4, 5, 6, 7
OUT, ERR, EXIT, FAIL, HELLO = 16, 17, 18, 19, 20
CHUNK = 65536
PORT_NAME = "tlsnic.agent"


class Link:
    """The stream to the host. The host reads at all times, so writing may block without risk of a deadlock."""

    def __init__(self, fd):
        self.fd = fd
        self.inbox = bytearray()

    def send(self, request, kind, data=b""):
        frame = memoryview(HEADER.pack(request, kind, len(data)) + data)
        while frame:
            frame = frame[os.write(self.fd, frame) :]

    def frames(self):
        """Yield what has arrived; EOFError when the host has gone."""
        data = os.read(self.fd, 4 * CHUNK)
        if not data:
            raise EOFError
        self.inbox += data
        while len(self.inbox) >= HEADER.size:
            request, kind, length = HEADER.unpack_from(self.inbox)
            if len(self.inbox) < HEADER.size + length:
                return
            payload = bytes(self.inbox[HEADER.size : HEADER.size + length])
            del self.inbox[: HEADER.size + length]
            yield request, kind, payload


class Program:
    """One SPAWN: the process, the pipes or the terminal it talks through, and its end (a pidfd)."""

    def __init__(self, agent, request, argv, env=None, cwd=None, pty=False, rows=24, cols=80):  # noqa: PLR0917
        self.agent, self.request = agent, request
        self.backlog = bytearray()
        self.input_ended = False
        if pty:
            output, child = os.openpty()
            self.input = os.dup(output)  # a selector takes each descriptor once
            self.outputs = {output: OUT}
            theirs = [child]
        else:
            theirs_in, self.input = os.pipe()
            (out, theirs_out), (err, theirs_err) = os.pipe(), os.pipe()
            self.outputs = {out: OUT, err: ERR}
            theirs = [theirs_in, theirs_out, theirs_err]
        try:
            if pty:
                self.resize(rows, cols)
            self.process = subprocess.Popen(
                ["setsid", "--ctty", "--wait", *argv] if pty else argv,
                stdin=theirs[0],
                stdout=theirs[pty - 2],
                stderr=theirs[-1],
                env={**os.environ, **(env or {})},
                cwd=cwd,
                start_new_session=True,
            )
        except BaseException:
            for fd in (self.input, *self.outputs):
                os.close(fd)
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        os.set_blocking(self.input, False)
        for fd, kind in self.outputs.items():
            os.set_blocking(fd, False)
            agent.watch(fd, selectors.EVENT_READ, lambda fd=fd, kind=kind: self.on_output(fd, kind))
        self.pidfd = os.pidfd_open(self.process.pid)
        agent.watch(self.pidfd, selectors.EVENT_READ, self.on_exit)

    def resize(self, rows, cols):
        fcntl.ioctl(self.input, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def on_output(self, fd, kind):
        """Pass on one piece; True when there may be more."""
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return False
        except OSError:  # a terminal whose last user has gone says EIO
            data = b""
        if data:
            self.agent.link.send(self.request, kind, data)
            return True
        self.agent.forget(fd)
        del self.outputs[fd]
        return False

    def feed(self, data):
        self.backlog += data
        self.input_ended = self.input_ended or not data
        if self.input >= 0:
            self.on_input_ready()

    def on_input_ready(self):
        try:
            while self.backlog:
                del self.backlog[: os.write(self.input, self.backlog[:CHUNK])]
        except BlockingIOError:
            self.agent.watch(self.input, selectors.EVENT_WRITE, self.on_input_ready)
            return
        except OSError:  # the program does not read any more; its exit status tells the rest
            self.input_ended = True
        if self.input_ended:
            self.agent.forget(self.input)
            self.input = -1
        else:
            self.agent.unwatch(self.input)

    def on_exit(self):
        """Report the end; a daemon left behind that still holds the pipes does not delay it."""
        for fd, kind in list(self.outputs.items()):
            while self.on_output(fd, kind):
                pass
        status = self.process.wait()
        for fd in (self.pidfd, *self.outputs, *([self.input] if self.input >= 0 else [])):
            self.agent.forget(fd)
        del self.agent.programs[self.request]
        self.agent.link.send(self.request, EXIT, str(status).encode())

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Upload:
    """One PUT: written beside its place and renamed, so nobody sees half a file."""

    def __init__(self, agent, request, path, mode):
        self.agent, self.request, self.path, self.mode = agent, request, path, mode
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        self.file = open(f"{path}.{request}.part", "wb")  # noqa: SIM115 - closed by the frame that ends it

    def feed(self, data):
        if data:
            self.file.write(data)
            return
        del self.agent.programs[self.request]
        self.file.close()
        os.chmod(self.file.name, self.mode)
        os.rename(self.file.name, self.path)
        self.agent.link.send(self.request, EXIT, b"0")


class Agent:
    """Dispatch: frames to requests, ready descriptors to the programs they belong to."""

    def __init__(self, fd):
        self.link = Link(fd)
        self.selector = selectors.DefaultSelector()
        self.programs = {}
        self.watch(fd, selectors.EVENT_READ, self.on_frames)

    def watch(self, fd, events, callback):
        """Call `callback()` whenever `fd` is ready."""
        if fd not in self.selector.get_map():
            self.selector.register(fd, events, callback)

    def unwatch(self, fd):
        if fd in self.selector.get_map():
            self.selector.unregister(fd)

    def forget(self, fd):
        self.unwatch(fd)
        os.close(fd)

    def handle(self, request, kind, payload):
        running = self.programs.get(request)
        if kind == PING:
            about = {"kernel": os.uname().release, "driver": os.environ.get("TLSNIC_DRIVER", "")}
            about["driver_error"] = os.environ.get("TLSNIC_DRIVER_ERROR", "")
            self.link.send(request, HELLO, json.dumps(about).encode())
        elif kind == SPAWN:
            self.programs[request] = Program(self, request, **json.loads(payload))
        elif kind == PUT:
            self.programs[request] = Upload(self, request, **json.loads(payload))
        elif kind == GET:
            with open(json.loads(payload)["path"], "rb") as file:
                while chunk := file.read(CHUNK):
                    self.link.send(request, OUT, chunk)
            self.link.send(request, EXIT, b"0")
        elif running is None:
            return  # it ended while this was on its way
        elif kind == DATA:
            running.feed(payload)
        elif kind == SIGNAL:
            running.signal(payload[0])
        elif kind == WINDOW:
            running.resize(*struct.unpack("!HH", payload))

    def on_frames(self):
        for request, kind, payload in self.link.frames():
            try:
                self.handle(request, kind, payload)
            except (OSError, ValueError, TypeError, KeyError) as error:
                self.programs.pop(request, None)
                self.link.send(request, FAIL, str(error).encode())

    def serve(self):
        """Until the host goes away; then nothing that was started is left running."""
        try:
            while True:
                for key, _ in self.selector.select():
                    if self.selector.get_map().get(key.fd) is key:  # an earlier callback may have closed it
                        key.data()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            for running in self.programs.values():
                if isinstance(running, Program):
                    running.signal(signal.SIGKILL)


def open_port():
    """The virtio-serial port of ours; there is no udev to link its name."""
    for path in glob.glob("/sys/class/virtio-ports/*/name"):
        with open(path) as file:
            if file.read().strip() == PORT_NAME:
                return os.open("/dev/" + path.split("/")[-2], os.O_RDWR)
    sys.exit(f"no virtio port is named {PORT_NAME}")


if __name__ == "__main__":
    Agent(int(sys.argv[1]) if len(sys.argv) > 1 else open_port()).serve()
