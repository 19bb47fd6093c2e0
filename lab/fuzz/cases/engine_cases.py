"""What an engine is asked beside its constraints: token ids, sampling, conversations, other
routes, whether its model is for them or not.
"""

from __future__ import annotations

import base64
from typing import Any

from lab.fuzz.cases.case import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Case, Draw
from lab.fuzz.cases.odd_values import VALUES

_TOKENS: tuple[Any, ...] = (
    *(0, 1, 2, 5, 7, 100, 1000, 4095, 4096, 8000, 151_643, 151_935, 10**6, 2**31 - 1, 2**31, 2**32),
    *(2**63 - 1, 2**63, 2**64, 10**30, -1, -2, -(2**31), 1.0, 1.5, "5", None, True, [], [5], {}),
    "",
)
_ID_LISTS: tuple[Any, ...] = ([], [[]], [[], [5]], [5, "a"], ["a", 5], [[5], 6], [[[5]]], [None], 5)
_INTEGERS: tuple[Any, ...] = (
    *(-2, -1, 0, 1, 2, 3, 16, 17, 20, 21, 1000, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30),
    *("1", "x", None, True, 1.0, 1.5, [], float("nan")),
)
_FLOATS: tuple[Any, ...] = (
    *(-1, -1e-9, 0, 1e-45, 1e-9, 0.01, 0.5, 1, 1.0001, 2, 2.0001, 100, 1e38, 1e39, 1e308, -1e308),
    *(float("nan"), float("inf"), float("-inf"), "0.5", None, True, [], {}),
)
_FLAGS: tuple[Any, ...] = (True, False, None, 0, 1, 2, "yes", "", [])
_STRINGS: tuple[Any, ...] = ("", "a", "x" * 2000, "\0", "名", None, 5, ["a"], {}, "\ud800")
_KNOBS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("n", "best_of", "top_k", "min_tokens", "seed", "priority"), _INTEGERS),
    **dict.fromkeys(("logprobs", "top_logprobs", "prompt_logprobs", "max_tokens"), _INTEGERS),
    **dict.fromkeys(
        ("max_completion_tokens", "stream_interval", "thinking_token_budget"), _INTEGERS
    ),
    **dict.fromkeys(("truncate_prompt_tokens", "routed_experts_prompt_start"), _INTEGERS),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), _FLOATS),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "length_penalty"), _FLOATS),
    **dict.fromkeys(("ignore_eos", "use_beam_search", "early_stopping", "echo", "stream"), _FLAGS),
    **dict.fromkeys(("skip_special_tokens", "include_stop_str_in_output"), _FLAGS),
    **dict.fromkeys(("spaces_between_special_tokens", "return_token_ids", "watermarking"), _FLAGS),
    **dict.fromkeys(("add_special_tokens", "return_tokens_as_token_ids"), _FLAGS),
    **dict.fromkeys(("return_token_offsets", "return_prompt_text", "include_reasoning"), _FLAGS),
    **dict.fromkeys(("cache_salt", "request_id", "session_id", "user", "suffix"), _STRINGS),
    "truncation_side": ("left", "right", "up", None),
    "reasoning_effort": ("low", "none", "x", 5),
    "mm_payload": ("none", "tensors", "x", None),
    "stop": ("a", [], ["a", "b"], ["a"] * 5, [""], "", [5], "x" * 20_000, {}, "\ud800", ["\n"]),
    "bad_words": (
        *(["a"], [""], [" "], ["a b c"], ["x" * 5000], [5], "a", ["名"], ["a"] * 500, [None]),
    ),
    "stream_options": ({}, {"include_usage": True, "continuous_usage_stats": True}, [], "x", None),
    "repetition_detection": (
        *({"max_pattern_size": 5, "min_count": 2}, {"max_pattern_size": 2**40, "min_count": 2}),
        *({"max_pattern_size": 2**70, "min_count": 2**70}, {"min_pattern_size": -1}, {}, [], None),
        *({"max_pattern_size": 10**6, "min_pattern_size": 10**6, "min_count": 2}, {"x": 1}),
    ),
    "kv_transfer_params": ({}, {"do_remote_decode": True}, {"remote_host": "127.0.0.1"}, "x"),
    "ec_transfer_params": ({}, {"x": 1}, []),
    "vllm_xargs": (
        *({"a": 1}, {"a": ["b", 2.5]}, {"a": {}}, {"": ""}, {"a": None}, "x", {"a": 2**70}),
    ),
    "mm_processor_kwargs": ({}, {"num_crops": 10**9}, "x"),
    "chat_template": ("{{ messages }}", "{% for a in range(10**9) %}{% endfor %}", "{{", 5, ""),
    "chat_template_kwargs": (
        *({"enable_thinking": False}, {"messages": []}, {"tokenize": False}),
        {"chat_template": "x"},
        *({"add_generation_prompt": 5}, {"a": {"b": [1] * 1000}}, [], "x", {"": None}),
        *({"continue_final_message": True, "add_generation_prompt": True}, {"return_dict": True}),
    ),
    "documents": ([{"title": "a", "text": "b"}], [], [{}], "x", [{"a": 5}]),
}
_ROLES: tuple[Any, ...] = (
    *("user", "user", "assistant", "system", "tool", "developer", "function", "", "x", None, 5),
)
_PARTS: tuple[Any, ...] = (
    *({"type": "text", "text": "a"}, {"type": "text"}, {"type": "text", "text": None}, {}, None),
    "a",
    *({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, [], 5),
    *({"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}, {"type": "x"}),
    *({"type": "image_url", "image_url": "file:///etc/passwd"}, {"type": "image_url"}),
    *({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, {"text": "a"}),
    *({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}, {"type": 5}),
    *({"type": "input_text", "text": "a"}, {"type": "refusal", "refusal": "no"}),
    *({"type": "thinking", "thinking": "a"}, {"type": "tool_result", "tool_use_id": "a"}),
    *({"type": "image_embeds", "image_embeds": "AAAA"}, {"type": "tool_use", "name": "f"}),
    *({"type": "input_image", "image_url": "data:,"}, {"type": "input_file", "file_id": "a"}),
)
_CALLS: tuple[Any, ...] = (
    *([], [{}], [None], "x", [{"id": "a", "type": "function", "function": {"name": "f"}}]),
    [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{"}}],
    [{"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
    [{"id": "a", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
    [{"id": 5, "type": "x", "function": None}],
)
_ITEMS: tuple[Any, ...] = (
    *({"type": "function_call", "name": "f", "arguments": "{}", "call_id": "a"}, {}, None, 5),
    *({"type": "function_call_output", "call_id": "a", "output": "b"}, {"type": "reasoning"}),
    *({"type": "item_reference", "id": "a"}, {"type": "message"}, {"type": "x"}, "a", []),
)
_OTHER_ROUTES = (
    *("/v1/embeddings", "/v2/embed", "/pooling", "/classify", "/v1/classify", "/score"),
    "/v1/score",
    *("/rerank", "/v1/rerank", "/v2/rerank", "/tokenize", "/detokenize"),
    "/v1/messages/count_tokens",
    *("/v1/chat/completions/batch", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
    "/tokenizer_info",
)
_OTHER_FIELDS = (
    *("model", "input", "prompt", "messages", "tokens", "texts", "text_1", "text_2", "query"),
    "queries",
    *("documents", "encoding_format", "dimensions", "embed_dtype", "endianness"),
    "add_special_tokens",
    *("return_token_strs", "top_n", "truncate_prompt_tokens", "activation", "normalize", "task"),
    *("lora_name", "lora_path", "data_1", "data_2", "items", "images", "system", "tools"),
    "thinking",
)
_EMBEDS: tuple[Any, ...] = (
    *("", "AAAA", base64.b64encode(b"PK\x03\x04" + bytes(64)).decode(), ["AAAA", "AAAA"], []),
    *(None, 5),
    base64.b64encode(b"\x80\x04\x95cos\nsystem\n(S'true'\ntR.").decode(),
)


def build_token_case(draw: Draw) -> Case:
    chance = draw.chance
    match chance.randrange(6):
        case 0:
            field = chance.choice(("tokens", "tokens", "prompt"))
            return draw.answered("/detokenize", {"model": draw.target.model, field: _ids(draw)})
        case 1:
            name = chance.choice(("stop_token_ids", "allowed_token_ids", "logprob_token_ids"))
            return _with(draw, {name: _ids(draw), **_logprobs(draw)})
        case 2:
            biases = {str(one): chance.choice(_FLOATS) for one in draw.some(_TOKENS, 5)}
            return _with(draw, {"logit_bias": biases})
        case 3:
            return _with(draw, {"prompt_embeds": chance.choice(_EMBEDS)}, COMPLETIONS)
        case _:
            data = {**draw.body(COMPLETIONS).data, "prompt": _ids(draw), "max_tokens": 2}
            return draw.answered(COMPLETIONS, data)


def _ids(draw: Draw) -> Any:
    chance = draw.chance
    if draw.is_one_in(0.1):
        return chance.choice(_ID_LISTS)
    few = [chance.choice(_TOKENS[:8]) for _ in range(chance.choice((1, 2, 5, 50, 3000)))]
    if draw.is_one_in(0.5):
        few[chance.randrange(len(few))] = chance.choice(_TOKENS)
    return [few, few] if draw.is_one_in(0.2) else few


def _logprobs(draw: Draw) -> dict[str, Any]:
    return {"logprobs": draw.chance.choice((1, 5, True))} if draw.is_one_in(0.3) else {}


def build_sampling_case(draw: Draw) -> Case:
    names = draw.chance.sample([*_KNOBS], draw.chance.choice((1, 1, 2, 3, 6)))
    return _with(draw, {name: draw.chance.choice(_KNOBS[name]) for name in names})


def build_message_case(draw: Draw) -> Case:
    """Conversations whose turns are none, or too many kinds of them."""
    chance = draw.chance
    path = chance.choice((CHAT, CHAT, MESSAGES, RESPONSES))
    turns: Any = [_build_turn(draw) for _ in range(chance.choice((0, 1, 1, 2, 3, 40)))]
    if path == RESPONSES and draw.is_one_in(0.5):
        turns += draw.some(_ITEMS, 3)
    if draw.is_one_in(0.05):
        turns = chance.choice(VALUES)
    fields = {"input" if path == RESPONSES else "messages": turns}
    for name in draw.some(("add_generation_prompt", "continue_final_message", "echo"), 2):
        fields[name] = chance.choice(_FLAGS)
    if path == MESSAGES and draw.is_one_in(0.3):
        fields["system"] = chance.choice((*_PARTS, [{"type": "text", "text": "a"}]))
        fields["thinking"] = chance.choice(({"type": "enabled", "budget_tokens": 1024}, {}, None))
    return _with(draw, fields, path)


def _build_turn(draw: Draw) -> Any:
    chance = draw.chance
    content: Any = draw.text
    if draw.is_one_in(0.5):
        content = chance.choice(
            (draw.some(_PARTS, 3), chance.choice(VALUES), chance.choice(_PARTS))
        )
    turn = {"role": chance.choice(_ROLES), "content": content}
    if draw.is_one_in(0.2):
        turn["tool_calls"] = chance.choice(_CALLS)
    if draw.is_one_in(0.2):
        turn[chance.choice(("name", "tool_call_id", "reasoning", "refusal", "x"))] = chance.choice(
            VALUES
        )
    if draw.is_one_in(0.1):
        turn.pop(chance.choice(("role", "content")))
    return chance.choice(VALUES) if draw.is_one_in(0.03) else turn


def build_route_case(draw: Draw) -> Case:
    """Whatever else is passed on, whether the model is for it or not."""
    chance = draw.chance
    texts: tuple[Any, ...] = (
        "a",
        ["a", "b"],
        draw.text,
        [draw.text],
        [5, 6],
        [[5], [6]],
        ["a"] * 300,
    )
    names = chance.sample(_OTHER_FIELDS, chance.randint(1, 5))
    data = {name: chance.choice(texts if draw.is_one_in(0.6) else VALUES) for name in names}
    if draw.is_one_in(0.7):
        data["model"] = draw.target.model
    turn = {"role": "user", "content": draw.text}
    if draw.is_one_in(0.3):
        data["messages"] = chance.choice(([turn], [[turn], [turn]], [[]], [[turn] * 30]))
    path = chance.choice(_OTHER_ROUTES)
    if "batch" in path:
        data["max_tokens"] = 2
    return draw.answered(path, data)


def _with(draw: Draw, fields: dict[str, Any], path: str = "") -> Case:
    source = draw.body(path or draw.chance.choice((CHAT, COMPLETIONS, RESPONSES, MESSAGES)))
    return draw.answered(source.path, {**source.data, **fields})
