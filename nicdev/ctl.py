"""`tlsnic-ctl`: ask a running NIC over its control socket.

    tlsnic-ctl SOCKET stats | info
    tlsnic-ctl SOCKET contexts | history [FLOW]
    tlsnic-ctl SOCKET personality [--rx NAME] [--tx NAME]
    tlsnic-ctl SOCKET faults set FILE | clear | show

SOCKET is the path given to `vhost-user-tlsnic --control`. One line on stderr and status 2 when something is wrong.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from nicdev.edge.arguments import OneLineParser
from nicdev.errors import ConfigError

TIMEOUT: Final = 10  # seconds
MAX_REQUEST: Final = 65536  # what the control socket takes


def ask(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """One request to the control socket at `path`, and its answer. Raises ConfigError."""
    line = json.dumps(request).encode() + b"\n"
    if len(line) > MAX_REQUEST:
        raise ConfigError(f"a request of {len(line)} bytes, the limit is {MAX_REQUEST}")
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(TIMEOUT)
            client.connect(str(path))
            client.sendall(line)
            with client.makefile("rb") as answers:
                answer: dict[str, Any] = json.loads(answers.readline())
    except OSError as error:
        raise ConfigError(f"cannot ask at {path}: {error.strerror or error}") from None
    except ValueError:
        raise ConfigError(f"what answers at {path} is not the NIC") from None
    if not answer.pop("ok", False):
        raise ConfigError(str(answer.get("error")))
    return answer


def _parser() -> argparse.ArgumentParser:
    description = (__doc__ or "").split("\n")[0]
    parser = OneLineParser(prog="tlsnic-ctl", description=description, allow_abbrev=False)
    parser.add_argument("socket", type=Path, metavar="SOCKET", help="path given to vhost-user-tlsnic --control")
    commands = parser.add_subparsers(dest="cmd", required=True)
    stats = commands.add_parser("stats", help="counters that are not 0")
    stats.add_argument("--all", action="store_true", help="all counters")
    contexts = commands.add_parser("contexts", help="live TLS contexts, one per line")
    history = commands.add_parser("history", help="how live TLS contexts lost and found their place")
    history.add_argument("--json", action="store_true", help="one object per context, not a table")
    for command in (contexts, history):
        command.add_argument("flow", nargs="?", metavar="FLOW", help="SLOT, ADDRESS:PORT or :PORT; default: all")
    commands.add_parser("info", help="version and limits")
    personality = commands.add_parser("personality", help="which NIC's resync behaviour it shows; to see and to change")
    personality.add_argument("--rx", metavar="NAME", help="for rx contexts that the driver makes from now on")
    personality.add_argument("--tx", metavar="NAME", help="for all packets from now on")
    personality.add_argument("--nic", type=int, metavar="N", help="one NIC of a pair; default: all")
    faults = commands.add_parser("faults", help="what is to go wrong (docs/faults.md)")
    faults.add_argument("--nic", type=int, metavar="N", help="one NIC of a pair; default: set 0, clear and show all")
    do = faults.add_subparsers(dest="do", required=True)
    do.add_parser("set", help="begin a scenario").add_argument("file", type=Path, metavar="FILE")
    do.add_parser("clear", help="no more faults")
    do.add_parser("show", help="the scenario at work, and what came of its rules")
    return parser


def _request(args: argparse.Namespace) -> dict[str, Any]:
    request = {"cmd": args.cmd}
    if args.cmd in ("contexts", "history") and args.flow is not None:
        request["flow"] = args.flow
    if args.cmd == "personality":
        chosen = {"rx": args.rx, "tx": args.tx, "nic": args.nic}
        request |= {name: value for name, value in chosen.items() if value is not None}
    if args.cmd == "faults":
        request |= {"do": args.do} | ({"nic": args.nic} if args.nic is not None else {})
        if args.do == "set":
            try:
                request |= {"name": str(args.file), "text": args.file.read_text()}
            except OSError as error:
                raise ConfigError(f"cannot read {args.file}: {error.strerror}") from None
            except UnicodeDecodeError:
                raise ConfigError(f"{args.file}: not a text in UTF-8") from None
    return request


def _show(args: argparse.Namespace, answer: dict[str, Any]) -> None:
    """Print an answer; JSON except for counters and histories."""
    for number, nic in enumerate(nics := answer.pop("nics", [])):
        if len(nics) > 1:
            print(f"nic {number}")
        if args.cmd == "stats":
            for name, value in nic.items():
                if value or args.all:
                    print(f"{name} {value}")
        elif args.cmd == "contexts" or (args.cmd == "history" and args.json):
            for context in nic:
                print(json.dumps(context))
        elif args.cmd == "history":
            for context in nic:
                _show_history(context)
        elif args.cmd == "personality":
            print(f"rx {nic['rx']}, tx {nic['tx']}")
        else:
            print(json.dumps(nic, indent=2) if nic is not None else "no faults")
    if answer:
        print(json.dumps(answer))


def _show_history(context: dict[str, Any]) -> None:
    """A line about the context and a table of its events."""
    place = "nowhere" if context["seq"] is None else f"record {context['record']} at {context['seq']}"
    ends = f"{context['local']} {'<-' if context['dir'] == 'rx' else '->'} {context['remote']}"
    print(f"slot {context['slot']} {context['dir']} {ends} {context.get('personality', '')}".rstrip())
    print(f"  {context['state']}, {place}; {context['packets']} packets, {context['records']} records in the device")
    for event in context["events"]:
        seq, record = ("-" if event[name] is None else event[name] for name in ("seq", "record"))
        columns = f"{event['number']:>5} {event['at']:>11.6f} s  {event['what']:<11} seq {seq:>10}  record {record:>6}"
        print(f"  {columns}  {event['why']}".rstrip())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    try:
        args = _parser().parse_args(argv)
        _show(args, ask(args.socket, _request(args)))
    except ConfigError as error:
        print(f"tlsnic-ctl: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
