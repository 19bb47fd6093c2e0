"""Which of vLLM's parsers reads what a model writes: its calls of tools, and its thinking.

Data: `families.toml`. The chat template decides, for it is what tells the model how to write; a
model that no row fits gets no parser, and vLLM says so to whoever sends it tools.
"""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.models.model import Model

_DATA = Path(__file__).parent / "families.toml"
_TOOLS_FLAG = "tool-call-parser"
_SHOWS_TOOLS = re.compile(r"\btools\b")


@dataclass(frozen=True)
class Row:
    """One parser and the models that it reads."""

    flag: str
    parser: str
    family: str
    models: tuple[str, ...]
    template: tuple[str, ...]
    reason: str
    source: str
    without: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()

    def fits(self, model: Model, template: str) -> bool:
        if not any(fnmatch.fnmatchcase(model.model_type, pattern) for pattern in self.models):
            return False
        if self.flag == _TOOLS_FLAG and not _SHOWS_TOOLS.search(template):
            return False
        has_all = all(text in template for text in self.template)
        has_none = not any(text in template for text in self.without)
        return has_all and has_none and _has_tokens(model.path, self.tokens)


def list_rows() -> list[Row]:
    rows: list[dict[str, Any]] = tomllib.loads(_DATA.read_text(encoding="utf-8"))["row"]
    return [Row(**{key: _freeze(value) for key, value in row.items()}) for row in rows]


def find_rows(model: Model, template: str) -> list[Row]:
    """At most one for each flag."""
    found: dict[str, Row] = {}
    for row in list_rows():
        if row.flag not in found and row.fits(model, template):
            found[row.flag] = row
    return list(found.values())


def _has_tokens(folder: Path, tokens: Iterable[str]) -> bool:
    """Whether the tokenizer has them; where no tokenizer is here the template is believed."""
    if not tokens:
        return True
    config = _read(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).values()
    whole = _read(folder / "tokenizer.json").get("added_tokens", []) if not config else []
    known = {token.get("content") for token in (*config, *whole)}
    return not known or known.issuperset(tokens)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _freeze(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
