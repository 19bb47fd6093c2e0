"""The expressions of the dashboards, and which names of metrics there are for them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.observability.metrics import list_metrics as list_gateway_metrics
from launcher.engine.status import list_metrics as list_launcher_metrics

ROOT = Path(__file__).parents[2]
DASHBOARDS = ROOT / "deploy" / "grafana" / "dashboards"
RULES = ROOT / "deploy" / "prometheus" / "rules"
# What Grafana puts in their place.
VARIABLES = {
    "$__rate_interval": "1m",
    **dict.fromkeys(("$model", "$engine", "$key"), ".*"),
    "$slo": "1",
}
_STRINGS = re.compile(r'"[^"]*"')
_LABELS = re.compile(r"\{[^}]*\}|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_RANGES = re.compile(r"\[[^\]]*\]")
_NAMES = re.compile(r"(?<![\w.])[A-Za-z_:][\w:]*")
_WORDS = frozenset(
    (
        *("and", "or", "unless", "on", "by", "group_left", "offset"),
        *("sum", "max", "min", "count", "topk", "rate", "increase", "changes", "vector"),
        *("histogram_quantile", "predict_linear", "deriv", "time"),
        *("min_over_time", "max_over_time"),
    )
)
_PROMETHEUS = {"up", "ALERTS", "process_resident_memory_bytes"}


@dataclass(frozen=True)
class Expression:
    """One target of one panel."""

    board: str
    panel: str
    text: str

    @property
    def promql(self) -> str:
        """As Prometheus takes it."""
        text = self.text
        for name, value in VARIABLES.items():
            text = text.replace(name, value)
        return text


def list_expressions() -> list[Expression]:
    return [
        Expression(path.stem, panel["title"], target["expr"])
        for path in sorted(DASHBOARDS.glob("*.json"))
        for panel in list_panels(json.loads(path.read_text(encoding="utf-8")))
        for target in panel["targets"]
    ]


def list_panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in board["panels"]:
        if panel["type"] != "row":
            yield panel
        yield from panel.get("panels", ())


def find_names(promql: str) -> set[str]:
    """The metrics that an expression reads: what is neither a word of the language nor a label."""
    for pattern in (_STRINGS, _LABELS, _RANGES):
        promql = pattern.sub(" ", promql)
    return {name for name in _NAMES.findall(promql) if name not in _WORDS}


def list_known_names() -> set[str]:
    """All that gateway, launcher, engine and the recording rules have."""
    known = set(_PROMETHEUS) | read_engine_names() | read_recorded_names()
    for one in list_gateway_metrics():
        known |= spell_out(one.name, one.kind)
    for other in list_launcher_metrics():
        known |= spell_out(other.name, other.kind)
    return known


def spell_out(name: str, kind: str) -> set[str]:
    """A histogram is three names."""
    return (
        {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    )


def read_engine_names() -> set[str]:
    """vLLM's own, as the real one exports them (tests/e2e/test_observability.py)."""
    names: set[str] = set()
    for _, name, kind in read_engine_list():
        names |= spell_out(name, kind)
    return names


def read_engine_list() -> list[tuple[str, str, str]]:
    """When it is exported (`always`, `speculation`), its name and its type."""
    lines = (Path(__file__).parent / "vllm_metrics.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split() for line in lines if line and not line.startswith("#")]
    return [(when, name, kind) for when, name, kind in rows]


def read_recorded_names() -> set[str]:
    text = (RULES / "recording.yml").read_text(encoding="utf-8")
    return set(re.findall(r"- record: (\S+)", text))
