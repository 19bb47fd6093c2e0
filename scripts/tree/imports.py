"""Who imports whom, and what is wrong with it by the order that pyproject.toml declares.

The order is a list of floors for a folder, from top to bottom: a name imports what stands on lower
floors, and names on one floor do not import each other. `*` stands for every name that the list
does not hold. Imports inside functions and for types alone count like any other.
"""

from __future__ import annotations

import ast
import graphlib
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from scripts.tree.modules import PRODUCT, Module, is_docstring, read_modules

Graph = Mapping[str, set[str]]
Floors = Sequence[Sequence[str]]
TOP = "."  # the folder that holds the programs


@dataclass(frozen=True)
class Project:
    """A tree's modules, their imports of each other, and the order they should keep."""

    modules: Sequence[Module]
    graph: Graph
    order: Mapping[str, Floors]
    most_modules: int


def read_project(root: Path) -> Project:
    """The programs that the order names; where none is declared, all but the tests."""
    table = read_tool_table(root, "tree")
    order: dict[str, Floors] = table.get("order", {})
    programs = [name for floor in order.get(TOP, ()) for name in floor]
    modules = read_modules(root, programs or (*PRODUCT, "lab", "scripts", "demo"))
    return Project(modules, read_imports(modules), order, table.get("most_modules", 12))


def read_tool_table(root: Path, *names: str) -> dict[str, Any]:
    """`[tool.…]` of the tree's pyproject.toml; empty where there is none."""
    path = root / "pyproject.toml"
    table = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in ("tool", *names):
        table = table.get(name, {})
    return table


def read_imports(modules: Sequence[Module]) -> dict[str, set[str]]:
    """For each module the modules of the same tree that it imports."""
    known = {module.name for module in modules}
    graph: dict[str, set[str]] = {}
    for module in modules:
        found = {_find_module(name, known) for name in _list_imported(module)}
        graph[module.name] = found - {"", module.name}
    return graph


def _list_imported(module: Module) -> Iterator[str]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                folder = module.path.parts[:-1]
                base = [*folder[: len(folder) - node.level + 1], *base]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def _find_module(name: str, known: set[str]) -> str:
    """`gateway.config.Settings` is part of `gateway.config`; another library's name of nothing."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def find_cycles(project: Project) -> list[str]:
    """One for each group of modules that import each other."""
    reached = {name: _reach(project.graph, name) for name in project.graph}
    groups = {
        frozenset(other for other in reached[name] if name in reached[other])
        for name in project.graph
        if name in reached[name]
    }
    return sorted(f"cycle: {' < '.join(_find_cycle(project.graph, group))}" for group in groups)


def _reach(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


def _find_cycle(graph: Graph, group: frozenset[str]) -> list[str]:
    sorter = graphlib.TopologicalSorter({name: sorted(graph[name] & group) for name in group})
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def find_upward_imports(project: Project) -> list[str]:
    """Of what stands above, or beside on the same floor."""
    return [
        f"upward: {source} imports {target}"
        for source, targets in project.graph.items()
        for target in sorted(targets)
        if points_up(project.order, source, target)
    ]


def points_up(order: Mapping[str, Floors], source: str, target: str) -> bool:
    """Judged where the two names part: in the innermost folder that holds both."""
    upper, lower = source.split("."), target.split(".")
    depth = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(upper, lower, strict=False))))
    floors = order.get(".".join(upper[:depth]) or TOP)
    if floors is None:
        return False
    start, end = (find_floor(floors, parts[depth : depth + 1]) for parts in (upper, lower))
    return start is not None and end is not None and start >= end


def find_floor(floors: Floors, name: Sequence[str]) -> int | None:
    """Counted from the top; `name` is empty for the folder's own `__init__`, which is the ground:
    everybody may import it, and it imports nothing of its folder.
    """
    if not name:
        return len(floors)
    for wanted in (name[0], "*"):
        for number, floor in enumerate(floors):
            if wanted in floor:
                return number
    return None


def find_unplaced(project: Project) -> list[str]:
    """Names without a floor in a folder whose order is declared."""
    unplaced = {
        (folder, parts[depth])
        for parts in (module.name.split(".") for module in project.modules)
        for depth in range(len(parts))
        for folder in [".".join(parts[:depth]) or TOP]
        if folder in project.order and find_floor(project.order[folder], parts[depth:]) is None
    }
    return sorted(f"unplaced: {folder} has no floor for {name}" for folder, name in unplaced)


def find_crowded_folders(project: Project) -> list[str]:
    """Folders with more modules than a reader takes in at a glance."""
    return [
        f"crowded: {folder} holds {count} modules, more than {project.most_modules}"
        for folder, count in sorted(count_by_folder(project.modules).items())
        if count > project.most_modules
    ]


def count_by_folder(modules: Sequence[Module]) -> Counter[str]:
    return Counter(str(module.path.parent) for module in modules if module.is_counted)


def find_import_effects(project: Project) -> list[str]:
    """At the top of a module: definitions, constants and imports, no calls for their effect."""
    return [
        f"effect: {module.path}:{node.lineno} does something when it is imported"
        for module in project.modules
        if module.program in (*PRODUCT, "lab")
        for node in module.tree.body
        if isinstance(node, ast.Expr) and not is_docstring(node)
    ]


CHECKS = (
    find_cycles,
    find_upward_imports,
    find_unplaced,
    find_crowded_folders,
    find_import_effects,
)
