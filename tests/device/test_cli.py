"""The NIC's command line: every mistake is one clear line and a nonzero status, and nothing stays behind.

The NIC is run as people run it, as a program. What a machine may lack is taken away in namespaces of the test's own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from nicdev import __version__

PROGRAM = [sys.executable, "-m", "nicdev.cli"]
DEADLINE = 20
NAME_RULE = "no spaces and none of / : %, at most 15 characters"
TAP = "tap:address=198.51.100.1/24,address=2001:db8:1::1/64"
# A user namespace in which nobody has an id of his own, and a network namespace of it.
AS_NOBODY = ["unshare", "--user", "--keep-caps", "--net", "--mount", "--"]
AS_ROOT = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--"]
needs_netns = pytest.mark.needs_netns


def shell(script: str, around: Sequence[str]) -> list[str]:
    """The NIC, to be started with arguments, behind a shell script in the namespaces of `around`."""
    return [*around, "sh", "-ec", f'{script}; exec "$@"', "sh", *PROGRAM]


def refused(*arguments: str | Path, program: Sequence[str] = PROGRAM, pass_fds: Sequence[int] = ()) -> str:
    """The one line of a NIC that does not start."""
    done = subprocess.run(
        [*program, *map(str, arguments)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE, check=False, pass_fds=pass_fds,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("vhost-user-tlsnic: ")
    return line.removeprefix("vhost-user-tlsnic: ")


@contextmanager
def serving(*arguments: str | Path, program: Sequence[str] = PROGRAM) -> Iterator[subprocess.Popen[str]]:
    """A NIC that has started; killed at the end if it still runs."""
    argv = [*program, *map(str, arguments)]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as nic:
        try:
            assert nic.stderr is not None
            first = nic.stderr.readline()
            assert first.startswith("tlsnic: serving "), first + nic.stderr.read()
            yield nic
        finally:
            nic.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "nic"


def starts(path: Path) -> None:
    """The next run works, and its end leaves nothing."""
    with serving("--socket-path", path, "--port", "null") as nic:
        nic.terminate()
        assert nic.wait(DEADLINE) == 0
    assert not path.exists()


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("port", "line"),
    [
        ("ethernet", "unknown port 'ethernet': use one of tap, pair, null"),
        ("", "unknown port '': use one of tap, pair, null"),
        ("tap:colour=red", "bad port option 'colour=red': tap takes name=, netns=, address=, mtu=; others take none"),
        ("tap:name=", "bad port option 'name=': tap takes name=, netns=, address=, mtu=; others take none"),
        ("null:name=x", "bad port option 'name=x': tap takes name=, netns=, address=, mtu=; others take none"),
        ("tap:mtu=1", "bad mtu '1': use 68 to 65535 bytes"),
        ("tap:mtu=65536", "bad mtu '65536': use 68 to 65535 bytes"),
        ("tap:mtu=²", "bad mtu '²': use 68 to 65535 bytes"),
        ("tap:address=1.2.3.4/33", "bad address '1.2.3.4/33': use one like 198.51.100.1/24 or 2001:db8::1/64"),
        ("tap:address=here", "bad address 'here': use one like 198.51.100.1/24 or 2001:db8::1/64"),
        ("tap:name=16-characters---", f"bad name '16-characters---': {NAME_RULE}"),
        ("tap:name=tap%d", f"bad name 'tap%d': {NAME_RULE}"),
        ("tap:name=..", f"bad name '..': {NAME_RULE}"),
        ("tap:netns=../../tmp/x", "bad netns '../../tmp/x': no spaces and none of / : %"),
    ],
)  # fmt: skip
def test_bad_port(path: Path, port: str, line: str) -> None:
    assert refused("--socket-path", path, "--port", port) == line
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "give either --socket-path or --fd"),
        (["--socket-path", "/a", "--fd", "3"], "give either --socket-path or --fd"),
        (["--socket-path", "/a", "--port", "pair"], "--port pair needs 2 --socket-path"),
        (["--fd", "0", "--port", "pair"], "--port pair needs 2 --socket-path"),
        (["--socket-path", "/a", "--socket-path", "/b"], "--port tap needs 1 --socket-path"),
        (["--socket-path", "/a", "--queues", "0"], "--queues takes 1 to 64"),
        (["--socket-path", "/a", "--queues", "65"], "--queues takes 1 to 64"),
        (["--socket-path", "/a", "--queues", "many"], "argument --queues: invalid int value: 'many'"),
        (["--socket-path", "/a", "--max-contexts", "-1"], "--max-contexts takes 0 to 16777216"),
        (["--socket-path", "/a", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["--socket-path"], "argument --socket-path/-s: expected one argument"),
    ],
)
def test_bad_arguments(arguments: list[str], line: str) -> None:
    assert refused(*arguments) == line


def test_capabilities_are_json_whatever_else_is_given() -> None:
    """QEMU's backend program conventions: print, exit 0, ignore other options, do no work."""
    for others in ([], ["--port", "ethernet"], ["--socket-path", "/nowhere/nic", "--nonsense"]):
        for argv in ([*others, "--print-capabilities"], ["--print-capabilities", *others]):
            done = subprocess.run([*PROGRAM, *argv], capture_output=True, text=True, timeout=DEADLINE, check=False)
            assert (done.returncode, done.stderr) == (0, "")
            assert json.loads(done.stdout) == {"type": "net", "features": ["tls-offload"]}


@pytest.mark.parametrize(
    ("option", "said"), [("--version", f"vhost-user-tlsnic {__version__}\n"), ("--help", "usage:")]
)
def test_version_and_help_need_nothing(option: str, said: str) -> None:
    done = subprocess.run([*PROGRAM, option], capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(said)


# -- sockets and files -------------------------------------------------------------------------------------------------


def test_a_socket_path_in_use_stays_with_its_owner(path: Path) -> None:
    with serving("--socket-path", path, "--port", "null") as first:
        assert refused("--socket-path", path, "--port", "null") == f"socket path is in use by another process: {path}"
        assert path.is_socket()
        assert first.poll() is None
    starts(path)  # it was killed and left its file: replaced


def test_no_other_file_is_replaced(path: Path) -> None:
    path.write_text("mine")
    tries: tuple[list[str | Path], ...] = (
        ["--socket-path", path],
        ["--socket-path", f"{path}.socket", "--control", path],
    )
    for arguments in tries:
        assert refused(*arguments, "--port", "null") == f"socket path exists and is not a socket: {path}"
    assert path.read_text() == "mine"
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_a_control_path_in_use_stays_with_its_owner(path: Path) -> None:
    control = path.with_name("control")
    with serving("--socket-path", path, "--port", "null", "--control", control):
        other = path.with_name("other")
        line = refused("--socket-path", other, "--port", "null", "--control", control)
        assert line == f"socket path is in use by another process: {control}"
        assert not other.exists()
        assert stat.S_IMODE(control.stat().st_mode) == 0o600


@pytest.mark.parametrize("option", ["--socket-path", "--control"])
@pytest.mark.parametrize(
    ("made", "line"),
    [
        (lambda folder: folder / ("x" * 108), "socket path of {length} bytes, the limit is 107: {path}"),
        (lambda folder: folder / "nowhere" / "nic", "cannot listen at {path}: No such file or directory"),
        (lambda folder: Path("/proc/nic"), "cannot listen at {path}: No such file or directory"),
        (lambda folder: folder, "socket path exists and is not a socket: {path}"),
    ],
)
def test_a_path_that_cannot_be(tmp_path: Path, option: str, made: Callable[[Path], Path], line: str) -> None:
    path = made(tmp_path)
    rest: list[str | Path] = ["--socket-path", tmp_path / "nic"] if option == "--control" else []
    assert refused(option, path, *rest, "--port", "null") == line.format(path=path, length=len(os.fsencode(path)))
    assert list(tmp_path.iterdir()) == []


@needs_netns
def test_a_folder_that_may_not_be_written(path: Path) -> None:
    program = shell(f"mount -t tmpfs -o ro none {path.parent}", AS_ROOT)
    for option, words in (("--socket-path", "cannot listen at"), ("--capture", "cannot write capture file")):
        rest = [] if option == "--socket-path" else ["--socket-path", "/nowhere/nic"]
        line = refused(option, path, *rest, "--port", "null", program=program)
        assert line == f"{words} {path}: Read-only file system"


def test_a_capture_that_cannot_be_written(path: Path) -> None:
    line = refused("--socket-path", path, "--port", "null", "--capture", path.parent)
    assert line == f"cannot write capture file {path.parent}: Is a directory"
    assert not path.exists()


def test_an_fd_that_is_no_socket() -> None:
    with open("/dev/null") as null, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        fds = [null.fileno(), udp.fileno()]
        line = refused("--fd", str(fds[0]), "--port", "null", pass_fds=fds)
        assert line == f"--fd {fds[0]} is not a socket: Socket operation on non-socket"
        assert (
            refused("--fd", str(fds[1]), "--port", "null", pass_fds=fds) == f"--fd {fds[1]} is not a unix stream socket"
        )
    assert refused("--fd", "97", "--port", "null") == "--fd 97 is not a socket: Bad file descriptor"
    assert refused("--fd", "-1", "--port", "null") == "--fd -1 is not a descriptor"


def test_an_inherited_socket_is_served_until_its_peer_goes(path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        argv = [*PROGRAM, "--fd", str(theirs.fileno()), "--port", "null"]
        with subprocess.Popen(argv, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE) as nic:
            theirs.close()
            ours.close()
            assert nic.wait(DEADLINE) == 0
            assert nic.stderr is not None
            assert b"front end disconnected" in nic.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(path: Path, number: int) -> None:
    control = path.with_name("control")
    with serving("--socket-path", path, "--port", "null", "--control", control) as nic:
        with socket.socket(socket.AF_UNIX) as front_end:
            front_end.connect(str(path))
            nic.send_signal(number)
            assert nic.wait(DEADLINE) == 0
        assert nic.stderr is not None
        assert "Traceback" not in nic.stderr.read()
    assert list(path.parent.iterdir()) == []


# -- what the machine lacks --------------------------------------------------------------------------------------------

HIDE_TUN = "mount -t tmpfs none /dev/net"
LOCKED_TUN = f"{HIDE_TUN}; install -m 0 /dev/null /dev/net/tun"
# root of the namespace, but without the right to open what its mode forbids
WITHOUT_OVERRIDE = [*AS_ROOT, "setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--"]


@needs_netns
def test_no_tun_device(path: Path) -> None:
    line = refused("--socket-path", path, "--port", TAP, program=shell(HIDE_TUN, AS_ROOT))
    assert line == "/dev/net/tun is missing: load the tun module (modprobe tun)"
    assert not path.exists()


@needs_netns
def test_a_locked_tun_device(path: Path) -> None:
    program = [*AS_ROOT, "sh", "-ec", f'{LOCKED_TUN}; exec "$@"', "sh", *WITHOUT_OVERRIDE[len(AS_ROOT) :], *PROGRAM]
    line = refused("--socket-path", path, "--port", TAP, program=program)
    assert line == "/dev/net/tun is not accessible: run as root, or once: sudo chmod 0666 /dev/net/tun"


@needs_netns
def test_user_namespaces_are_forbidden(path: Path) -> None:
    """Of an ordinary user, in a user namespace that allows no other below."""
    program = shell("echo 0 >/proc/sys/user/max_user_namespaces", AS_NOBODY)
    line = refused("--socket-path", path, "--port", TAP, program=program)
    cure = "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1) or run as root"
    assert line == f"cannot make a network namespace: No space left on device; {cure}"


@needs_netns
def test_no_more_network_namespaces(path: Path) -> None:
    program = shell("echo 0 >/proc/sys/user/max_net_namespaces", AS_ROOT)
    line = refused("--socket-path", path, "--port", TAP, program=program)
    assert line == "cannot make a network namespace: No space left on device; run as root"
