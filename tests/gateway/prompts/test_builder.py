"""Questions become the very prompts the model was trained on, and answers come out clean."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
from tokenizers import Tokenizer

from gateway.config import SettingsError
from gateway.errors import InvalidRequest, PayloadTooLarge, PromptRefused
from gateway.prompts.builder import PromptBuilder
from tests.fake_engine import MODEL_FOLDER
from tests.gateway.conftest import make_settings

TOKENIZER = Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))


async def _text(builder: PromptBuilder, question: str, system: str | None = None) -> str:
    prompt = (await builder.build([question], system, None))[0]
    assert isinstance(prompt, array)
    return TOKENIZER.decode(prompt.tolist(), skip_special_tokens=False)


def _folder(tmp_path: Path, **config: Any) -> Path:
    """A model folder with the demo's tokenizer and a configuration of one's own."""
    (tmp_path / "tokenizer.json").write_bytes((MODEL_FOLDER / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_bytes(orjson.dumps(config))
    return tmp_path


async def test_chat_style_is_the_models_own_template() -> None:
    builder = PromptBuilder(make_settings(enable_thinking=True))

    assert await _text(builder, "问?") == "<|im_start|>user\n问?<|im_end|>\n<|im_start|>assistant\n"


async def test_chat_style_without_thinking_ends_in_an_empty_think_block() -> None:
    builder = PromptBuilder(make_settings())

    assert (await _text(builder, "q")).endswith("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        (
            "chatml",
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        ("qa", "S\n\nQ: q\nA:"),
        ("raw", "Sq"),
    ],
)
async def test_plain_styles_put_the_system_prompt_first(style: str, expected: str) -> None:
    builder = PromptBuilder(make_settings(prompt_style=style, system_prompt="S"))

    assert await _text(builder, "q") == expected


async def test_system_of_the_request_replaces_the_settings() -> None:
    builder = PromptBuilder(make_settings(prompt_style="raw", system_prompt="S"))

    assert await _text(builder, "q", system="T") == "Tq"
    assert await _text(builder, "q", system="") == "q"


async def test_template_that_trims_is_rendered_for_each_question(tmp_path: Path) -> None:
    folder = _folder(tmp_path, chat_template="[{{ messages[-1].content | trim }}]")
    builder = PromptBuilder(make_settings(tokenizer=folder))

    assert await _text(builder, "  q ") == "[q]"


async def test_template_gets_the_special_tokens_and_tojson(tmp_path: Path) -> None:
    template = "{{ bos_token }}{{ messages[-1].content | tojson }}"
    folder = _folder(tmp_path, chat_template=template, bos_token={"content": "<|endoftext|>"})
    builder = PromptBuilder(make_settings(tokenizer=folder))

    assert await _text(builder, 'a"b') == '<|endoftext|>"a\\"b"'


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "no chat template"), ("{% if %}", "cannot be read")],
)
def test_chat_style_with_a_bad_template_stops_the_start(
    tmp_path: Path, template: str | None, message: str
) -> None:
    folder = _folder(tmp_path, chat_template=template)

    with pytest.raises(SettingsError, match=message):
        PromptBuilder(make_settings(tokenizer=folder))


def test_broken_tokenizer_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")

    with pytest.raises(SettingsError, match=r"tokenizer\.json"):
        PromptBuilder(make_settings(tokenizer=tmp_path, prompt_style="raw"))


def test_template_cannot_reach_out_of_its_sandbox(tmp_path: Path) -> None:
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    folder = _folder(tmp_path, chat_template=template)

    with pytest.raises(SettingsError, match="chat template refuses"):
        PromptBuilder(make_settings(tokenizer=folder))


async def test_template_that_refuses_a_system_prompt_is_a_bad_request(tmp_path: Path) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ messages[-1].content }}"
    )
    builder = PromptBuilder(make_settings(tokenizer=_folder(tmp_path, chat_template=template)))

    with pytest.raises(InvalidRequest, match="no system role"):
        await builder.build(["q"], "S", None)


async def test_long_question_is_cut_and_its_template_kept_whole() -> None:
    builder = PromptBuilder(make_settings(max_input_tokens=40))

    prompt = (await builder.build(["共享内存与合并访问" * 100], None, None))[0]

    assert isinstance(prompt, array)
    assert 30 <= len(prompt) <= 40
    text = TOKENIZER.decode(prompt.tolist(), skip_special_tokens=False)
    assert text.startswith("<|im_start|>user\n共享内存")
    assert text.endswith("<think>\n\n</think>\n\n")
    assert "\ufffd" not in text


async def test_question_that_is_no_text_is_refused_alone_where_all_are_cut() -> None:
    builder = PromptBuilder(make_settings(max_input_tokens=40))

    built = await builder.build(["fine", "\ud800"], "be kind " * 40, None)

    assert isinstance(built[0], array)
    assert isinstance(built[1], PromptRefused)
    assert "half a surrogate pair" in built[1].message


async def test_prompt_as_long_as_the_context_is_refused_alone() -> None:
    builder = PromptBuilder(make_settings())

    fits, refused = await builder.build(["q", "q" * 5000], None, 64)

    assert isinstance(fits, array)
    assert isinstance(refused, PromptRefused)
    assert refused.error_code == "prompt_too_long"


async def test_without_tokenizer_prompts_are_text() -> None:
    builder = PromptBuilder(make_settings(tokenizer=None, prompt_style="chatml"))

    assert await builder.build(["q"], None, 8) == [
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    ]
    assert (builder.stop, builder.stop_token_ids) == (("<|im_end|>",), ())


async def test_system_prompt_counts_once_a_question() -> None:
    """A small body must not become gigabytes of tokens."""
    builder = PromptBuilder(make_settings())
    with pytest.raises(PayloadTooLarge, match="before each of 200 questions"):
        await builder.build(["q"] * 200, "s" * 200_000, 512)

    (refusal,) = await builder.build(["q"], "s" * 4_000_000, 512)
    assert isinstance(refusal, PromptRefused)
    assert refusal.error_code == "prompt_too_long"


async def test_large_batch_is_cut_into_tokens_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    builder, most = PromptBuilder(make_settings()), 0
    build = builder._build

    def watch(questions: Sequence[str], system: str | None, longest: int | None) -> Any:
        nonlocal most
        most = max(most, sum(map(len, questions)) + len(system or "") * len(questions))
        return build(questions, system, longest)

    monkeypatch.setattr(builder, "_build", watch)
    prompts = await builder.build([f"问题{number}" for number in range(1000)], "s" * 5000, None)

    assert len(prompts) == 1000
    assert most < 600_000
    assert prompts[999] == (await builder.build(["问题999"], "s" * 5000, None))[0]


async def test_big_batch_off_the_event_loop_equals_the_small_ones() -> None:
    builder = PromptBuilder(make_settings())
    questions = [f"问题{number}：什么是warp？" for number in range(600)]

    together = await builder.build(questions, None, None)

    assert together == [(await builder.build([question], None, None))[0] for question in questions]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (" a \n", "a"),
        ("<think>\nx\n</think>\n\nb", "b"),
        ("x</think>b", "b"),
        ("<think>cut off", "<think>cut off"),
    ],
)
def test_clean_answer_has_no_thinking(text: str, clean: str) -> None:
    assert PromptBuilder(make_settings()).clean([text]) == [clean]
