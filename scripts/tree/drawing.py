"""The picture of the code: docs/images/tree.svg, drawn from the real imports.

A program is a column, a folder a box on its floor. Each box that imports has a line of its own at
the right of the column, with an arrow into every box that it imports from; between programs there
is one arrow a pair. The colours follow a light or dark page, over a ground of the picture's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby

from scripts.tree.imports import Project, find_floor
from scripts.tree.modules import PRODUCT

_SHOWN = (*PRODUCT, "lab")
_GROUND = frozenset(("config", "errors", "paths"))  # everybody may import these: arrows say nothing
_BOX, _MARGIN, _GAP = 208, 36, 12  # a box's width, around the picture, between boxes
_ENTRY, _LANE, _LETTER = 14, 11, 5.9  # between arrows, between lines, a letter's width
_COLOURS = ("#2f81f7", "#d9730d", "#3fa45b", "#a371f7", "#1b9aaa", "#b08800", "#8a7f72", "#bf5aa8")
_WRONG, _BETWEEN = "#e5484d", "#818b98"  # an arrow that points up; one between programs
_STYLE = """
  text { font-family: system-ui, sans-serif; fill: #1f2328 }
  .ground { fill: #ffffff } .floor { fill: #f2f4f7 }
  .box { fill: #ffffff; stroke: #afb8c1 }
  .program { fill: none; stroke: #d1d9e0 }
  .title { font-size: 19px; font-weight: 600 } .folder { font-size: 13px; font-weight: 600 }
  .modules, .note { font-size: 11px; fill: #59636e } .count { font-size: 10px; fill: #59636e }
  path { fill: none; stroke-width: 1.3 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .ground { fill: #0d1117 } .floor { fill: #161b22 }
    .box { fill: #21262d; stroke: #3d444d } .program { stroke: #3d444d }
    .modules, .note, .count { fill: #9198a1 }
  }
"""


@dataclass
class Box:
    """A folder, or a module that stands beside the folders; `y` is its upper edge."""

    name: str
    floor: int
    lines: Sequence[str]
    x: float = 0
    y: float = 0
    sources: list[Box] = field(default_factory=list)

    @property
    def height(self) -> float:
        text = 30 + 15 * len(self.lines)
        return max(text, 27 + _ENTRY * len(self.sources))

    @property
    def bottom(self) -> float:
        return self.y + self.height


@dataclass
class Column:
    """One program's boxes, from top to bottom."""

    name: str
    boxes: Sequence[Box]
    arrows: Counter[tuple[str, str]]
    x: float = 0

    @property
    def importing(self) -> list[Box]:
        """The uppermost has the outermost line: fewest lines cross so."""
        return [box for box in self.boxes if any(name == box.name for name, _ in self.arrows)]

    @property
    def width(self) -> float:
        return _BOX + (_LANE * len(self.importing) + 22 if self.arrows else 0)


def draw_project(project: Project) -> str:
    """The whole file."""
    columns = [build_column(project, name) for name in list_programs(project)]
    x, height = float(_MARGIN), 0.0
    for column in columns:
        height = max(height, place(column, x))
        x += column.width + 2 * _MARGIN
    pairs = count_pairs(project)
    width, bottom = x - _MARGIN, height + 26 + 24 * len(pairs)
    parts = [part for column in columns for part in draw_column(column, height)]
    parts += draw_pairs(columns, pairs, height)
    parts.append(
        text(
            _MARGIN,
            bottom + 24,
            "note",
            "An arrow points from a folder to one it imports from; its number says by how many "
            f"imports. Those into {', '.join(sorted(_GROUND))} are left out.",
        )
    )
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {bottom + 44:g}">',
            f"<title>The folders of the code and their imports</title><style>{_STYLE}</style>",
            f'<rect class="ground" width="{width:g}" height="{bottom + 44:g}" rx="10"/>',
            *parts,
            "</svg>\n",
        )
    )


def list_programs(project: Project) -> list[str]:
    present = {module.program for module in project.modules}
    return [name for name in _SHOWN if name in present]


def build_column(project: Project, program: str) -> Column:
    """A program without a declared order is one box; one with it has a box for each name."""
    floors = project.order.get(program, ())
    modules: dict[str, list[str]] = {}
    for module in project.modules:
        _, *inner = module.path.with_suffix("").parts
        if module.program == program and inner != ["__init__"]:
            shown = modules.setdefault(inner[0] if floors else program, [])
            if (len(inner) > 1 or not floors) and module.is_counted:
                shown.append("/".join(inner[1:] if floors else inner))
    boxes = []
    for name, shown in modules.items():
        floor = find_floor(floors, [name])
        boxes.append(Box(name, len(floors) if floor is None else floor, list(wrap(shown))))
    boxes.sort(key=lambda box: box.floor)
    arrows = Counter(
        (above[1], below[1])
        for above, below in list_arrows(project)
        if floors and above[0] == below[0] == program and len(above) > 1 < len(below)
        if above[1] != below[1] and below[1] not in _GROUND
    )
    return Column(program, boxes, arrows)


def list_arrows(project: Project) -> Iterator[tuple[list[str], list[str]]]:
    for source, targets in project.graph.items():
        for target in targets:
            yield source.split("."), target.split(".")


def count_pairs(project: Project) -> list[tuple[str, str, int]]:
    """Of programs that are drawn, with the number of imports."""
    counts = Counter(
        (above[0], below[0]) for above, below in list_arrows(project) if above[0] != below[0]
    )
    return [(*pair, n) for pair, n in sorted(counts.items()) if set(pair) <= set(_SHOWN)]


def wrap(names: Iterable[str]) -> Iterator[str]:
    line = ""
    for name in names:
        longer = f"{line}, {name}" if line else name
        if line and len(longer) * _LETTER > _BOX - 28:
            yield f"{line},"
            longer = name
        line = longer
    if line:
        yield line


def place(column: Column, x: float) -> float:
    """Gives every box its place, and tells where the column ends."""
    column.x = x
    for box in reversed(column.importing):  # the next one above comes in first
        for other in column.boxes:
            if (box.name, other.name) in column.arrows:
                other.sources.append(box)
    y = 84.0
    for _, floor in groupby(column.boxes, key=lambda box: box.floor):
        for box in floor:
            box.x, box.y = x, y
            y = box.bottom + _GAP
        y += 2 * _GAP
    return y - _GAP


def draw_column(column: Column, bottom: float) -> Iterator[str]:
    yield rectangle("program", column.x - 22, 18, column.width + 44, bottom - 18)
    yield text(column.x, 52, "title", column.name)
    for _, floor in groupby(column.boxes, key=lambda box: box.floor):
        boxes = list(floor)
        top, end = boxes[0].y - 9, boxes[-1].bottom + 9
        yield rectangle("floor", column.x - 10, top, column.width + 20, end - top)
    for number, box in enumerate(column.importing):
        lane = column.x + column.width - _LANE * number
        yield from draw_arrows(column, box, lane, _COLOURS[number % len(_COLOURS)])
    for box in column.boxes:
        yield rectangle("box", box.x, box.y, _BOX, box.height)
        yield text(box.x + 11, box.y + 20, "folder", box.name)
        for number, line in enumerate(box.lines):
            yield text(box.x + 11, box.y + 38 + 15 * number, "modules", line)


def draw_arrows(column: Column, source: Box, lane: float, colour: str) -> Iterator[str]:
    """One line down from the source, and a branch into each box that it imports from."""
    edge, start, end = column.x + _BOX, source.y + 11, source.y + 11
    for box in column.boxes:
        if source in box.sources:
            y = box.y + 27 + _ENTRY * box.sources.index(source)
            is_upward = box.floor <= source.floor
            stroke = _WRONG if is_upward else colour
            if is_upward:
                yield line(stroke, f"M{lane:g} {start:g}V{y:g}")
            end = max(y, end)
            yield line(stroke, f"M{lane:g} {y:g}H{edge + 6:g}")
            yield arrow_head(edge, y, -7, 0, stroke)
            yield text(edge + 10, y - 3, "count", str(column.arrows[source.name, box.name]))
    yield line(colour, f"M{edge:g} {start:g}H{lane:g}V{end:g}")


def draw_pairs(
    columns: Sequence[Column], pairs: Sequence[tuple[str, str, int]], top: float
) -> Iterator[str]:
    """Below the programs, each pair on a level of its own."""
    by_name = {column.name: column for column in columns}
    for level, (source, target, count) in enumerate(pairs):
        y = top + 26 + 24 * level
        start, end = (by_name[name].x + 20 + 16 * level for name in (source, target))
        yield line(_BETWEEN, f"M{start:g} {top:g}V{y:g}H{end:g}V{top + 6:g}")
        yield arrow_head(end, top, 0, -7, _BETWEEN)
        yield text((start + end) / 2, y - 5, "note", f"{source} to {target}: {count}")


def line(colour: str, path: str) -> str:
    return f'<path stroke="{colour}" d="{path}"/>'


def arrow_head(x: float, y: float, dx: float, dy: float, colour: str) -> str:
    """Its tip at x, y; it points along dx, dy."""
    corners = ((x, y), (x - dx + dy / 2, y - dy + dx / 2), (x - dx - dy / 2, y - dy - dx / 2))
    points = " ".join(f"{across:g},{down:g}" for across, down in corners)
    return f'<polygon fill="{colour}" points="{points}"/>'


def rectangle(style: str, x: float, y: float, width: float, height: float) -> str:
    return (
        f'<rect class="{style}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>'
    )


def text(x: float, y: float, style: str, content: str) -> str:
    return f'<text class="{style}" x="{x:g}" y="{y:g}">{escape(content)}</text>'
