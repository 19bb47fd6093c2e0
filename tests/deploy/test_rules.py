"""Alerts and recording rules: valid, and each alert seen firing and seen silent."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.deploy.promtool import run_promtool

pytestmark = pytest.mark.slow  # promtool judges, not Python

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules"
CASES = Path(__file__).parent / "rules"
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
    assert any(silent), "it is never seen silent"


def test_alerts_are_those_that_the_page_explains() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")

    assert re.findall(r"^\| `(\w+)` \| (?:critical|warning) \|", page, re.MULTILINE) == ALERTS


def test_alertmanager_of_the_page_is_understood(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    block = re.search(r"^    alerting:\n(?:    .*\n)+", page, re.MULTILINE)
    assert block is not None
    shutil.copytree(RULES.parent, tmp_path, dirs_exist_ok=True)
    with (tmp_path / "prometheus.yml").open("a", encoding="utf-8") as config:
        config.write(re.sub("^    ", "", block[0], flags=re.MULTILINE))

    assert "is valid" in run_promtool("check", "config", tmp_path / "prometheus.yml")
