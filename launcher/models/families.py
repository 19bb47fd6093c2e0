"""Which of vLLM's parsers reads what a model writes: its calls of tools, and its thinking.

Data: `families.toml`. The chat template decides, for it is what tells the model how to write; a
model that no rule fits gets no parser, and vLLM says so to whoever sends it tools.
"""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.chat_templates import read_json_object
from launcher.models.model import Model

_DATA = Path(__file__).parent / "families.toml"
_TOOLS_FLAG = "tool-call-parser"
_SHOWS_TOOLS = re.compile(r"\btools\b")


@dataclass(frozen=True)
class ParserRule:
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


def list_parser_rules() -> list[ParserRule]:
    rows: list[dict[str, Any]] = tomllib.loads(_DATA.read_text(encoding="utf-8"))["rule"]
    return [ParserRule(**{key: _freeze(value) for key, value in rule.items()}) for rule in rows]


def find_parser_rules(model: Model, template: str) -> list[ParserRule]:
    """At most one for each flag."""
    found: dict[str, ParserRule] = {}
    for rule in list_parser_rules():
        if rule.flag not in found and rule.fits(model, template):
            found[rule.flag] = rule
    return list(found.values())


def _has_tokens(folder: Path, tokens: Iterable[str]) -> bool:
    """Whether the tokenizer has them; where no tokenizer is here the template is believed."""
    if not tokens:
        return True
    config = read_json_object(folder / "tokenizer_config.json")
    added = [*config.get("added_tokens_decoder", {}).values()]
    if not added:
        added = read_json_object(folder / "tokenizer.json").get("added_tokens", [])
    known = {token.get("content") for token in added}
    return not known or known.issuperset(tokens)


def _freeze(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
