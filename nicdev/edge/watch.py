"""{"cmd": "contexts"} and {"cmd": "history"} of the control socket: what flows are, and how they came there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nicdev.nic import Nic


class ContextsCommand:
    """One object per context, never with keys.

    {"flow": TEXT} chooses: a slot as number, an end as "ADDRESS:PORT", or ":PORT" of either end. {"cmd": "history"} has
    the context's last events besides.
    """

    def __init__(self, nics: Sequence[Nic]) -> None:
        self._nics = nics

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request."""
        flow = request.get("flow")
        if flow is not None and type(flow) is not str:
            return {"ok": False, "error": 'flow is "SLOT", "ADDRESS:PORT" or ":PORT"'}
        history = request["cmd"] == "history"
        return {"nics": [_contexts(nic, flow, history) for nic in self._nics]}


def _contexts(nic: Nic, flow: str | None, history: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for slot, generation, context in nic.table:
        described = {"slot": slot, "generation": generation, **context.describe()}
        if flow is None or _fits(described, flow):
            found.append(described | ({"events": context.history.describe()} if history else {}))
    return found


def _fits(context: dict[str, Any], flow: str) -> bool:
    ends = (str(context["local"]), str(context["remote"]))
    if flow.startswith(":"):
        return any(end.endswith(flow) for end in ends)
    return flow in (str(context["slot"]), *ends)
