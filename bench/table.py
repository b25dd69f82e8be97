"""The figures for people: target, anchor, ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

VERDICTS = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}


def _number(value: float | None) -> str:
    if value is None:
        return ""
    text = f"{value:,.1f}" if abs(value) >= 10 else f"{value:.3f}"
    return text.rstrip("0").removesuffix(".")


def table(figures: Mapping[str, Mapping[str, Any]], smoke: bool = False) -> Table:
    """One row per figure, as bench.json has them; what counts for nothing says so."""
    found = Table(title="Smoke test: sizes too small to claim anything" if smoke else None)
    for name in ("figure", "where"):
        found.add_column(name, no_wrap=True)
    for name in ("target", "anchor", "ours", "spread", "rounds"):
        found.add_column(name, justify="right")
    found.add_column("")
    for name, figure in figures.items():
        verdict = "" if smoke else VERDICTS[figure["met"]]
        if figure.get("unsteady"):
            verdict = f"[yellow]does not count: the control arm varied by {figure['control_variation']:.0%}[/]"
        sign = "<= " if figure["less_is_better"] else ">= "
        found.add_row(
            name,
            figure["kind"],
            "" if figure["target"] is None else sign + _number(figure["target"]),
            "" if figure["anchor"] is None else f"{_number(figure['anchor'])} {figure['anchor_is']}",
            f"{_number(figure['value'])} {figure['unit']}",
            _number(figure["spread"]),
            str(figure["rounds"]),
            verdict,
        )
    return found
