"""`vhost-user-tlsnic`: arguments to one frozen Config, to objects, to the loop.

Follows QEMU's backend program conventions (docs/interop/vhost-user.rst): stays in the foreground, one line on stderr
and a nonzero status when it cannot start, ends quickly and cleanly on SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import secrets
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_interface
from pathlib import Path
from typing import Any, Final

from nicdev import __version__, abi
from nicdev.control import TX_PERSONALITIES, Control, Identity
from nicdev.edge.arguments import OneLineParser
from nicdev.edge.control_socket import ControlSocket
from nicdev.edge.device import Device
from nicdev.edge.frontend import Frontend
from nicdev.edge.host import LinuxHost
from nicdev.edge.loop import Loop
from nicdev.edge.personality import PersonalityCommand
from nicdev.edge.port import PairPort, Port
from nicdev.edge.port_faulty import FaultsCommand, FaultyPort
from nicdev.edge.unix_socket import from_fd, listen_at
from nicdev.edge.watch import ContextsCommand
from nicdev.errors import ConfigError
from nicdev.faults.parse import parse as parse_faults
from nicdev.nic import Nic
from nicdev.observer import Observer
from nicdev.stats import Stats
from nicdev.tls.personality import RX_PERSONALITIES
from nicdev.tls.table import ContextTable
from nicdev.vhost.protocol import VhostUserBackend

CAPABILITIES: Final = {"type": "net", "features": ["tls-offload"]}
PORT_KINDS: Final = ("tap", "pair", "null")
MAX_INTERFACE_NAME: Final = 15  # IFNAMSIZ with its NUL is 16


@dataclass(frozen=True)
class PortConfig:
    """`--port kind[:key=value,...]`."""

    kind: str
    name: str = "wire0"
    netns: str = "own"
    addresses: tuple[str, ...] = ()
    mtu: int = 1500


@dataclass(frozen=True)
class Config:
    """Everything the command line says."""

    socket_paths: tuple[Path, ...]
    fd: int | None
    port: PortConfig
    queues: int
    max_contexts: int
    rx_personality: abi.RxPersonality
    tx_personality: abi.TxPersonality
    tls: bool
    capture: Path | None
    control: Path | None
    faults: tuple[tuple[int, Path], ...]  # NIC by number, scenario
    exit_on_disconnect: bool
    log_level: str
    log_json: bool


def parse_port(text: str) -> PortConfig:
    """Read a port specification. Raises ConfigError."""
    kind, _, rest = text.partition(":")
    if kind not in PORT_KINDS:
        raise ConfigError(f"unknown port {kind!r}: use one of {', '.join(PORT_KINDS)}")
    values: dict[str, Any] = {}
    addresses: list[str] = []
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if kind != "tap" or key not in ("name", "netns", "address", "mtu") or not value:
            raise ConfigError(f"bad port option {item!r}: tap takes name=, netns=, address=, mtu=; others take none")
        if key == "address":
            addresses.append(_address(value))
        elif key == "mtu":
            if not value.isascii() or not value.isdigit() or not 68 <= int(value) <= 65535:
                raise ConfigError(f"bad mtu {value!r}: use 68 to 65535 bytes")
            values[key] = int(value)
        else:
            values[key] = _name(key, value)
    return PortConfig(kind, addresses=tuple(addresses), **values)


def _address(text: str) -> str:
    try:
        return str(ip_interface(text))
    except ValueError:
        raise ConfigError(f"bad address {text!r}: use one like 198.51.100.1/24 or 2001:db8::1/64") from None


def _name(key: str, value: str) -> str:
    """An interface name by the kernel's rules (dev_valid_name; `%` would make a pattern), or a namespace's."""
    bad = value in (".", "..") or not value.isascii() or any(c in "/:%" or c <= " " for c in value)
    if bad or (key == "name" and len(value) > MAX_INTERFACE_NAME):
        raise ConfigError(
            f"bad {key} {value!r}: no spaces and none of / : %"
            + (f", at most {MAX_INTERFACE_NAME} characters" if key == "name" else "")
        )
    return value


def _faults_option(text: str, nics: int) -> tuple[int, Path]:
    number, equals, path = text.partition("=")
    if not equals or not (number.isascii() and number.isdigit()):
        return 0, Path(text)
    if int(number) >= nics:
        raise ConfigError(f"--faults {text}: there is no NIC {number}, the last is {nics - 1}")
    return int(number), Path(path)


def _parser() -> argparse.ArgumentParser:
    description = "A TLS-offload NIC in software, to be attached to a QEMU guest as a vhost-user network device."
    parser = OneLineParser(prog="vhost-user-tlsnic", description=description, allow_abbrev=False)
    parser.add_argument("--socket-path", "-s", action="append", default=[], type=Path, metavar="PATH",
                        help="listen here for QEMU (twice with --port pair)")  # fmt: skip
    parser.add_argument("--fd", type=int, metavar="FDNUM", help="inherited socket instead of --socket-path")
    parser.add_argument("--print-capabilities", action="store_true", help="print capabilities as JSON and exit")
    parser.add_argument("--port", default="tap", metavar="KIND[:KEY=VALUE,...]",
                        help="wire side: tap (name=, netns=own|current|NAME, address=, mtu=), pair, null")  # fmt: skip
    parser.add_argument("--queues", type=int, default=4, metavar="N", help="queue pairs offered (default 4)")
    parser.add_argument(
        "--max-contexts", type=int, default=65536, metavar="N", help="TLS contexts held (default 65536)"
    )
    parser.add_argument("--rx-personality", choices=RX_PERSONALITIES, default="ideal",
                        help="how rx contexts find their place again (default ideal)")  # fmt: skip
    parser.add_argument("--tx-personality", choices=TX_PERSONALITIES, default="rebuild",
                        help="who encrypts retransmissions: the device, or software (default rebuild)")  # fmt: skip
    parser.add_argument("--tls", choices=("on", "off"), default="on", help="off: a plain NIC")
    parser.add_argument("--capture", type=Path, metavar="FILE", help="pcapng of host0 (plaintext!) and wire0")
    parser.add_argument("--control", type=Path, metavar="PATH", help="control socket (JSON lines)")
    parser.add_argument("--faults", action="append", default=[], metavar="[NIC=]FILE",
                        help="fault scenario (docs/faults.md) of NIC 0, or of number NIC of a pair")  # fmt: skip
    parser.add_argument("--exit-on-disconnect", action="store_true", help="end when QEMU goes")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    parser.add_argument("--log-json", action="store_true", help="one JSON object per log line")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def parse_args(argv: Sequence[str]) -> Config:
    """Command line to Config. Raises ConfigError for what argparse cannot know."""
    args = _parser().parse_args(argv)
    port = parse_port(args.port)
    if bool(args.socket_path) == (args.fd is not None):
        raise ConfigError("give either --socket-path or --fd")
    wanted = 2 if port.kind == "pair" else 1
    if len(args.socket_path) != wanted and (args.socket_path or port.kind == "pair"):
        raise ConfigError(f"--port {port.kind} needs {wanted} --socket-path")
    if not 1 <= args.queues <= 64:
        raise ConfigError("--queues takes 1 to 64")
    if not 0 <= args.max_contexts <= 1 << 24:
        raise ConfigError("--max-contexts takes 0 to 16777216")
    return Config(
        socket_paths=tuple(args.socket_path),
        fd=args.fd,
        port=port,
        queues=args.queues,
        max_contexts=args.max_contexts,
        rx_personality=RX_PERSONALITIES[args.rx_personality],
        tx_personality=TX_PERSONALITIES[args.tx_personality],
        tls=args.tls == "on",
        capture=args.capture,
        control=args.control,
        faults=tuple(_faults_option(text, wanted) for text in args.faults),
        exit_on_disconnect=args.exit_on_disconnect,
        log_level=args.log_level,
        log_json=args.log_json,
    )


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps({"time": record.created, "level": record.levelname.lower(), "event": record.getMessage()})


def _set_up_logging(config: Config) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_JsonFormatter() if config.log_json else logging.Formatter("tlsnic: %(message)s"))
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler])


def _open_ports(config: Config, loop: Loop, stack: ExitStack) -> list[Port]:
    port = config.port
    if port.kind == "null":
        return [Port()]
    if port.kind == "pair":
        return list(PairPort.create(loop))
    from nicdev.edge import netns
    from nicdev.edge.port_tap import TapPort, open_tap

    if port.netns == "own":
        netns.enter_own()
    elif port.netns != "current":
        stack.callback(netns.NamedNamespace(port.netns).close)
    tap = TapPort(loop, open_tap(port.name))
    netns.configure(port.name, port.addresses, port.mtu)
    return [tap]


def _build_nic(config: Config, clock: Callable[[], float]) -> Nic:
    stats = Stats()
    table = ContextTable(config.max_contexts, clock)
    caps = abi.Cap.TX | abi.Cap.RX if config.tls else abi.Cap(0)
    identity = Identity(__version__, caps, rx_personality=config.rx_personality, tx_personality=config.tx_personality)
    return Nic(stats, table, Control(identity, table, stats), lambda: secrets.randbits(64))


def _set_faults(config: Config, ports: Sequence[FaultyPort]) -> None:
    """Begin with the scenarios of the command line. Raises ConfigError before any is begun."""
    scenarios = []
    for number, path in config.faults:
        try:
            scenarios.append((number, parse_faults(path.read_text(), str(path))))
        except OSError as error:
            raise ConfigError(f"cannot read scenario {path}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: not a text in UTF-8") from None
    for number, scenario in scenarios:
        ports[number].set(scenario)


def _control_handlers(devices: Sequence[Device], ports: Sequence[FaultyPort]) -> dict[str, Any]:
    nics = [device.nic for device in devices]
    return {
        "personality": PersonalityCommand(devices),
        "faults": FaultsCommand(ports),
        "stats": lambda _: {"nics": [nic.stats.as_dict() for nic in nics]},
        "contexts": ContextsCommand(nics),
        "history": ContextsCommand(nics),
        "info": lambda _: {"version": __version__, "max_contexts": nics[0].table.max_contexts},
    }


def _serve(config: Config, loop: Loop, device: Device, path: Path | None, stack: ExitStack) -> None:
    """Offer `device` to a front end at `path` or at the inherited fd."""
    host = LinuxHost()

    def make_backend() -> VhostUserBackend:
        return VhostUserBackend(host, device, device.nic.stats, queue_pairs=config.queues)

    sock = listen_at(path) if path is not None else from_fd(config.fd if config.fd is not None else -1)
    frontend = Frontend(sock, make_backend, path)
    stack.callback(frontend.close)

    def on_readable() -> None:
        served = frontend.connected
        frontend.on_readable()
        if frontend.finished or (config.exit_on_disconnect and served and not frontend.connected):
            loop.stop()

    loop.watch(frontend.fileno(), on_readable)


def _served(config: Config, unprivileged: bool) -> str:
    """What is served where, and how programs get to a wire that is in a namespace of its own."""
    where = ", ".join(map(str, config.socket_paths)) or f"fd {config.fd}"
    port = config.port
    if port.kind != "tap":
        return f"{where} on port {port.kind}"
    if port.netns != "own":
        return f"{where} on tap {port.name}"
    enter = f"nsenter --target {os.getpid()} --net" + " --user --preserve-credentials" * unprivileged
    return f"{where} on tap {port.name} (programs get there by: {enter} PROGRAM)"


def run(config: Config) -> None:
    """Serve until SIGTERM. Raises ConfigError when it cannot start."""
    unprivileged = os.geteuid() != 0  # root of a user namespace of our own later
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold keys
    with ExitStack() as stack:
        loop = Loop()
        stack.callback(loop.close)
        loop.install_signals()
        observer: Observer | None = None
        if config.capture is not None:
            from nicdev.edge.capture import Capture  # python-pcapng is optional

            capture = Capture(config.capture)
            stack.callback(capture.close)
            observer = capture
        inner = _open_ports(config, loop, stack)
        nics = [_build_nic(config, loop.time) for _ in inner]
        ports = [FaultyPort(loop, port, nic) for port, nic in zip(inner, nics, strict=True)]
        _set_faults(config, ports)
        devices = [Device(loop, nic, port, config.queues) for port, nic in zip(ports, nics, strict=True)]
        for port, device in zip(ports, devices, strict=True):
            port.tell = device.tell
        for device, path in zip(devices, config.socket_paths or (None,), strict=True):
            stack.callback(device.port.close)
            device.nic.observer = observer
            _serve(config, loop, device, path, stack)
        if config.control is not None:
            stack.callback(ControlSocket(loop, config.control, _control_handlers(devices, ports)).close)
        logging.getLogger(__name__).info("serving %s", _served(config, unprivileged))
        loop.run()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if "--print-capabilities" in argv:
        print(json.dumps(CAPABILITIES))
        return 0
    try:
        config = parse_args(argv)
        _set_up_logging(config)
        run(config)
    except ConfigError as error:
        print(f"vhost-user-tlsnic: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:  # of an optional dependency
        print(f"vhost-user-tlsnic: Python package {error.name} is missing: pip install 'tlsnic[tap,capture]'",
              file=sys.stderr)  # fmt: skip
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
