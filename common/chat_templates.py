"""What a model's folder says of how it is written to: chat templates and the tokens they name.

Rendering a template is the gateway's work, telling a model's family by it the launcher's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from common.files import read_file, read_text

DEFAULT = "default"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def read_chat_templates(folder: Path) -> dict[str, str]:
    """By name; what a file of its own says wins over the tokenizer's configuration."""
    found: dict[str, str] = {}
    for name in ("chat_template.json", "tokenizer_config.json"):
        value = read_json_object(folder / name).get("chat_template")
        rows = value if isinstance(value, list) else [{"name": DEFAULT, "template": value}]
        for row in rows:
            if isinstance(row, dict) and isinstance(row.get("template"), str):
                found[str(row.get("name") or "")] = row["template"]
    for file in (folder / "additional_chat_templates").glob("*.jinja"):
        found[file.stem] = read_text(file)
    file = folder / "chat_template.jinja"
    if file.is_file():
        found[DEFAULT] = read_text(file)
    return found


def read_special_tokens(folder: Path) -> dict[str, str]:
    """bos_token and its like: templates write them by these names."""
    config = read_json_object(folder / "tokenizer_config.json")
    texts = {}
    for name in _SPECIAL_TOKENS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        texts[name] = text if isinstance(text, str) else ""
    return texts


def read_json_object(path: Path) -> dict[str, Any]:
    """Empty where there is none: a folder need not have every file."""
    try:
        value = orjson.loads(read_file(path))
    except (OSError, orjson.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}
