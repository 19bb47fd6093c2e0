"""A copy of a model's folder in which no token ends an answer.

Random weights end an answer by chance, now and then. /predict has no `ignore_eos`, and a call that
has it is not what the gateway sends. In this folder the tokens that end an answer have other names
and nothing refers to them, so that each answer has as many tokens as were asked for, by any way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from common.chat_templates import read_json_object, read_special_tokens
from gateway.config import Settings
from gateway.prompts.builder import PromptBuilder

_TEXTS = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
_ENDS = ("eos_token_id", "eos_token")


def build_endless(model: Path, parent: Path) -> Path:
    """Under the same name, which the engine serves it by."""
    folder = parent / model.resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    renamed = {name: f"{name[:-1]}_{name[-1]}" for name in _find_ends(model)}
    for file in model.iterdir():
        copy = folder / file.name
        copy.unlink(missing_ok=True)
        if file.name in _CONFIGS:
            content = {k: v for k, v in read_json_object(file).items() if k not in _ENDS}
            copy.write_text(_rename(json.dumps(content, ensure_ascii=False), renamed), "utf-8")
        elif file.name in _TEXTS:
            copy.write_text(_rename(file.read_text("utf-8"), renamed), "utf-8")
        else:
            copy.symlink_to(file.resolve())
    return folder


def _find_ends(model: Path) -> Iterator[str]:
    """Their names: those that the configurations give, and those that the gateway sends."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = set(PromptBuilder(Settings(tokenizer=model)).stop_token_ids)
    for name in _CONFIGS:
        ids.update(_list_ids(read_json_object(model / name).get("eos_token_id")))
    names = {tokenizer.id_to_token(one) for one in ids} | {read_special_tokens(model)["eos_token"]}
    yield from filter(None, names)


def _list_ids(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _rename(text: str, renamed: dict[str, str]) -> str:
    for name, other in renamed.items():
        text = text.replace(name, other)
    return text
