"""`python -m scripts.tree measure|check|draw`: the shape of the code as figures, faults, a picture.

`measure` and `check` take the folder of any tree of this project, such as an older clone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from scripts.tree import imports, sizes
from scripts.tree.call_paths import NotMeasured, measure_call_paths
from scripts.tree.drawing import draw_project
from scripts.tree.modules import (
    PRODUCT,
    PROGRAMS,
    Module,
    read_modules,
    select_product_and_lab,
)

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "images" / "tree.svg"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.tree", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (("measure", "print figures"), ("check", "print faults, exit 1 if any")):
        command = commands.add_parser(name, help=about)
        command.add_argument("folder", nargs="?", type=Path, default=ROOT)
        if name == "measure":
            command.add_argument("--json", type=Path, metavar="FILE", help="write them here, too")
            command.add_argument("--verbose", action="store_true", help="and name what was counted")
    commands.add_parser("draw", help="write docs/images/tree.svg")
    options = parser.parse_args()
    if options.command == "measure":
        return measure(options.folder.resolve(), options.json, is_verbose=options.verbose)
    if options.command == "check":
        return check(options.folder.resolve())
    PICTURE.write_text(draw_project(imports.read_project(ROOT)), encoding="utf-8")
    return 0


def check(root: Path) -> int:
    project = imports.read_project(root)
    faults = [fault for find in imports.CHECKS for fault in find(project)]
    for fault in faults:
        print(fault)
    return 1 if faults else 0


def measure(root: Path, target: Path | None, *, is_verbose: bool) -> int:
    modules = read_modules(root)
    if not modules:
        print(f"tree: {root} holds no program of this project", file=sys.stderr)
        return 2
    figures = measure_text(root, modules)
    try:
        paths = asyncio.run(measure_call_paths(root))
    except NotMeasured as error:
        print(f"tree: {error}", file=sys.stderr)
        return 1
    figures["call paths"] = {one.name: {"frames": one.frames, "files": one.files} for one in paths}
    for line in format_figures(figures, is_verbose=is_verbose):
        print(line)
    if target is not None:
        target.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return 0


def measure_text(root: Path, modules: list[Module]) -> dict[str, Any]:
    """Lists of what was found, not only how much, so that two trees can be compared by name."""
    programs = {name: [one for one in modules if one.program == name] for name in PROGRAMS}
    product = [one for one in modules if one.program in PRODUCT]
    inside, project = select_product_and_lab(modules), imports.read_project(root)
    duplicates = sizes.find_duplicates(inside)
    return {
        "programs": {name: sizes.count_lines(own) for name, own in programs.items()},
        "functions over 50 lines": {
            name: sizes.find_long_functions(own) for name, own in programs.items()
        },
        "names used twice": {
            "modules": sizes.find_repeated_modules(inside),
            "classes": sizes.find_repeated_classes(inside, are_private=False),
            "private classes": sizes.find_repeated_classes(inside, are_private=True),
        },
        "suppressed findings": {
            "product": sizes.find_suppressed(product),
            "lab and scripts": sizes.find_suppressed(programs["lab"] + programs["scripts"]),
            "tests": sizes.find_suppressed(programs["tests"]),
            "rules in pyproject.toml": sizes.find_ignored_rules(root),
        },
        "duplicates": {
            "pairs": list(map(str, duplicates)),
            "lines": len(set().union(*(one.lines for one in duplicates))),
        },
        "modules per folder": dict(imports.count_by_folder(modules).most_common()),
        "imports": {
            "folders of more than twelve modules": imports.find_crowded_folders(project),
            "import cycles": imports.find_cycles(project),
            "upward imports": imports.find_upward_imports(project) if project.order else None,
        },
    }


def format_figures(figures: Mapping[str, Any], *, is_verbose: bool) -> Iterator[str]:
    """Two Markdown tables, to be laid beside those of another tree."""
    yield from ("| program | modules | lines | code |", "|---|--:|--:|--:|")
    for name, own in figures["programs"].items():
        yield f"| {name} | {own['modules']} | {own['lines']} | {own['code']} |"
    yield from ("", "| measure | number |", "|---|--:|")
    for name, number, details in list_rows(figures):
        yield f"| {name} | {number} |"
        if is_verbose:
            yield from (f"|   {detail} | |" for detail in details)


def list_rows(figures: Mapping[str, Any]) -> Iterator[tuple[str, str, Iterable[str]]]:
    """Each measure's name, its number, and what was counted."""
    for name, path in figures["call paths"].items():
        frames, files = path["frames"], path["files"]
        yield f"{name}: frames, files", f"{len(frames)}, {len(files)}", frames
    for group in ("functions over 50 lines", "names used twice", "suppressed findings"):
        for name, found in figures[group].items():
            yield f"{group}: {name}", str(len(found)), found
    pairs, lines = figures["duplicates"]["pairs"], figures["duplicates"]["lines"]
    yield "duplicates: pairs, lines", f"{len(pairs)}, {lines}", pairs
    folders = figures["modules per folder"]
    largest = next(iter(folders), "none")
    each = (f"{name}: {count}" for name, count in folders.items())
    yield f"modules in the largest folder, {largest}", str(folders.get(largest, 0)), each
    for name, found in figures["imports"].items():
        number = "no order declared" if found is None else str(len(found))
        yield name, number, found or ()


if __name__ == "__main__":
    sys.exit(main())
