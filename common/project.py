"""What the project is: its version, which pyproject.toml alone says, and where its demo lies."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

DISTRIBUTION = "vllm-gateway"
# Beside the packages, in a checkout as in an environment that the wheel was installed into.
_DEMO = Path(__file__).parents[1] / "demo"
DEMO_MODEL = _DEMO / "model"
DEMO_QUESTIONS = _DEMO / "questions.jsonl"
_CHECKOUT = Path(__file__).parents[1] / "pyproject.toml"


def read_version() -> str:
    """A checkout says what it is itself: what is installed beside it may be older."""
    try:
        project = tomllib.loads(_CHECKOUT.read_text(encoding="utf-8"))["project"]
    except FileNotFoundError:
        return importlib.metadata.version(DISTRIBUTION)
    return str(project["version"])
