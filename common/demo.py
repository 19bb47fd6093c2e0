"""Where the demo model and its questions lie: beside the packages, in a checkout as in a wheel."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parents[1] / "demo"
MODEL = _FOLDER / "model"
QUESTIONS = _FOLDER / "questions.jsonl"
