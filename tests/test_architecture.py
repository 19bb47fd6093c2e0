"""The house's arrows: a module imports only what stands below it, and handlers never each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the top of the house to its ground; modules of one floor do not know each other.
GATEWAY_FLOORS = (
    ("__main__",),
    ("app", "server", "workers"),
    ("predict", "relay", "health", "ui", "usage", "warmup", "pulse", "middleware"),
    ("pool", "admission", "body"),
    ("engine", "launchers", "prompts", "keys", "grade"),
    ("wire", "logs", "ledger", "metrics", "spans"),
    ("watch", "upstream"),
    ("connector", "errors", "config", "trace"),
)
FLOOR_OF = {name: floor for floor, names in enumerate(GATEWAY_FLOORS) for name in names}


def _modules(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("*.py"))


def _imported(path: Path, package: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if parts[0] == package:
                names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith(f"{package}.")
            }
    return names


@pytest.mark.parametrize("path", _modules("gateway"), ids=lambda path: path.stem)
def test_gateway_module_imports_only_lower_floors(path: Path) -> None:
    if path.stem == "__init__":
        assert _imported(path, "gateway") == set()
        return
    assert path.stem in FLOOR_OF, f"give {path.name} a floor in GATEWAY_FLOORS"
    upward = {name for name in _imported(path, "gateway") if FLOOR_OF[name] <= FLOOR_OF[path.stem]}
    assert upward == set()


@pytest.mark.parametrize(("package", "other"), [("gateway", "launcher"), ("launcher", "gateway")])
def test_program_shares_no_code_with_the_other(package: str, other: str) -> None:
    for path in _modules(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] != other, path
            elif isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] != other for alias in node.names), path


@pytest.mark.parametrize("package", ["gateway", "launcher"])
def test_module_import_does_nothing(package: str) -> None:
    """At the top of a module: definitions, constants and imports, no calls for their effect."""
    for path in _modules(package):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Expr):
                assert isinstance(node.value, ast.Constant), f"{path}:{node.lineno}"
