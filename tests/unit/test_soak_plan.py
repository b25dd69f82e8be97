"""The matrix covers what it says, without what is impossible, and is the same for the same seed."""

from __future__ import annotations

from dataclasses import asdict
from itertools import combinations, product

import pytest

from tests.soak.plan import FACTORS, Setting, cover, possible, settings


@pytest.mark.parametrize(("strength", "most"), [(2, 40), (3, 120)])
def test_every_combination_that_is_possible_is_there(strength: int, most: int) -> None:
    rows = [asdict(setting) for setting in settings(1, strength)]
    assert all(possible(row) for row in rows)
    for names in combinations(FACTORS, strength):
        found = {tuple(row[name] for name in names) for row in rows}
        absent = set(product(*(FACTORS[name] for name in names))) - found
        assert all(dict(zip(names, values, strict=True)).items() >= IMPOSSIBLE for values in absent), (names, absent)
    assert {row["rx"] for row in rows if Setting(**row).orderly} == set(FACTORS["rx"])
    assert len(rows) <= most


IMPOSSIBLE = {"corrupt": 0.1, "segments": "whole"}.items()


def test_the_same_seed_makes_the_same_matrix() -> None:
    assert settings(5, 2) == settings(5, 2) != settings(6, 2)


def test_one_factor_alone_and_rows_by_kernel() -> None:
    assert cover({"a": (1, 2, 3)}, 1, 0, lambda _: True) == [{"a": 1}, {"a": 2}, {"a": 3}]
    kernels = [setting.kernel for setting in settings(1, 2)]
    assert kernels == sorted(kernels, key=FACTORS["kernel"].index)


def test_ipv6_has_a_smallest_mtu() -> None:
    row = {name: values[0] for name, values in FACTORS.items()}
    assert [Setting(**{**row, "family": family}).link_mtu for family in "46"] == [576, 1280]
