"""Where trouble shows: whether the alert, panel and section that a fault names are there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lab.faults.fault import Signs
from lab.paths import ROOT

_RULES = ROOT / "deploy" / "prometheus" / "rules" / "alerts.yml"
_BOARDS = ROOT / "deploy" / "grafana" / "dashboards"
_RUNBOOK = ROOT / "docs" / "runbook.md"


@dataclass(frozen=True)
class Alert:
    """What its rule says of it."""

    name: str
    runbook: str  # the section, as its heading
    panel: str  # `board: title`


class Signboard:
    """The rules, dashboards and runbook of this checkout."""

    def __init__(
        self, rules: Path = _RULES, boards: Path = _BOARDS, runbook: Path = _RUNBOOK
    ) -> None:
        self._rules, self._boards, self._runbook = rules, boards, runbook

    @cached_property
    def sections(self) -> set[str]:
        text = self._runbook.read_text(encoding="utf-8")
        return set(re.findall(r"^## (.+)$", text, re.MULTILINE))

    @cached_property
    def panels(self) -> dict[tuple[str, int], str]:
        """`board: title` by the board's uid and the panel's number."""
        found = {}
        for path in sorted(self._boards.glob("*.json")):
            board = json.loads(path.read_text(encoding="utf-8"))
            for panel in _list_panels(board["panels"]):
                found[board["uid"], panel["id"]] = f"{path.stem}: {panel['title']}"
        return found

    @cached_property
    def alerts(self) -> dict[str, Alert]:
        text = self._rules.read_text(encoding="utf-8")
        found = {}
        for rule in re.split(r"- alert: ", text)[1:]:
            name = rule.split()[0]
            section = re.search(r"runbook_url: docs/runbook\.md#(\S+)", rule)
            link = re.search(r"dashboard_url: /d/(\S+)\?viewPanel=(\d+)", rule)
            panel = self.panels.get((link[1], int(link[2])), "") if link else ""
            heading = next(
                (one for one in self.sections if section and _anchor(one) == section[1]), ""
            )
            found[name] = Alert(name, heading, panel)
        return found

    def complete(self, signs: Signs) -> Signs:
        """With the section and the panel that the alert links to, where none is named."""
        alert = self.alerts.get(signs.alert)
        runbook = signs.runbook or (alert.runbook if alert else "")
        panel = signs.panel or (alert.panel if alert else "")
        return replace(signs, runbook=runbook, panel=panel)

    def find_missing(
        self, signs: Signs, logged: Sequence[Mapping[str, Any]] | None
    ) -> Iterator[str]:
        """`logged` is None where the log is somebody else's."""
        if signs == Signs():
            return
        if signs.alert and signs.alert not in self.alerts:
            yield f"there is no alert {signs.alert}"
        if signs.runbook not in self.sections:
            yield f"the runbook has no section {signs.runbook or 'for it'}"
        if signs.panel not in self.panels.values():
            yield f"there is no panel {signs.panel or 'for it'}"
        if signs.log and logged is not None and not any(is_event(signs.log, one) for one in logged):
            yield f"{signs.log} was not logged"


def is_event(wanted: str, line: Mapping[str, Any]) -> bool:
    """Whether the line has this event and these fields, as in `request_done status=507`."""
    name, *pairs = wanted.split()
    fields = [pair.partition("=")[::2] for pair in pairs]
    return line.get("event") == name and all(str(line.get(key)) == one for key, one in fields)


def _list_panels(panels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for panel in panels:
        if panel["type"] == "row":
            yield from _list_panels(panel.get("panels", []))
        else:
            yield panel


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
