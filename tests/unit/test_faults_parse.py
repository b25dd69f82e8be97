"""Scenarios: what TOML says is what the rules are, and every mistake is one line with file, rule and key."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from nicdev.abi import Direction, Status
from nicdev.errors import ConfigError
from nicdev.faults.parse import parse
from nicdev.faults.scenario import Action, Endpoint, Only, Part, Rule, Scenario, Segments

RX, TX = Direction.RX, Direction.TX


def rules(text: str) -> tuple[Rule, ...]:
    return parse(text, "x.toml").rules


def test_nothing_is_a_scenario_without_faults() -> None:
    assert parse("", "x.toml") == Scenario(name="x.toml")


def test_rates_of_a_direction_are_rules() -> None:
    scenario = parse(
        'seed = 9\n[tx]\nsegments = "wire"\ndrop = 0.01\ncorrupt = 1\nchecksum = "wrong"\n'
        "[rx]\nreorder = 0.5\ndistance = 4\ntimeout_ms = 7\ndelay = 0.25\nduplicate = 0\n",
        "x.toml",
    )
    assert scenario == Scenario(
        (
            Rule("tx drop", Action.DROP, TX, rate=0.01),
            Rule("tx corrupt", Action.CORRUPT, TX, rate=1.0, fix_checksum=False),
            Rule("rx duplicate", Action.DUPLICATE, RX, rate=0.0),
            Rule("rx reorder", Action.REORDER, RX, rate=0.5, distance=4, timeout_ms=7),
            Rule("rx delay", Action.DELAY, RX, rate=0.25, ms=10),
        ),
        9,
        {TX: Segments.WIRE, RX: Segments.WHOLE},
        "x.toml",
    )


def test_every_key_of_an_address() -> None:
    (rule,) = rules(
        '[[rule]]\nname = "n"\naction = "drop"\ndirection = "tx"\nflow = 2\nlocal = "198.51.100.2:4000"\n'
        'remote = "[2001:db8::1]:*"\nrecord = 7\npart = "header"\nbyte = 2\nnth = 3\ncount = 4\nrate = 0.5\n'
        'retransmissions = true\nonly = "data"\n'
    )
    assert rule == Rule(
        "n", Action.DROP, TX, flow=2, local=Endpoint(ip_address("198.51.100.2"), 4000),
        remote=Endpoint(ip_address("2001:db8::1"), None), record=7, part=Part.HEADER, byte=2, nth=3, count=4, rate=0.5,
        retransmissions=True, only=Only.DATA,
    )  # fmt: skip
    assert rule.repeats_too


@pytest.mark.parametrize(
    ("text", "limit", "repeats"),
    [
        ("nth = 5", 1, True),
        ("rate = 0.5", None, True),
        ("rate = 0.5\ncount = 3", 3, True),
        ('count = "all"', None, True),
        ("record = 1", 1, False),
        ("seq = [0, 10]\ncount = 3", 3, False),
        ("record = 1\nretransmissions = true", 1, True),
    ],
)
def test_how_often_a_rule_strikes_unless_told(text: str, limit: int | None, repeats: bool) -> None:
    (rule,) = rules(f'[[rule]]\naction = "drop"\ndirection = "rx"\n{text}')
    assert (rule.limit, rule.repeats_too) == (limit, repeats)


def test_actions_with_a_meaning_of_their_own() -> None:
    swap, refuse, answer, desync = rules(
        '[[rule]]\naction = "swap"\ndirection = "tx"\n'
        '[[rule]]\naction = "refuse-add"\ndirection = "rx"\nstatus = "table-full"\ncount = 2\n'
        '[[rule]]\naction = "delay-answer"\nrecords = 5\n'
        '[[rule]]\naction = "desync"\ndirection = "tx"\nrecord = 0\n'
    )
    assert (swap.name, swap.action, swap.distance, swap.limit) == ("swap 1", Action.REORDER, 1, 1)
    assert (refuse.status, refuse.direction, refuse.limit) == (Status.TABLE_FULL, RX, 2)
    assert (answer.direction, answer.records) == (RX, 5)
    assert (desync.record, desync.direction) == (0, TX)


DROP = '[[rule]]\naction = "drop"\ndirection = "tx"\n'
MISTAKES = {
    "[[rule]]\ndirection = 'tx'": "x.toml: rule 1: key action: missing",
    "[[rule]]\naction = 'drop'": "x.toml: rule 1: key direction: missing",
    "[[rule]]\naction = 3": "x.toml: rule 1: key action: 3 is not one of drop, duplicate, ",
    DROP + "colour = 1": "x.toml: rule 1: key colour: unknown",
    DROP + "ms = 1": "x.toml: rule 1: key ms: not of drop",
    DROP + 'name = "a"\nflow = 0': "x.toml: rule 1 (a): key flow: 0 is not a number from 1",
    DROP + "flow = true": "x.toml: rule 1: key flow: True is not a number from 1",
    DROP + 'part = "tag"': "x.toml: rule 1: key part: needs record",
    DROP + "byte = 1": "x.toml: rule 1: key byte: needs record",
    DROP + 'record = 1\npart = "middle"': "x.toml: rule 1: key part: 'middle' is not one of header, nonce, ",
    DROP + "record = 1\nseq = [0, 1]": "x.toml: rule 1: key seq: not together with record",
    DROP + "seq = [5, 5]": "x.toml: rule 1: key seq: [5, 5] is not two numbers, [from, to), from the start of the flow",
    DROP + 'record = 1\nonly = "any"': "x.toml: rule 1: key only: flow, record and seq are about data",
    DROP + "rate = 1.5": "x.toml: rule 1: key rate: 1.5 is not a probability, 0 to 1",
    DROP + "rate = nan": "x.toml: rule 1: key rate: nan is not a probability, 0 to 1",
    DROP + "count = 0": "x.toml: rule 1: key count: 0 is not a number from 1, or \"all\"",
    DROP + "name = ''": "x.toml: rule 1 (): key name: '' is not a text of one line",
    DROP + 'local = "here:1"': "x.toml: rule 1: key local: 'here:1' is not like \"198.51.100.2:443\" or ",
    DROP + 'local = "*:65536"': "x.toml: rule 1: key local: '*:65536' is not like ",
    DROP + 'name = "a"\n' + DROP + 'name = "a"': "x.toml: rule a: key name: used twice",
    '[[rule]]\naction = "delay"\ndirection = "tx"': "x.toml: rule 1: key ms: delay needs it",
    '[[rule]]\naction = "delay-answer"': "x.toml: rule 1: key ms: delay-answer needs one of packets, records, ms",
    '[[rule]]\naction = "delay-request"\nms = 1\npackets = 1': "x.toml: rule 1: key ms: delay-request needs one of ",
    '[[rule]]\naction = "lose-answer"\ndirection = "tx"': "x.toml: rule 1: key direction: lose-answer is for rx",
    '[[rule]]\naction = "desync"\ndirection = "tx"': "x.toml: rule 1: key record: desync needs it",
    '[[rule]]\naction = "corrupt"\ndirection = "rx"\nchecksum = "wrong"':
        'x.toml: rule corrupt 1: key checksum: wrong needs segments = "wire" or "joined" in [rx]',
    "[tx]\nsegments = 'small'": "x.toml: [tx]: key segments: 'small' is not one of whole, wire, joined",
    "[tx]\nloss = 0.1": "x.toml: [tx]: key loss: unknown; one of drop, duplicate, corrupt, reorder, delay is a rate",
    "[tx]\ndrop = -0.1": "x.toml: [tx]: key drop: -0.1 is not a probability, 0 to 1",
    "tx = 1": "x.toml: key tx: a table, [tx]",
    "rule = 1": "x.toml: key rule: tables, [[rule]]",
    "seed = -1": "x.toml: scenario: key seed: -1 is not a number from 0",
    "sede = 1": "x.toml: key sede: unknown; a scenario has seed, [tx], [rx] and [[rule]]",
    "seed = ": "x.toml: Invalid value (at end of document)",
}  # fmt: skip


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "x.toml")
    line = str(caught.value)
    assert line.startswith(MISTAKES[text])
    assert "\n" not in line
