"""The copy of a model's folder in which nothing ends an answer."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from common.project import DEMO_MODEL
from gateway.config import Settings
from gateway.prompts.builder import PromptBuilder
from lab.gpu.endless import build_endless

QUESTIONS = ["什么是 warp？", "Why?"]


async def test_endless_folder_has_the_same_prompts_and_no_end(tmp_path: Path) -> None:
    folder = build_endless(DEMO_MODEL, tmp_path)

    before = PromptBuilder(Settings(tokenizer=DEMO_MODEL))
    after = PromptBuilder(Settings(tokenizer=folder))
    assert before.stop_token_ids
    assert after.stop_token_ids == ()
    assert await after.build(QUESTIONS, None, None) == await before.build(QUESTIONS, None, None)
    assert folder.name == DEMO_MODEL.name
    assert (folder / "model.safetensors").is_file()
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert not {"eos_token", "eos_token_id"} & json.loads((folder / name).read_text()).keys()
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    assert "<|im_end|>" not in vocabulary
    assert len(vocabulary) == len(
        Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json")).get_vocab()
    )


def test_endless_folder_is_built_anew_over_an_older_one(tmp_path: Path) -> None:
    build_endless(DEMO_MODEL, tmp_path)
    assert build_endless(DEMO_MODEL, tmp_path) == tmp_path / DEMO_MODEL.name
