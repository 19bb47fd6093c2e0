"""Alerts and recording rules: valid, and each alert seen firing and seen silent."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.deploy.expressions import DASHBOARDS, find_names, list_panels
from tests.deploy.promtool import run_promtool

pytestmark = pytest.mark.slow  # promtool judges, not Python

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules"
CASES = Path(__file__).parent / "rules"
# What the panel that an alert links to must show.
WATCHED = {
    "Watchdog": {"ALERTS"},
    "TargetDown": {"up"},
    "EngineDown": {"launcher_engine_state"},
    "EngineCrashLoop": {"launcher_engine_restarts"},
    "HostMissing": {"launcher_engine_hosts"},
    "WarmupFailed": {"gateway_warmups"},
    "NoTokens": {"engine:generation_tokens:rate1m"},
    "ErrorRate": {"gateway_errors"},
    "QueueGrowing": {"gateway_waiting_sequences"},
    "QueueSlow": {"gateway_queue_seconds_bucket"},
    "KvCacheFull": {"engine:kv_usage:max"},
    "BreakerOpen": {"gateway_engine_breaker_open"},
    "RedisAway": {"gateway_redis_away"},
    "RecordsAway": {"gateway_records_away"},
    "BatchStorageAway": {"gateway_batch_storage_failures"},
    "ResponseStorageAway": {"gateway_response_storage_failures"},
    "LogLinesLost": {"gateway_log_lines_dropped", "launcher_log_lines_dropped"},
}
ALERTS = re.findall(r"- alert: (\w+)", (RULES / "alerts.yml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(RULES.glob("*.yml")), ids=lambda path: path.name)
def test_rules_are_valid(path: Path) -> None:
    assert "rules found" in run_promtool("check", "rules", path)


@pytest.mark.parametrize("path", sorted(CASES.glob("*.yml")), ids=lambda path: path.name)
def test_rules_do_what_their_cases_say(path: Path) -> None:
    assert "SUCCESS" in run_promtool("test", "rules", path)


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_has_a_firing_and_a_silent_case(alert: str) -> None:
    cases = (CASES / "alerts.test.yml").read_text(encoding="utf-8")
    expected = re.findall(rf"alertname: {alert},?\s+exp_alerts:(.*)", cases)
    silent = [alerts.startswith(" []") for alerts in expected]

    assert not all(silent), "it is never seen firing"
    # The watchdog's silence is the alarm: it has no silent case.
    assert any(silent) is (alert != "Watchdog"), "it is never seen silent"


def test_alerts_are_those_that_the_page_explains() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")

    assert re.findall(r"^\| `(\w+)` \| (?:critical|warning|none) \|", page, re.MULTILINE) == ALERTS


def test_alerts_have_each_a_section_in_the_runbook() -> None:
    page = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")

    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == ALERTS


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_links_to_its_section_and_to_a_panel_that_shows_it(alert: str) -> None:
    rule = re.split(r"- alert: ", (RULES / "alerts.yml").read_text(encoding="utf-8"))
    (text,) = [one for one in rule if one.startswith(f"{alert}\n")]
    assert f"runbook_url: docs/runbook.md#{alert.lower()}\n" in text
    link = re.search(r"dashboard_url: /d/(vllm-gateway-\w+)\?viewPanel=(\d+)\n", text)
    assert link is not None

    boards = [json.loads(path.read_text(encoding="utf-8")) for path in DASHBOARDS.glob("*.json")]
    (board,) = [one for one in boards if one["uid"] == link[1]]
    (panel,) = [one for one in list_panels(board) if one["id"] == int(link[2])]
    shown = set().union(*(find_names(target["expr"]) for target in panel["targets"]))
    assert {name.split("_total")[0] for name in shown} & WATCHED[alert]


def test_alertmanager_of_the_stack_is_understood(tmp_path: Path) -> None:
    """With the folder in its place that compose.alerts.yaml mounts."""
    shutil.copytree(RULES.parent, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "alerting", tmp_path / "alertmanagers", dirs_exist_ok=True)

    assert "is valid" in run_promtool("check", "config", tmp_path / "prometheus.yml")
