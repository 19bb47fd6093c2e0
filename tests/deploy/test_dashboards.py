"""Dashboards: what the script writes, in Grafana's own words, over metrics that exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from lab.grade.grade_console import GRADE_FIGURES
from scripts.panels import BOARDS
from tests.deploy.check_live import WITHOUT_DATA
from tests.deploy.expressions import (
    DASHBOARDS,
    RULES,
    Expression,
    find_names,
    list_expressions,
    list_known_names,
    list_panels,
)
from tests.deploy.promtool import run_promtool

pytestmark = pytest.mark.slow  # dashboards are JSON and PromQL

ROOT = Path(__file__).parents[2]
FILES = sorted(DASHBOARDS.glob("*.json"))
NAMES = [board.name for board in BOARDS]
RULE = re.compile(r"^        expr: (?:\|\n((?:          .*\n)+)|(.+)\n)", re.MULTILINE)


def read(path: Path) -> dict[str, Any]:
    board: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return board


def test_files_are_what_the_script_writes() -> None:
    checked = subprocess.run(
        [sys.executable, "-m", "scripts.dashboards", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert sorted(NAMES) == [path.stem for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_board_survives_grafanas_own_classes(path: Path) -> None:
    """A key that they do not know would be lost on the way."""
    register_default_plugins()
    board = read(path)

    again = json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder))

    assert again == board


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_target_asks_prometheus(path: Path) -> None:
    source = {"type": "prometheus", "uid": "${datasource}"}
    board = read(path)

    identities = [panel["id"] for panel in board["panels"]]
    assert len(set(identities)) == len(identities)
    for panel in list_panels(board):
        assert panel["datasource"] == source, panel["title"]
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == source, panel["title"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_panels_lie_side_by_side(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in read(path)["panels"]:
        at = panel["gridPos"]
        cells = {
            (at["x"] + column, at["y"] + line)
            for column in range(at["w"])
            for line in range(at["h"])
        }
        assert at["x"] + at["w"] <= 24, panel["title"]
        assert not taken & cells, panel["title"]
        taken |= cells


def test_titles_tell_panels_of_a_board_apart() -> None:
    for board in BOARDS:
        titles = [panel.title for row in board.rows for panel in row.panels]
        assert len(set(titles)) == len(titles), board.name


def test_expressions_are_promql(tmp_path: Path) -> None:
    """As rules, because that is what promtool reads; with the line of each that is none."""
    expressions = list_expressions()
    assert len(expressions) > 60
    rules = [
        {"record": f"check:{place}", "expr": expression.promql}
        for place, expression in enumerate(expressions)
    ]
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "check", "rules": rules}]}))

    assert f"{len(rules)} rules found" in run_promtool("check", "rules", path)


def test_expressions_read_metrics_that_exist() -> None:
    known = list_known_names()
    unknown = {
        f"{one.board}, {one.panel}: {name}"
        for one in list_expressions()
        for name in find_names(one.promql) - known
    }

    assert unknown == set()


def test_grades_that_are_shown_are_those_that_the_grader_keeps() -> None:
    shown = {
        name
        for one in list_expressions()
        for name in re.findall(r'gateway_grade\{figure="([^"]+)"', one.promql)
    }

    assert len(shown) == 3
    assert shown - {figure.name for figure in GRADE_FIGURES} == set()


def test_rules_read_metrics_that_exist() -> None:
    known = list_known_names()
    for path in sorted(RULES.glob("*.yml")):
        text = path.read_text(encoding="utf-8")
        expressions = RULE.findall(text)
        assert len(expressions) == text.count(" expr:")
        for lines, line in expressions:
            assert find_names(lines or line) - known == set(), path.name


def test_names_in_an_expression_are_found() -> None:
    promql = 'sum by (le, x) (rate(a_bucket{l="m"}[5m])) / on (x) group_left b:c:sum offset 1m > 2'

    assert find_names(promql) == {"a_bucket", "b:c:sum"}


def test_panels_that_may_be_empty_exist_and_say_why() -> None:
    panels = {(one.board, one.panel) for one in list_expressions()}

    assert WITHOUT_DATA.keys() <= panels
    assert all(len(reason) > 10 for reason in WITHOUT_DATA.values())


def test_lines_of_a_chart_have_names_of_their_own() -> None:
    """Several engines: as many lines a query, so its legend says of which one each is."""
    for board in BOARDS:
        for panel in (panel for row in board.rows for panel in row.panels):
            legends = [query.legend for query in panel.queries]
            assert len(set(legends)) == len(legends), panel.title
            if panel.kind != "chart":
                continue
            for query in panel.queries:
                for label in re.findall(r"^(?:topk\(\d+, )?sum by \(([^)]*)\)", query.expr):
                    missing = [
                        one for one in label.split(", ") if f"{{{{{one}}}}}" not in query.legend
                    ]
                    assert missing == [], panel.title


# What a metric's name begins with, and by which choice its series must be picked out.
CHOSEN = {
    "vllm:": ('instance=~"$engine"', 'model_name=~"$model"'),
    "engine:": ('instance=~"$engine"',),
    "launcher_": ('instance=~"$engine"',),
    "gateway_engine_": ('engine=~"(https?://)?($engine)(:.*)?"',),
    "gateway_warmup": ('engine=~"(https?://)?($engine)(:.*)?"',),
    "gateway_usage_": ('key=~"$key"',),
}


def test_choices_at_the_top_hold_for_every_panel() -> None:
    for one in list_expressions():
        for beginning, matchers in CHOSEN.items():
            names = [name for name in find_names(one.text) if name.startswith(beginning)]
            for matcher in matchers:
                assert one.text.count(matcher) >= len(names), f"{one.board}, {one.panel}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_board_has_the_same_choices_and_first_row(path: Path) -> None:
    board = read(path)
    names = [one["name"] for one in board["templating"]["list"]]
    assert names == ["datasource", "model", "engine", "key", "slo"]
    expressions = [one.text for one in list_expressions() if one.board == path.stem]
    for name in names[1:]:
        assert any(f"${name}" in text for text in expressions), f"${name} changes nothing"

    first = [panel for panel in list_panels(board) if panel["gridPos"]["y"] <= 1]
    assert [panel["title"] for panel in first] == [
        *("TTFT p95", "ITL p95", "tok/s", "Errors", "TTFT within SLO", "In flight")
    ]
    assert {panel["type"] for panel in first} == {"stat"}


# By the end of a metric's name the units of which one is right.
UNITS = {
    r"_seconds_bucket$": {"s", "percentunit"},
    r"_timestamp_seconds$|_start_time_seconds$": {"dateTimeFromNow"},
    r"_bytes$": {"bytes"},
    r"_watts$": {"watt"},
    r"_celsius$": {"celsius"},
    r"_ratio$|:ratio|kv_usage": {"percentunit"},
    r"tokens:rate1m$|usage_tokens_total$": {"si:tok/s", "si:/s", "short"},
    r"requests:rate1m$|usage_requests_total$": {"reqps"},
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_panel_has_a_description_with_its_metrics_and_the_right_unit(path: Path) -> None:
    for panel in list_panels(read(path)):
        title, unit = panel["title"], panel["fieldConfig"]["defaults"]["unit"]
        about, _, metrics = panel["description"].rpartition("\n\n")
        assert len(about) > 15, title
        asked = [Expression(path.stem, title, target["expr"]) for target in panel["targets"]]
        names = set().union(*(find_names(one.promql) for one in asked))
        shown = {re.sub("_(bucket|count|sum)$", "", name) for name in names}
        assert set(re.findall(r"`([^`]+)`", metrics)) == shown, title
        assert unit, title
        for ending, units in UNITS.items():
            if panel["type"] != "table" and any(re.search(ending, name) for name in names):
                assert unit in units, f"{title}: {unit}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_legend_of_a_chart_says_last_and_max(path: Path) -> None:
    for panel in list_panels(read(path)):
        if panel["type"] == "timeseries":
            legend = panel["options"]["legend"]
            assert legend["calcs"] == ["lastNotNull", "max"], panel["title"]
            assert legend["displayMode"] == "table", panel["title"]


def test_division_by_nought_shows_nothing() -> None:
    for one in list_expressions():
        divisors = re.findall(r" / (.*)", one.text)
        assert all(divisor.endswith(" > 0)") for divisor in divisors), one.text
