"""Chat templates in all the places where models have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.chat_templates import read_chat_templates, read_special_tokens


def write(folder: Path, name: str, **fields: Any) -> None:
    (folder / name).write_text(json.dumps(fields), encoding="utf-8")


def test_template_of_the_tokenizers_configuration_is_the_default(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", chat_template="a")
    assert read_chat_templates(tmp_path) == {"default": "a"}


def test_templates_by_name_are_all_found(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    write(tmp_path, "tokenizer_config.json", chat_template=named)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("c")
    assert read_chat_templates(tmp_path) == {"default": "a", "tool_use": "b", "rag": "c"}


def test_file_of_its_own_wins_over_the_configuration_and_that_over_a_processors(
    tmp_path: Path,
) -> None:
    write(tmp_path, "chat_template.json", chat_template="processor")
    assert read_chat_templates(tmp_path) == {"default": "processor"}
    write(tmp_path, "tokenizer_config.json", chat_template="configuration")
    assert read_chat_templates(tmp_path) == {"default": "configuration"}
    (tmp_path / "chat_template.jinja").write_text("文件", encoding="utf-8")
    assert read_chat_templates(tmp_path) == {"default": "文件"}


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"chat_template": 3}', '{"chat_template": [1, {"name": "default"}]}', "{}"]
)
def test_folder_without_a_usable_template_has_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(text)
    assert read_chat_templates(tmp_path) == {}
    assert read_chat_templates(tmp_path / "nowhere") == {}


def test_special_tokens_are_texts_or_objects_and_never_missing(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", bos_token="<s>", eos_token={"content": "</s>"})
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "", "unk_token": ""}
    assert read_special_tokens(tmp_path) == tokens
    assert set(read_special_tokens(tmp_path / "nowhere").values()) == {""}
