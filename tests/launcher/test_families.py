"""Which parsers a model gets: by its type and by what its chat template has it write."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from common.chat_templates import read_chat_templates
from common.errors import SettingsError
from launcher.config import LauncherSettings
from launcher.models.families import find_parser_rules, list_parser_rules
from launcher.models.model import Model, find_model
from launcher.plan.engine_plan import EngineOption, EnginePlan, build_plan, parse_overrides
from launcher.plan.flags.known_flags import Flags, read_shipped_flags
from launcher.plan.hardware import parse_device

MODELS = Path(__file__).parent / "models"
FLAGS = read_shipped_flags()
TOOLS = "{% if tools %}"
HERMES = TOOLS + '<tool_call>{"name": 1, "arguments": 2}</tool_call>'
CODER = TOOLS + "<tool_call><function=f><parameter=p>1</parameter></function></tool_call>"
HYBRID = "{{ message.reasoning_content }}{% if enable_thinking %}<think></think>"
DEEPSEEK = "<｜Assistant｜></think>"
DEEPSEEK_TOOLS = TOOLS + "<｜tool▁calls▁begin｜><｜tool▁sep｜>"


def make_model(model_type: str, template: str, path: Path = Path("/nowhere")) -> Model:
    small = find_model(LauncherSettings(model=str(MODELS / "qwen3-0.6b")), config_only=True)
    return replace(small, model_type=model_type, chat_template=template, path=path)


def make_plan(model: Model, *pairs: str, flags: Flags = FLAGS) -> EnginePlan:
    overrides = parse_overrides(pairs, flags)
    return build_plan("course", parse_device("H200"), model, flags, overrides=overrides)


def parsers_of(plan: EnginePlan) -> tuple[object, object, object]:
    names = ("tool-call-parser", "enable-auto-tool-choice", "reasoning-parser")
    return tuple(plan.value(name) for name in names)


@pytest.mark.parametrize(
    ("model_type", "template", "tools", "reasoning"),
    [
        ("qwen2", HERMES, "hermes", None),
        ("qwen3", HERMES + HYBRID, "hermes", "qwen3"),
        ("qwen3", HERMES + "{{ message.reasoning_content }}", "hermes", None),
        ("qwen3", HYBRID, None, "qwen3"),
        ("qwen3_moe", CODER, "qwen3_coder", None),
        ("qwen3_5", CODER + HYBRID, "qwen3_coder", "qwen3"),
        (
            "qwen3",
            HERMES + r"reasoning_content '<|im_start|>assistant\n<think>\n'",
            "hermes",
            "qwen3",
        ),
        ("qwen2", HERMES + r"'<|im_start|>assistant\n<think>\n'", "hermes", "deepseek_r1"),
        ("llama", TOOLS + "<|start_header_id|> name, parameters", "llama3_json", None),
        ("llama", HERMES + "<|start_header_id|>", "hermes", None),
        ("llama", DEEPSEEK, None, "deepseek_r1"),
        ("mistral", TOOLS + "[TOOL_CALLS]", "mistral", None),
        ("deepseek_v3", DEEPSEEK + DEEPSEEK_TOOLS + "```json", "deepseek_v3", "deepseek_r1"),
        ("deepseek_v3", DEEPSEEK + DEEPSEEK_TOOLS + "thinking", "deepseek_v31", "deepseek_v3"),
        ("gpt_oss", TOOLS + "<|channel|>analysis", "openai", "openai_gptoss"),
        ("glm4_moe", TOOLS + "<tool_call>f<arg_key>" + HYBRID, "glm45", "glm45"),
        ("kimi_k2", TOOLS + "<|tool_calls_section_begin|>", "kimi_k2", None),
        ("granitemoehybrid", HERMES, "granite4", None),
        ("granite", TOOLS + "<|tool_call|>", "granite", None),
        ("nobody", HERMES + HYBRID, None, None),
        ("qwen3", "", None, None),
    ],
)
def test_model_gets_the_parsers_of_its_family(
    model_type: str, template: str, tools: str | None, reasoning: str | None
) -> None:
    plan = make_plan(make_model(model_type, template))
    assert parsers_of(plan) == (tools, True if tools else None, reasoning)


def test_template_that_shows_no_tools_has_no_tool_parser() -> None:
    spoken = HERMES.replace("tools", "message.tool_calls")
    assert parsers_of(make_plan(make_model("qwen3", spoken)))[0] is None


def test_every_row_is_chosen_by_one_of_the_cases_above() -> None:
    cases = test_model_gets_the_parsers_of_its_family.pytestmark[0].args[1]  # type: ignore[attr-defined]
    chosen = {
        (rule.flag, rule.family)
        for model_type, template, *_ in cases
        for rule in find_parser_rules(make_model(model_type, template), template)
    }
    assert chosen == {(rule.flag, rule.family) for rule in list_parser_rules()}


def test_every_parser_is_one_of_the_shipped_version() -> None:
    for rule in list_parser_rules():
        assert rule.parser in FLAGS.choices[rule.flag]
        assert rule.reason
        assert rule.source


def test_parser_that_the_installed_version_lacks_is_left_out() -> None:
    known = {flag: [n for n in names if n != "hermes"] for flag, names in FLAGS.choices.items()}
    plan = make_plan(make_model("qwen3", HERMES + HYBRID), flags=replace(FLAGS, choices=known))
    assert parsers_of(plan) == (None, None, "qwen3")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_parser_whose_tokens_the_tokenizer_lacks_is_left_out(tmp_path: Path, file: str) -> None:
    def put(*tokens: str) -> None:
        rows = [{"content": token} for token in tokens]
        whole = {"added_tokens": rows}
        config = {"added_tokens_decoder": {str(n): rule for n, rule in enumerate(rows)}}
        (tmp_path / file).write_text(json.dumps(whole if file == "tokenizer.json" else config))

    model = make_model("qwen3", HERMES + HYBRID, tmp_path)
    put("<|im_end|>")
    assert parsers_of(make_plan(model)) == ("hermes", True, None)
    put("<|im_end|>", "<think>", "</think>")
    assert parsers_of(make_plan(model)) == ("hermes", True, "qwen3")


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (["tool-call-parser="], (None, None, "qwen3")),
        (["reasoning-parser="], ("hermes", True, None)),
        (["enable-auto-tool-choice=false"], ("hermes", False, "qwen3")),
        (["tool-call-parser=pythonic"], ("pythonic", True, "qwen3")),
        (["tool-call-parser=mine", "tool-parser-plugin=/p.py"], ("mine", True, "qwen3")),
        (["chat-template=bare text"], (None, None, None)),
    ],
)
def test_set_decides_over_the_family(pairs: list[str], expected: tuple[object, ...]) -> None:
    assert parsers_of(make_plan(make_model("qwen3", HERMES + HYBRID), *pairs)) == expected


def test_set_chat_template_file_is_what_decides(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(CODER)
    plan = make_plan(make_model("qwen3", HERMES + HYBRID), f"chat-template={file}")
    assert parsers_of(plan) == ("qwen3_coder", True, None)


def test_set_parser_that_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match="did you mean hermes"):
        parse_overrides(["tool-call-parser=herms"], FLAGS)
    with pytest.raises(SettingsError, match=r"it knows .*qwen3"):
        parse_overrides(["reasoning-parser=0"], FLAGS)


def test_choice_says_which_family_and_why() -> None:
    plan = make_plan(make_model("qwen3", HERMES))
    choice: EngineOption = next(c for c in plan.options if c.name == "tool-call-parser")
    assert choice.origin == "model Qwen2.5, Qwen3, QwQ and Hermes"
    assert "<tool_call>" in choice.reason


def test_demo_model_calls_tools_and_does_not_think() -> None:
    plan = make_plan(find_model(LauncherSettings()))
    assert parsers_of(plan) == ("hermes", True, None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "A B"),
        ("chat_template.json", json.dumps({"chat_template": "A B"})),
        ("tokenizer_config.json", json.dumps({"chat_template": "A B"})),
        (
            "tokenizer_config.json",
            json.dumps(
                {"chat_template": [{"template": "A"}, {"name": "tool_use", "template": "B"}]}
            ),
        ),
        ("additional_chat_templates/tool_use.jinja", "A B"),
    ],
)
def test_chat_template_is_found_where_models_keep_it(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    assert " ".join(read_chat_templates(tmp_path).values()) == "A B"


@pytest.mark.parametrize("content", ["", "[]", '{"chat_template": null}', "{"])
def test_chat_template_that_is_none_is_empty(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    assert read_chat_templates(tmp_path) == {}
