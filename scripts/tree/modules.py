"""The Python files of a tree as text, syntax and tokens; nothing of them is imported or run."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeGuard

PRODUCT = ("gateway", "launcher", "common")
PROGRAMS = (*PRODUCT, "lab", "scripts", "demo", "tests")
_LAYOUT = frozenset(
    (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
)


@dataclass(frozen=True)
class Module:
    """One file; `path` is relative to the tree's root."""

    path: Path
    text: str

    @property
    def program(self) -> str:
        return self.path.parts[0]

    @property
    def name(self) -> str:
        """As an import says it; a package's `__init__` is the package."""
        return ".".join(self.path.with_suffix("").parts).removesuffix(".__init__")

    @property
    def is_counted(self) -> bool:
        """`__init__` and `__main__` are in every package and tell nobody apart."""
        return self.path.stem not in {"__init__", "__main__"}

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, str(self.path))

    @cached_property
    def tokens(self) -> list[tokenize.TokenInfo]:
        return list(tokenize.generate_tokens(io.StringIO(self.text).readline))

    @cached_property
    def code(self) -> dict[int, list[tokenize.TokenInfo]]:
        """The tokens of each line that is neither blank nor comment nor docstring."""
        prose = set(self._list_docstring_lines())
        lines: dict[int, list[tokenize.TokenInfo]] = {}
        for token in self.tokens:
            if token.type == tokenize.COMMENT or token.type in _LAYOUT or token.start[0] in prose:
                continue
            lines.setdefault(token.start[0], []).append(token)
            for number in range(token.start[0] + 1, token.end[0] + 1):
                lines.setdefault(number, [])  # a string's further lines
        return lines

    def _list_docstring_lines(self) -> Iterator[int]:
        for node in ast.walk(self.tree):
            if is_docstring(node):
                yield from range(node.lineno, (node.end_lineno or node.lineno) + 1)


def is_docstring(node: ast.AST) -> TypeGuard[ast.Expr]:
    """Any bare string: one below an attribute is prose, too."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def read_modules(root: Path, programs: Iterable[str] = PROGRAMS) -> list[Module]:
    """In the order of the programs, then of the paths."""
    return [
        Module(path.relative_to(root), path.read_text(encoding="utf-8"))
        for program in programs
        for path in sorted((root / program).rglob("*.py"))
    ]


def select_product_and_lab(modules: Iterable[Module]) -> list[Module]:
    """Where there is no lab yet, its tools lie among the scripts."""
    modules = list(modules)
    lab = "lab" if any(module.program == "lab" for module in modules) else "scripts"
    return [module for module in modules if module.program in (*PRODUCT, lab)]
