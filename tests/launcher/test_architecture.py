"""The launcher's arrows point down: a module imports only what stands on a lower floor."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "launcher"
# From the top of the house to its ground; `leash` and `parser` are programs of their own.
FLOORS = (
    ("__main__",),
    ("commands",),
    ("doctor", "tune"),
    ("up", "explain"),
    ("crash", "status", "prepare"),
    ("engine", "gateway", "supervisor", "tuned"),
    ("fingerprint", "probe", "output", "process"),
    ("command", "engine_log", "warm", "rouge"),
    ("profiles",),
    ("budget", "families"),
    ("models", "hardware", "flags"),
    ("config",),
    ("errors", "weights"),
    ("leash", "parser"),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def imported(module: str) -> set[str]:
    tree = ast.parse((FOLDER / f"{module}.py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("launcher"):
            parts = (node.module or "").split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("module", MODULES)
def test_launcher_module_imports_only_lower_floors(module: str) -> None:
    upward = {name for name in imported(module) if FLOOR_OF[name] < FLOOR_OF[module]}
    assert upward == set()


def test_importing_the_launcher_does_nothing_and_no_vllm() -> None:
    code = (
        "import sys, launcher.__main__, launcher.commands; "
        "print(sorted({'vllm', 'torch', 'gateway', 'huggingface_hub'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER.parent, capture_output=True, text=True, check=True
    )
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
