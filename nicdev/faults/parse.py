"""Scenarios from TOML. Every mistake is one line that names the file, the rule and the key; see docs/faults.md.

Theory of operation: a table from key to reader, a table from action to the keys it takes, and the sentence about
everything that is not in them. What values may stand together is the business of the rules themselves (scenario.py).
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, Final

from nicdev.abi import Direction, Status
from nicdev.errors import ConfigError
from nicdev.faults.scenario import WIRE_ACTIONS, Action, Endpoint, Only, Part, Rule, RuleError, Scenario, Segments

_RATES: Final = {
    "drop": Action.DROP, "duplicate": Action.DUPLICATE, "corrupt": Action.CORRUPT,
    "reorder": Action.REORDER, "delay": Action.DELAY,
}  # fmt: skip
_HOW_OFTEN: Final = {"name", "action", "direction", "nth", "count", "rate"}
_FLOW: Final = {"flow", "local", "remote"}
_WIRE: Final = _HOW_OFTEN | _FLOW | {"record", "part", "byte", "seq", "only", "retransmissions"}
_EXTRAS: Final[dict[str, set[str]]] = {
    "corrupt": {"checksum", "bit"},
    "reorder": {"distance", "timeout_ms"},
    "swap": {"timeout_ms"},
    "delay": {"ms"},
}
_KEYS: Final[dict[str, set[str]]] = {
    **{str(action): _WIRE | _EXTRAS.get(action, set()) for action in WIRE_ACTIONS},
    "swap": _WIRE | _EXTRAS["swap"],  # reorder by one
    "refuse-add": _HOW_OFTEN | {"local", "remote", "status"},
    "lose-request": _HOW_OFTEN | _FLOW,
    "lose-answer": _HOW_OFTEN | _FLOW,
    "delay-request": _HOW_OFTEN | _FLOW | {"ms", "packets", "records"},
    "delay-answer": _HOW_OFTEN | _FLOW | {"ms", "packets", "records"},
    "desync": _HOW_OFTEN | _FLOW | {"record"},
    "claim-decrypted": _HOW_OFTEN | _FLOW | {"record"},
    "withhold-verdict": _HOW_OFTEN | _FLOW | {"record"},
    "unmark": _HOW_OFTEN | _FLOW | {"record"},
}


def _int(least: int, most: int = 1 << 62) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"a number from {least}" + (f" to {most}" if most < 1 << 62 else ""))
        return value

    return read


def _real(most: float, what: str) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        if type(value) not in (int, float) or not 0 <= value <= most:
            raise ValueError(what)
        return float(value)

    return read


def _one_of(values: dict[str, Any]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) is not str or value not in values:
            raise ValueError("one of " + ", ".join(values))
        return values[value]

    return read


def _bool(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("true or false")
    return value


def _name(value: Any) -> str:
    if type(value) is not str or not value or not value.isprintable():
        raise ValueError("a text of one line")
    return value


def _count(value: Any) -> int:
    return 0 if value == "all" else _count_number(value)


def _count_number(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError('a number from 1, or "all"')
    return value


def _seq(value: Any) -> tuple[int, int]:
    if type(value) is list and len(value) == 2 and {*map(type, value)} == {int} and 0 <= value[0] < value[1]:
        return value[0], value[1]
    raise ValueError("two numbers, [from, to), from the start of the flow")


def _endpoint(value: Any) -> Endpoint:
    wanted = 'like "198.51.100.2:443" or "[2001:db8::1]:443"; * fits any address or port'
    if type(value) is not str:
        raise ValueError(wanted)
    host, _, port = value.rpartition(":")
    try:
        address = None if host == "*" else ip_address(host.removeprefix("[").removesuffix("]"))
        number = None if port == "*" else int(port)
    except ValueError:
        raise ValueError(wanted) from None
    if number is not None and not 0 < number < 65536:
        raise ValueError(wanted)
    return Endpoint(address, number)


_DIRECTIONS: Final = {"tx": Direction.TX, "rx": Direction.RX}
_MS: Final = _real(60_000, "milliseconds, 0 to 60000")
_RATE: Final = _real(1, "a probability, 0 to 1")
_SEGMENTS: Final = _one_of({str(kind): kind for kind in Segments})
# key: (field of Rule, reader)
_READERS: Final[dict[str, tuple[str, Callable[[Any], Any]]]] = {
    "name": ("name", _name),
    "action": ("action", _one_of({**{str(a): a for a in Action}, "swap": Action.REORDER})),
    "direction": ("direction", _one_of(_DIRECTIONS)),
    "flow": ("flow", _int(1)),
    "local": ("local", _endpoint),
    "remote": ("remote", _endpoint),
    "record": ("record", _int(0)),
    "part": ("part", _one_of({str(part): part for part in Part})),
    "byte": ("byte", _int(0)),
    "seq": ("seq", _seq),
    "only": ("only", _one_of({str(only): only for only in Only})),
    "retransmissions": ("retransmissions", _bool),
    "nth": ("nth", _int(1)),
    "count": ("count", _count),
    "rate": ("rate", _RATE),
    "distance": ("distance", _int(1, 1000)),
    "timeout_ms": ("timeout_ms", _MS),
    "ms": ("ms", _MS),
    "packets": ("packets", _int(1)),
    "records": ("records", _int(1)),
    "checksum": ("fix_checksum", _one_of({"fixed": True, "wrong": False})),
    "bit": ("bit", _int(0, 7)),
    "status": ("status", _one_of({"refused": Status.REFUSED, "table-full": Status.TABLE_FULL})),
}


def parse(text: str, source: str) -> Scenario:
    """A scenario from TOML `text`; `source` names it in messages. Raises ConfigError."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: {error}") from None
    for key in tables:
        if key not in ("seed", "tx", "rx", "rule"):
            raise ConfigError(f"{source}: key {key}: unknown; a scenario has seed, [tx], [rx] and [[rule]]")
    rules: list[Rule] = []
    segments: dict[Direction, Segments] = {}
    for name, direction in _DIRECTIONS.items():
        table = tables.get(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{source}: key {name}: a table, [{name}]")
        segments[direction] = _read(source, f"[{name}]", "segments", table.get("segments", "whole"), _SEGMENTS)
        rules += _rates(source, name, direction, table)
    listed = tables.get("rule", [])
    if not isinstance(listed, list) or not all(isinstance(table, dict) for table in listed):
        raise ConfigError(f"{source}: key rule: tables, [[rule]]")
    rules += [_rule(source, number, table) for number, table in enumerate(listed, 1)]
    seed = _read(source, "scenario", "seed", tables.get("seed", 0), _int(0))
    return Scenario(tuple(rules), seed, segments, source)


def _read(source: str, where: str, key: str, value: Any, reader: Callable[[Any], Any]) -> Any:
    try:
        return reader(value)
    except ValueError as error:
        shown = f"{value!r}"
        raise ConfigError(f"{source}: {where}: key {key}: {shown[:60]} is not {error}") from None


def _rates(source: str, name: str, direction: Direction, table: dict[str, Any]) -> list[Rule]:
    """The rules that the rates of a direction stand for."""
    where = f"[{name}]"
    extras = {key for keys in _EXTRAS.values() for key in keys}
    values: dict[Action, dict[str, Any]] = {}
    for key in table:
        if key not in (*_RATES, *extras, "segments"):
            raise ConfigError(f"{source}: {where}: key {key}: unknown; one of {', '.join(_RATES)} is a rate")
    for key, action in _RATES.items():
        if key not in table:
            continue
        options = {"ms": 10.0} if action is Action.DELAY else {"distance": 3} if action is Action.REORDER else {}
        for option in _EXTRAS.get(key, set()) & table.keys():
            field, reader = _READERS[option]
            options[field] = _read(source, where, option, table[option], reader)
        values[action] = {**options, "rate": _read(source, where, key, table[key], _RATE)}
    return [Rule(f"{name} {action}", action, direction, **fields) for action, fields in values.items()]


def _rule(source: str, number: int, table: dict[str, Any]) -> Rule:
    """One [[rule]]."""
    where = f"rule {number}" + (f" ({table['name']})" if isinstance(table.get("name"), str) else "")
    if "action" not in table:
        raise ConfigError(f"{source}: {where}: key action: missing")
    _read(source, where, "action", table["action"], _READERS["action"][1])
    keys = _KEYS[table["action"]]
    fields: dict[str, Any] = {"name": f"{table['action']} {number}"}
    for key, value in table.items():
        if key not in keys:
            problem = f"not of {table['action']}" if key in _READERS else "unknown"
            raise ConfigError(f"{source}: {where}: key {key}: {problem}")
        field, reader = _READERS[key]
        fields[field] = _read(source, where, key, value, reader)
    if "direction" not in fields:
        if "direction" in keys and fields["action"] in (*WIRE_ACTIONS, Action.REFUSE_ADD, Action.DESYNC):
            raise ConfigError(f"{source}: {where}: key direction: missing")
        fields["direction"] = Direction.RX
    try:
        return Rule(**fields)
    except RuleError as error:
        raise ConfigError(f"{source}: {where}: {error}") from None
