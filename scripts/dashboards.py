"""Writes deploy/grafana/dashboards/*.json from scripts/panels.py, and deploy/prometheus/rules as
Kubernetes takes them (`make dashboards`: `python -m scripts.dashboards`).

`--check` changes nothing and says whether the files are what it would write.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import (
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from scripts.panels import BOARDS, SLO_S, STATES, Board, Panel, Query

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "deploy" / "grafana" / "dashboards"
RULES = sorted((ROOT / "deploy" / "prometheus" / "rules").glob("*.yml"))
# kustomize reads nothing outside its own folder, so the rules are there a second time.
KUBERNETES_RULES = ROOT / "deploy" / "kubernetes" / "components" / "monitoring" / "rules.yaml"
_KUBERNETES_HEAD = """\
# Written by `make dashboards` from deploy/prometheus/rules.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: vllm-gateway
spec:
  groups:
"""

_SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
_GREEN, _RED, _GREY = "green", "red", "#8e8e8e"
_STATE_COLOURS = (
    *(_GREY, "blue", "light-blue", _GREEN, "yellow"),
    *("orange", "purple", "dark-yellow", "light-purple"),
)
_SMALL, _TALL = 4, 8
_SLO = "1"
_STRINGS = re.compile(r'"[^"]*"')
_PART = re.compile("_(?:bucket|count|sum)$")  # of a histogram
_METRIC = re.compile(r"\b(?:(?:gateway|launcher|engine|vllm|process)[:_][\w:]+|ALERTS|up(?=\{))")
AnyPanel = timeseries.Panel | stat.Panel | statetimeline.Panel | heatmap.Panel | table.Panel


def build_board(board: Board) -> models.Dashboard:
    """One dashboard, as Grafana's own classes have it."""
    builder = (
        builders.Dashboard(board.title)
        .uid(f"vllm-gateway-{board.name}")
        .description(board.about)
        .tags(["vllm-gateway"])
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("10s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(
            builders.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
        )
        .link(
            builders.DashboardLink("The other dashboards")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["vllm-gateway"])
            .keep_time(True)
        )
        .annotations(list(_build_annotations()))
    )
    for choice in _build_choices():
        builder.with_variable(choice)
    for row in board.rows:
        builder.with_row(builders.Row(row.title).id(identify(board, row.title + " (row)")))
        for panel in row.panels:
            builder.with_panel(_build_panel(panel).id(identify(board, panel.title)))
    return builder.build()


def identify(board: Board, title: str) -> int:
    """A panel's number, by its title: alerts link to it, so a new panel must not shift others."""
    return zlib.crc32(f"{board.name}/{title}".encode()) % 1_000_000 + 1


def _build_choices() -> Iterator[builders.QueryVariable | builders.CustomVariable]:
    yield _build_choice("model", "Model", "label_values(vllm:num_requests_running, model_name)")
    running = 'vllm:num_requests_running{model_name=~"$model"}'
    yield _build_choice("engine", "Engine", f"label_values({running}, instance)")
    yield _build_choice("key", "Key", "label_values(gateway_usage_requests_total, key)")
    yield (
        builders.CustomVariable("slo")
        .label("SLO: TTFT, s")
        .values(",".join(SLO_S))
        .current(models.VariableOption(text=_SLO, value=_SLO, selected=True))
    )


def _build_choice(name: str, label: str, query: str) -> builders.QueryVariable:
    return (
        builders.QueryVariable(name)
        .label(label)
        .datasource(_SOURCE)
        .query(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(text="All", value="$__all", selected=True))
    )


def _build_annotations() -> Iterator[builders.AnnotationQuery]:
    """Lines through every chart where something happened that explains a step in it."""
    for name, expr, colour in (
        ("engine restarts", "sum(changes(launcher_engine_restarts_total[30s])) > 0", _RED),
        ("starts of the gateway", "changes(gateway_start_time_seconds[30s]) > 0", "blue"),
    ):
        yield (
            builders.AnnotationQuery()
            .name(name)
            .datasource(_SOURCE)
            .expr(expr)
            .icon_color(colour)
            .enable(True)
        )


def _build_panel(panel: Panel) -> AnyPanel:
    builder: AnyPanel = _KINDS[panel.kind](panel)
    builder.title(panel.title).description(_describe(panel)).datasource(_SOURCE).unit(panel.unit)
    builder.span(panel.width).height(_SMALL if panel.kind == "number" else _TALL)
    if panel.empty:
        builder.no_value(panel.empty)
    for place, query in enumerate(panel.queries):
        builder.with_target(_build_query(query, panel, chr(ord("A") + place)))
    return builder


def _describe(panel: Panel) -> str:
    """What to make of it, and what it shows: the names to search for in docs/metrics.md."""
    exprs = " ".join(_STRINGS.sub("", query.expr) for query in panel.queries)
    names = dict.fromkeys(_PART.sub("", name) for name in _METRIC.findall(exprs))
    return f"{panel.about}\n\n{', '.join(f'`{name}`' for name in names)}"


def _build_query(query: Query, panel: Panel, name: str) -> prometheus.Dataquery:
    builder = prometheus.Dataquery().expr(query.expr).ref_id(name).datasource(_SOURCE)
    builder.legend_format(query.legend or "__auto")
    if query.has_exemplars:
        builder.exemplar(True)
    if panel.kind == "table":
        return builder.instant().format(PromQueryFormat.TABLE)
    if panel.kind == "heatmap":
        return builder.range().format(PromQueryFormat.HEATMAP)
    return builder.range()


def _build_chart(panel: Panel) -> timeseries.Panel:
    builder = (
        timeseries.Panel()
        .line_width(1)
        .fill_opacity(25 if panel.is_stacked else 8)
        .show_points(common.VisibilityMode.NEVER)
        .axis_soft_min(0)
        .legend(
            common_builders.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.TABLE)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull", "max"])
        )
        .tooltip(
            common_builders.VizTooltipOptions()
            .mode(common.TooltipDisplayMode.MULTI)
            .sort(common.SortOrder.DESCENDING)
        )
    )
    if panel.is_stacked:
        builder.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
    if panel.alarm is not None:
        builder.thresholds(_build_thresholds(panel)).thresholds_style(
            common_builders.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.LINE)
        )
    return builder


def _build_number(panel: Panel) -> stat.Panel:
    return (
        stat.Panel()
        .graph_mode(common.BigValueGraphMode.AREA)
        .color_mode(common.BigValueColorMode.VALUE)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(_build_thresholds(panel))
    )


def _build_states(_panel: Panel) -> statetimeline.Panel:
    mapping = models.ValueMap(
        {
            str(place): models.ValueMappingResult(text=state, color=colour, index=place)
            for place, (state, colour) in enumerate(zip(STATES, _STATE_COLOURS, strict=True))
        }
    )
    return (
        statetimeline.Panel()
        .mappings([mapping])
        .merge_values(True)
        .show_value(common.VisibilityMode.AUTO)
        .fill_opacity(80)
    )


def _build_heatmap(_panel: Panel) -> heatmap.Panel:
    colours = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues").steps(32)
    scale = common_builders.ScaleDistributionConfig().type(common.ScaleDistribution.LINEAR)
    return heatmap.Panel().calculate(False).color(colours).cell_gap(1).scale_distribution(scale)


def _build_table(_panel: Panel) -> table.Panel:
    return table.Panel().show_header(True).filterable(True)


def _build_thresholds(panel: Panel) -> builders.ThresholdsConfig:
    below, above = (_RED, _GREEN) if panel.is_high_good else (_GREEN, _RED)
    steps = [models.Threshold(value=None, color=_GREEN if panel.alarm is None else below)]
    if panel.alarm is not None:
        steps.append(models.Threshold(value=panel.alarm, color=above))
    return builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


_KINDS: dict[str, Any] = {
    "chart": _build_chart,
    "number": _build_number,
    "states": _build_states,
    "heatmap": _build_heatmap,
    "table": _build_table,
}


def render(board: Board) -> str:
    """The file's text: sorted, so that a change shows as what it is."""
    built = build_board(board)
    return json.dumps(built, cls=JSONEncoder, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def render_rules() -> str:
    """Alerts and recording rules for the Prometheus operator: the same text, further in."""
    groups = [path.read_text(encoding="utf-8").partition("\ngroups:\n")[2] for path in RULES]
    return _KUBERNETES_HEAD + textwrap.indent("\n".join(groups), "  ")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether they are current")
    arguments = parser.parse_args()
    files = {FOLDER / f"{board.name}.json": render(board) for board in BOARDS}
    files[KUBERNETES_RULES] = render_rules()
    is_current = True
    for path, wanted in files.items():
        if not arguments.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != wanted:
            print(f"{path.relative_to(ROOT)}: run `make dashboards`")
            is_current = False
    return int(not is_current)


if __name__ == "__main__":
    sys.exit(main())
