"""What can be counted in the text: lines, long functions, repeated names, suppressed findings,
duplicated code.
"""

from __future__ import annotations

import ast
import keyword
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from scripts.tree.imports import read_tool_table
from scripts.tree.modules import Module

MOST_LINES = 50  # of a function
_WINDOW = 6  # lines; shorter likeness is how Python looks
_FEWEST_TOKENS = 40  # in a window: six short lines of any two dataclasses are alike
_SUPPRESSED = re.compile(r"#\s*(?:ruff:\s*)?(noqa|type:\s*ignore)\b")


def count_lines(modules: Sequence[Module]) -> dict[str, int]:
    return {
        "modules": len(modules),
        "lines": sum(len(module.text.splitlines()) for module in modules),
        "code": sum(len(module.code) for module in modules),
    }


def find_long_functions(modules: Iterable[Module]) -> list[str]:
    """From the `def` to the last line."""
    return [
        f"{module.path}:{node.lineno} {node.name}, {length} lines"
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MOST_LINES
    ]


def find_repeated_modules(modules: Iterable[Module]) -> list[str]:
    """File names that more than one folder has."""
    return _find_repeated((module.path.name, module) for module in modules if module.is_counted)


def find_repeated_classes(modules: Iterable[Module], *, are_private: bool) -> list[str]:
    return _find_repeated(
        (node.name, module)
        for module in modules
        for node in module.tree.body
        if isinstance(node, ast.ClassDef) and node.name.startswith("_") == are_private
    )


def _find_repeated(named: Iterable[tuple[str, Module]]) -> list[str]:
    places: defaultdict[str, list[str]] = defaultdict(list)
    for name, module in named:
        places[name].append(str(module.path))
    return [f"{name}: {', '.join(at)}" for name, at in sorted(places.items()) if len(at) > 1]


def find_suppressed(modules: Iterable[Module]) -> list[str]:
    return [
        f"{module.path}:{token.start[0]} {token.string}"
        for module in modules
        for token in module.tokens
        if token.type == tokenize.COMMENT and _SUPPRESSED.search(token.string)
    ]


def find_ignored_rules(root: Path) -> list[str]:
    """What ruff's settings leave out: everywhere, or for some files."""
    lint = read_tool_table(root, "ruff", "lint")
    everywhere = [str(code) for code in lint.get("ignore", ())]
    files = lint.get("per-file-ignores", {}).items()
    return everywhere + [f"{pattern} {code}" for pattern, codes in files for code in codes]


@dataclass(frozen=True)
class Duplicate:
    """Two places, each with its first and last line, that are alike but for names and values."""

    places: Sequence[tuple[Path, int, int]]
    length: int  # in lines of code

    @property
    def lines(self) -> set[tuple[Path, int]]:
        return {(path, n) for path, start, end in self.places for n in range(start, end + 1)}

    def __str__(self) -> str:
        where = " and ".join(f"{path}:{start}-{end}" for path, start, end in self.places)
        return f"{where}, {self.length} lines"


Line = tuple[int, tuple[str, ...]]


def find_duplicates(modules: Sequence[Module]) -> list[Duplicate]:
    """Windows of lines that are alike, merged where they overlap."""
    lines = [list(_read_lines(module)) for module in modules]
    places: defaultdict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    for file, content in enumerate(lines):
        for start in range(len(content) - _WINDOW + 1):
            window = content[start : start + _WINDOW]
            if sum(len(tokens) for _, tokens in window) >= _FEWEST_TOKENS:
                places[_build_key(window)].append((file, start))
    pairs: defaultdict[tuple[int, int, int], list[int]] = defaultdict(list)
    for alike in places.values():
        for (file, start), (other, begin) in combinations(alike, 2):
            if file != other or begin - start >= _WINDOW:
                pairs[file, other, begin - start].append(start)
    found = []
    for (file, other, shift), starts in sorted(pairs.items()):
        for first, last in _merge(sorted(starts)):
            spans = ((file, first, last), (other, first + shift, last + shift))
            regions = [(modules[at].path, lines[at][a][0], lines[at][b][0]) for at, a, b in spans]
            found.append(Duplicate(regions, last - first + 1))
    return _drop_covered(found)


def _drop_covered(duplicates: Iterable[Duplicate]) -> list[Duplicate]:
    """Lines that are alike among themselves match in many ways; the longest says it all."""
    kept: list[Duplicate] = []
    covered: set[tuple[Path, int]] = set()
    for duplicate in sorted(duplicates, key=lambda one: one.length, reverse=True):
        if not duplicate.lines <= covered:
            kept.append(duplicate)
            covered |= duplicate.lines
    return kept


def _read_lines(module: Module) -> Iterator[Line]:
    """Names are marked, strings and numbers are all the same; imports are not duplicated code."""
    imports = {
        number
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    for number, tokens in sorted(module.code.items()):
        if number not in imports:
            yield number, tuple(map(_normalise, tokens))


def _normalise(token: tokenize.TokenInfo) -> str:
    if token.type == tokenize.NAME and not keyword.iskeyword(token.string):
        return f"name {token.string}"
    return token.string if token.type in {tokenize.NAME, tokenize.OP} else "value"


def _build_key(window: Sequence[Line]) -> tuple[str, ...]:
    """Names are numbered as they come: `a = f(a)` is like `b = g(b)` and unlike `b = g(c)`."""
    numbers: dict[str, str] = {}
    key = []
    for _, tokens in window:
        for token in tokens:
            is_name = token.startswith("name ")
            key.append(numbers.setdefault(token, str(len(numbers))) if is_name else token)
        key.append("\n")
    return tuple(key)


def _merge(starts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of windows that touch, each as its first and last line."""
    first = last = starts[0]
    for start in starts[1:]:
        if start > last + _WINDOW:
            yield first, last + _WINDOW - 1
            first = start
        last = start
    yield first, last + _WINDOW - 1
