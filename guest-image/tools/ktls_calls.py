"""The ways in which a program may send to a TLS socket and receive from it: `how` of the steps "send" and "recv".

A sender takes bytes that start at `sent` of the stream and returns when all are with the kernel; a receiver fills a
buffer and returns when it is full. Both take the Connection of ktls_raw.py and may look at its socket and file.
"""

import errno
import os
import select
import socket
import threading

BLOCK = 512
PIPE = 1 << 16


def _all(connection, data, flags, write):
    """Plain send() in pieces of `write` bytes."""
    for start in range(0, len(data), write):
        piece = data[start : start + write]
        while piece:
            piece = piece[connection.socket.send(piece, flags) :]


def send_plain(connection, data, write):
    _all(connection, data, 0, write)


def send_more(connection, data, write):
    """MSG_MORE on all writes but the last."""
    last = (len(data) - 1) // write * write
    _all(connection, data[:last], socket.MSG_MORE, write)
    _all(connection, data[last:], 0, write)


def send_vector(connection, data, write):
    """One sendmsg() of up to IOV_MAX buffers of `write` bytes each, repeated."""
    step = write * os.sysconf("SC_IOV_MAX")
    while data:
        buffers = [data[start : start + write] for start in range(0, min(len(data), step), write)]
        data = data[connection.socket.sendmsg(buffers) :]


def send_splice(connection, data, write):
    """From a file through a pipe into the socket."""
    offset, left = connection.sent, len(data)
    outlet, inlet = os.pipe()
    try:
        while left:
            held = os.splice(connection.file(), inlet, min(left, write, PIPE), offset_src=offset)
            offset, left = offset + held, left - held
            while held:
                held -= os.splice(outlet, connection.socket.fileno(), held)
    finally:
        os.close(outlet)
        os.close(inlet)


def send_epoll(connection, data, write):
    """Without blocking: as much as it takes, then wait for an edge.

    The kernel takes a record for sent of which a part found no room, and sends the rest when there is room
    (tls_device_write_space); a shutdown before that would cut it off. So do not return before.
    """
    with _edges(connection, select.EPOLLOUT) as wait:
        while data:
            try:
                data = data[connection.socket.send(data[:write]) :]
            except BlockingIOError:
                wait()
    if not select.select([], [connection.socket], [], connection.timeout)[1]:
        raise OSError(errno.ETIMEDOUT, "no room came")


def _shares(data, count, write):
    """`data` in `count` parts, each a list of writes of whole blocks of the stream."""
    if write % BLOCK or len(data) % write:
        raise ValueError("what several send at once are whole blocks")
    pieces = [data[start : start + write] for start in range(0, len(data), write)]
    return [pieces[first::count] for first in range(count)]


def send_threads(connection, data, write, count=4):
    """Several threads at once; blocks arrive in any order."""

    def send(pieces):
        for piece in pieces:
            _all(connection, piece, 0, write)

    threads = [threading.Thread(target=send, args=(share,)) for share in _shares(data, count, write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def send_processes(connection, data, write, count=3):
    """Several processes that share the socket; blocks arrive in any order."""
    children = []
    for share in _shares(data, count, write):
        child = os.fork()
        if not child:
            status = 1
            try:
                for piece in share:
                    _all(connection, piece, 0, write)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    states = [os.waitpid(child, 0)[1] for child in children]
    if any(states):
        raise ChildProcessError(f"the processes that send end with {states}")


def receive_plain(connection, buffer, read):
    while buffer:
        buffer = buffer[connection.take(buffer[:read]) :]


def receive_peek(connection, buffer, read):
    """MSG_PEEK first: it must show what is then read."""
    while buffer:
        shown = bytearray(len(buffer[:read]))
        seen = connection.socket.recv_into(shown, 0, socket.MSG_PEEK)
        got = connection.take(buffer[:read])
        common = min(seen, got)
        if not common or shown[:common] != buffer[:common]:
            raise ValueError("MSG_PEEK showed other bytes than were read")
        buffer = buffer[got:]


def receive_waitall(connection, buffer, read):
    while buffer:
        want = min(read, len(buffer))
        got = connection.take(buffer[:want], socket.MSG_WAITALL)
        if got != want:
            raise ValueError(f"MSG_WAITALL gave {got} bytes of {want}")
        buffer = buffer[got:]


def receive_splice(connection, buffer, read):
    """Out of the socket through a pipe."""
    outlet, inlet = os.pipe()
    try:
        while buffer:
            held = os.splice(connection.socket.fileno(), inlet, min(len(buffer), read, PIPE))
            if not held:
                raise EOFError(f"the peer ended {len(buffer)} bytes early")
            while held:
                got = os.readv(outlet, [buffer[:held]])
                buffer, held = buffer[got:], held - got
    finally:
        os.close(outlet)
        os.close(inlet)


def receive_epoll(connection, buffer, read):
    """Without blocking: until nothing is left, then wait for an edge."""
    with _edges(connection, select.EPOLLIN) as wait:
        while buffer:
            try:
                buffer = buffer[connection.take(buffer[:read]) :]
            except BlockingIOError:
                wait()


class _edges:
    """The socket does not block for the time of a with-block, which gets a function that waits for the next edge."""

    def __init__(self, connection, events):
        self.socket, self.timeout = connection.socket, connection.timeout
        self.epoll = select.epoll()
        self.epoll.register(self.socket, events | select.EPOLLET)

    def __enter__(self):
        os.set_blocking(self.socket.fileno(), False)
        return self.wait

    def wait(self):
        if not self.epoll.poll(self.timeout):
            raise OSError(errno.ETIMEDOUT, "no edge came")

    def __exit__(self, *_):
        os.set_blocking(self.socket.fileno(), True)
        self.epoll.close()


SENDERS = {
    "plain": send_plain,
    "more": send_more,
    "vector": send_vector,
    "splice": send_splice,
    "epoll": send_epoll,
    "threads": send_threads,
    "processes": send_processes,
}
RECEIVERS = {
    "plain": receive_plain,
    "peek": receive_peek,
    "waitall": receive_waitall,
    "splice": receive_splice,
    "epoll": receive_epoll,
}
