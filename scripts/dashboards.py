"""Writes deploy/grafana/dashboards/*.json from scripts/panels.py (`make dashboards`:
`python -m scripts.dashboards`).

`--check` changes nothing and says whether the files are what it would write.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
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

from scripts.panels import BOARDS, STATES, Board, Panel, Query

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "deploy" / "grafana" / "dashboards"

_SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
_GREEN, _RED, _GREY = "green", "red", "#8e8e8e"
_STATE_COLOURS = (_GREY, "blue", "light-blue", _GREEN, "yellow", "orange", "purple")
_SMALL, _TALL = 4, 8
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
    if board.by_engine:
        builder.with_variable(_build_choice())
    identities = itertools.count(1)
    for row in board.rows:
        builder.with_row(builders.Row(row.title).id(next(identities)))
        for panel in row.panels:
            builder.with_panel(_build_panel(panel).id(next(identities)))
    return builder.build()


def _build_choice() -> builders.QueryVariable:
    return (
        builders.QueryVariable("instance")
        .label("Engine")
        .datasource(_SOURCE)
        .query("label_values(vllm:num_requests_running, instance)")
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
    builder.title(panel.title).description(panel.about).datasource(_SOURCE).unit(panel.unit)
    builder.span(panel.width).height(_SMALL if panel.kind == "number" else _TALL)
    if panel.empty:
        builder.no_value(panel.empty)
    for place, query in enumerate(panel.queries):
        builder.with_target(_build_query(query, panel, chr(ord("A") + place)))
    return builder


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
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether they are current")
    arguments = parser.parse_args()
    is_current = True
    for board in BOARDS:
        path = FOLDER / f"{board.name}.json"
        wanted = render(board)
        if not arguments.check:
            FOLDER.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != wanted:
            print(f"{path.relative_to(ROOT)}: run `make dashboards`")
            is_current = False
    return int(not is_current)


if __name__ == "__main__":
    sys.exit(main())
