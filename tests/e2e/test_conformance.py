"""The same request to the engine and through the gateway: the same status and the same body.

Ids and times aside, and without what the gateway itself bounds (tests/gateway/test_streaming.py).
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import httpx
import orjson
import pytest

from tests.e2e.conftest import Stack
from tests.plain_http import NO_TLS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

_VOLATILE = frozenset(
    (
        "id",
        "item_id",
        "created",
        "created_at",
        "completed_at",
        "request_id",
        "call_id",
        "sequence_number",
    )
)
IMAGE = "data:image/png;base64,iVBORw0KGgo="
USER = [{"role": "user", "content": "什么是 warp？"}]
TURNS = [
    {"role": "system", "content": "Be brief."},
    *USER,
    {"role": "assistant", "content": "32 threads."},
    {"role": "user", "content": "Why?"},
]
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["n"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "f", "strict": True, "parameters": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "f"}}
# Greedy, the demo model would fill the blanks that JSON allows with ever more of them.
CALL = {"messages": USER, "tools": [TOOL], "max_tokens": 100, "frequency_penalty": 2}
JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
MESSAGES, EMBEDDINGS, TOKENIZE = "/v1/messages", "/v1/embeddings", "/tokenize"


def _nest(depth: int) -> list[Any]:
    return [_nest(depth - 1)] if depth else []


# Path, fields beside the model and the greedy defaults.
Case = tuple[str, dict[str, Any]]
CASES: dict[str, Case] = {
    "completion": (COMPLETIONS, {"prompt": "CUDA"}),
    "completion-list": (COMPLETIONS, {"prompt": ["CUDA", "warp", "流"]}),
    "completion-ids": (COMPLETIONS, {"prompt": [5, 6, 7]}),
    "completion-ids-list": (COMPLETIONS, {"prompt": [[5, 6, 7], [8, 9]]}),
    "completion-stop": (COMPLETIONS, {"prompt": "CUDA", "stop": "，"}),
    "completion-stops": (COMPLETIONS, {"prompt": "CUDA", "stop": ["，", "。"]}),
    "completion-stop-ids": (COMPLETIONS, {"prompt": "CUDA", "stop_token_ids": [2]}),
    "completion-stop-kept": (
        COMPLETIONS,
        {"prompt": "CUDA", "stop": "，", "include_stop_str_in_output": True},
    ),
    "completion-echo": (COMPLETIONS, {"prompt": "CUDA", "echo": True}),
    "completion-logprobs": (COMPLETIONS, {"prompt": "CUDA", "logprobs": 2}),
    "completion-n": (COMPLETIONS, {"prompt": "CUDA", "n": 2, "temperature": 1, "seed": 3}),
    "completion-seed": (COMPLETIONS, {"prompt": "CUDA", "temperature": 1, "seed": 7}),
    "completion-top": (
        COMPLETIONS,
        {"prompt": "CUDA", "temperature": 1, "seed": 7, "top_p": 0.5, "top_k": 5, "min_p": 0.1},
    ),
    "completion-penalties": (
        COMPLETIONS,
        {"prompt": "CUDA", "presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 2},
    ),
    "completion-bias": (COMPLETIONS, {"prompt": "CUDA", "logit_bias": {"5": 100}}),
    "completion-ignore-eos": (COMPLETIONS, {"prompt": "CUDA", "ignore_eos": True}),
    "completion-min-tokens": (COMPLETIONS, {"prompt": "CUDA", "min_tokens": 6}),
    "completion-token-ids": (COMPLETIONS, {"prompt": "CUDA", "return_token_ids": True}),
    "completion-truncated": (COMPLETIONS, {"prompt": "CUDA " * 50, "truncate_prompt_tokens": 8}),
    "completion-special": (COMPLETIONS, {"prompt": "CUDA", "skip_special_tokens": False}),
    "completion-choice": (
        COMPLETIONS,
        {"prompt": "CUDA", "structured_outputs": {"choice": ["yes", "no"]}},
    ),
    "completion-regex": (
        COMPLETIONS,
        {"prompt": "CUDA", "structured_outputs": {"regex": "[a-c]{3}"}},
    ),
    "completion-schema": (
        COMPLETIONS,
        {"prompt": "CUDA", "max_tokens": 40, "response_format": JSON_FORMAT},
    ),
    "completion-unknown-field": (COMPLETIONS, {"prompt": "CUDA", "no_such_field": [1]}),
    "completion-user": (COMPLETIONS, {"prompt": "CUDA", "user": "alice"}),
    "completion-max-tokens-float": (COMPLETIONS, {"prompt": "CUDA", "max_tokens": 5.0}),
    "completion-max-tokens-text": (COMPLETIONS, {"prompt": "CUDA", "max_tokens": "5"}),
    "completion-stream-zero": (COMPLETIONS, {"prompt": "CUDA", "stream": 0}),
    "completion-stop-long": (COMPLETIONS, {"prompt": "CUDA", "stop": "x" * 1000}),
    "completion-stream-nested": (COMPLETIONS, {"prompt": "CUDA", "stream": True, "x": _nest(300)}),
    "completion-stream": (COMPLETIONS, {"prompt": "CUDA", "stream": True}),
    "completion-stream-usage": (
        COMPLETIONS,
        {"prompt": "CUDA", "stream": True, "stream_options": {"include_usage": True}},
    ),
    "completion-stream-logprobs": (COMPLETIONS, {"prompt": "CUDA", "stream": True, "logprobs": 1}),
    "bad-completion-no-prompt": (COMPLETIONS, {}),
    "bad-completion-model": (COMPLETIONS, {"prompt": "CUDA", "model": "nope"}),
    "bad-completion-temperature": (COMPLETIONS, {"prompt": "CUDA", "temperature": -1}),
    "bad-completion-temperature-type": (COMPLETIONS, {"prompt": "CUDA", "temperature": "hot"}),
    "bad-completion-max-tokens": (COMPLETIONS, {"prompt": "CUDA", "max_tokens": 99_999}),
    "bad-completion-max-tokens-sign": (COMPLETIONS, {"prompt": "CUDA", "max_tokens": -1}),
    "bad-completion-top-p": (COMPLETIONS, {"prompt": "CUDA", "top_p": 2}),
    "bad-completion-n": (COMPLETIONS, {"prompt": "CUDA", "n": 0}),
    "bad-completion-empty": (COMPLETIONS, {"prompt": ""}),
    "bad-completion-too-long": (COMPLETIONS, {"prompt": [5] * 5000}),
    "bad-completion-vocabulary": (COMPLETIONS, {"prompt": [99_999]}),
    "bad-completion-regex": (
        COMPLETIONS,
        {"prompt": "CUDA", "structured_outputs": {"regex": "("}},
    ),
    "bad-completion-stream": (COMPLETIONS, {"prompt": "", "stream": True}),
    "chat": (CHAT, {"messages": USER}),
    "chat-turns": (CHAT, {"messages": TURNS}),
    "chat-no-thinking": (
        CHAT,
        {"messages": USER, "chat_template_kwargs": {"enable_thinking": False}},
    ),
    "chat-max": (CHAT, {"messages": USER, "max_tokens": None, "max_completion_tokens": 3}),
    "chat-stop": (CHAT, {"messages": USER, "stop": ["，"]}),
    "chat-logprobs": (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 2}),
    "chat-n": (CHAT, {"messages": USER, "n": 2, "temperature": 1, "seed": 5}),
    "chat-schema": (CHAT, {"messages": USER, "max_tokens": 40, "response_format": JSON_FORMAT}),
    "chat-tools-none": (CHAT, {"messages": USER, "tools": [TOOL], "tool_choice": "none"}),
    "chat-tools-auto": (CHAT, CALL),
    "chat-tools-required": (CHAT, {**CALL, "tool_choice": "required"}),
    "chat-tool-named": (CHAT, {**CALL, "tool_choice": NAMED}),
    "chat-parts": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
    ),
    "chat-stream": (CHAT, {"messages": USER, "stream": True}),
    "chat-stream-usage": (
        CHAT,
        {"messages": USER, "stream": True, "stream_options": {"include_usage": True}},
    ),
    "chat-stream-chunk-usage-alone": (
        CHAT,
        {"messages": USER, "stream": True, "stream_options": {"continuous_usage_stats": True}},
    ),
    "chat-stream-chunk-usage": (
        CHAT,
        {
            "messages": USER,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    ),
    "chat-batch": (f"{CHAT}/batch", {"messages": [USER, TURNS]}),
    "bad-chat-batch": (f"{CHAT}/batch", {"messages": USER}),
    "chat-stream-tools-auto": (CHAT, {**CALL, "stream": True}),
    "chat-stream-tool-named": (CHAT, {**CALL, "stream": True, "tool_choice": NAMED}),
    "bad-chat-tool-unknown": (
        CHAT,
        {**CALL, "tool_choice": {"type": "function", "function": {"name": "g"}}},
    ),
    "bad-chat-no-messages": (CHAT, {}),
    "bad-chat-empty": (CHAT, {"messages": []}),
    "bad-chat-model": (CHAT, {"messages": USER, "model": "nope"}),
    "bad-chat-messages-type": (CHAT, {"messages": "hello"}),
    "bad-chat-image": (
        CHAT,
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}]}
            ]
        },
    ),
    "bad-chat-top-logprobs": (CHAT, {"messages": USER, "top_logprobs": 2}),
    "responses": (RESPONSES, {"input": "CUDA", "max_output_tokens": 8}),
    "responses-items": (RESPONSES, {"input": USER, "max_output_tokens": 8}),
    "responses-instructions": (
        RESPONSES,
        {"input": "CUDA", "instructions": "Be brief.", "max_output_tokens": 8},
    ),
    "responses-stream": (RESPONSES, {"input": "CUDA", "max_output_tokens": 8, "stream": True}),
    "bad-responses-model": (RESPONSES, {"input": "CUDA", "model": "nope"}),
    "bad-responses-no-input": (RESPONSES, {}),
    "messages": (MESSAGES, {"messages": USER}),
    "messages-system": (MESSAGES, {"messages": USER, "system": "Be brief."}),
    "messages-stream": (MESSAGES, {"messages": USER, "stream": True}),
    "bad-messages-no-max": (MESSAGES, {"messages": USER, "max_tokens": None}),
    "bad-messages-model": (MESSAGES, {"messages": USER, "model": "nope"}),
    "messages-count": (f"{MESSAGES}/count_tokens", {"messages": USER}),
    "bad-messages-count": (f"{MESSAGES}/count_tokens", {"messages": USER, "model": "nope"}),
    "bad-rerank": ("/rerank", {"query": "a", "documents": ["b"]}),
    "bad-classify": ("/classify", {"input": "CUDA"}),
    "bad-embeddings": (EMBEDDINGS, {"input": "CUDA"}),
    "tokenize": (TOKENIZE, {"prompt": "什么是 warp？"}),
    "tokenize-chat": (TOKENIZE, {"messages": USER}),
    "tokenize-strings": (TOKENIZE, {"prompt": "a b", "return_token_strs": True}),
    "bad-tokenize": (TOKENIZE, {}),
    "detokenize": ("/detokenize", {"tokens": [5, 6, 7]}),
    "bad-detokenize": ("/detokenize", {"tokens": "x"}),
}


def test_table_is_large_enough() -> None:
    assert len(CASES) >= 60
    assert sum(name.startswith("bad-") for name in CASES) >= 20


@pytest.mark.parametrize("name", CASES)
def test_gateway_answers_as_the_engine_does(stack: Stack, name: str) -> None:
    path, fields = CASES[name]
    body = {"model": "demo", "temperature": 0, "max_tokens": 6} | fields
    if path == RESPONSES:
        del body["max_tokens"]
        body["store"] = False  # what is stored has a name that the engine does not know

    direct = httpx.post(f"{stack.engine}{path}", json=body, timeout=60, verify=NO_TLS)
    through = httpx.post(f"{stack.gateway}{path}", json=body, timeout=60, verify=NO_TLS)

    assert through.status_code == direct.status_code
    told = _read(through)
    if direct.status_code >= 400:
        assert told["error"].pop("source") == "engine"  # the one word the gateway adds
    said = _read(direct)
    if "detail" in said:  # a route the engine has not for this model
        reason = f"the engine answered 404: {said['detail']}"
        message = f"{reason}; the model that it serves is not for {path}"
        assert (told["error"]["code"], told["error"]["message"]) == ("route_not_served", message)
    else:
        assert told == said
    assert through.headers["content-type"] == direct.headers["content-type"]
    assert (direct.status_code >= 400) == name.startswith("bad-"), direct.text[:300]


@pytest.mark.parametrize(("choice", "end"), [("required", "tool_calls"), (NAMED, "stop")])
def test_tool_is_called_as_its_schema_says(stack: Stack, choice: Any, end: str) -> None:
    body = {"model": "demo", "temperature": 0, **CALL, "tool_choice": choice}

    answer = httpx.post(f"{stack.gateway}{CHAT}", json=body, timeout=60, verify=NO_TLS).json()[
        "choices"
    ][0]

    (call,) = answer["message"]["tool_calls"]
    assert (answer["finish_reason"], call["function"]["name"]) == (end, "f")
    assert 0 <= orjson.loads(call["function"]["arguments"])["n"] <= 9


def test_models_are_the_engines(stack: Stack) -> None:
    direct, through = (
        httpx.get(f"{url}/v1/models", verify=NO_TLS) for url in (stack.engine, stack.gateway)
    )

    assert _read(through) == _read(direct)


# What the engine has and nobody but its operator should reach, or nobody asks for through OpenAI's,
# Anthropic's or Cohere's SDK: work for other engines, SageMaker's words, trials of vLLM's own.
_NOT_PASSED_ON = (
    r"/(ping|load|kv_event_sources|invocations|metrics)|/inference/.*|/v1/systemone|.*/(de)?render|"
    r"/generative_scoring|/scale_elastic_ep|/is_scaling_elastic_ep"
)


def test_every_route_of_the_engines_is_served_or_named_here(stack: Stack) -> None:
    """What it says of its calls is said of them here, too."""
    engines, own = (
        httpx.get(f"{url}/openapi.json", timeout=60, verify=NO_TLS).json()
        for url in (stack.engine, stack.gateway)
    )

    wanted = {path for path in engines["paths"] if not re.fullmatch(_NOT_PASSED_ON, path)}
    assert wanted - own["paths"].keys() == set()
    for path in wanted & {COMPLETIONS, CHAT, RESPONSES, MESSAGES, TOKENIZE}:
        told, said = (one["paths"][path]["post"]["requestBody"] for one in (own, engines))
        assert told == said
        name = _name_schema(said)
        assert own["components"]["schemas"][name] == engines["components"]["schemas"][name]
    assert EMBEDDINGS not in own["paths"]


def _name_schema(body: dict[str, Any]) -> str:
    ref = next(iter(body["content"].values()))["schema"]
    return str(ref.get("$ref") or ref["anyOf"][0]["$ref"]).rpartition("/")[2]


def _read(answer: httpx.Response) -> Any:
    """The body without what differs from call to call; a stream as what it amounts to."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return _scrub(orjson.loads(answer.content))
    lines = [line.partition(": ") for line in answer.text.splitlines() if line]
    events = [orjson.loads(data) if data.startswith("{") else data for _, _, data in lines]
    return _amount([event for event in events if isinstance(event, dict)], _scrub(events[-1]))


def _amount(events: list[Any], last: Any) -> dict[str, Any]:
    """How vLLM groups tokens into events depends on the moment; all they say together does not."""
    kinds = [event.get("type") or event.get("object") for event in events]
    choices = [choice for event in events for choice in event.get("choices", [])]
    deltas = [choice.get("delta", {}) for choice in choices]
    texts = [
        choice.get("text") or delta.get("content")
        for choice, delta in zip(choices, deltas, strict=True)
    ]
    texts += [_delta_text(event.get("delta")) for event in events]
    tools = [
        call["function"].get("arguments") for one in deltas for call in one.get("tool_calls", [])
    ]
    return {
        "kinds": [kind for kind, _ in itertools.groupby(kinds)],
        "text": "".join(filter(None, texts)),
        "tools": "".join(filter(None, tools)),
        "ends": [one["finish_reason"] for one in choices if one.get("finish_reason")],
        "usage": _amount_of_usage([event["usage"] for event in events if event.get("usage")]),
        "errors": [event["error"] for event in events if event.get("error")],
        "fields": sorted({field for event in events for field in event}),
        "fingerprints": [event["system_fingerprint"] for event in events if _is_stamped(event)],
        "last": last,
    }


def _amount_of_usage(told: list[dict[str, Any]]) -> dict[str, Any]:
    """Where each event tells it, how many tokens it counts depends on the moment, too."""
    counts = [one.get("completion_tokens", 0) for one in told]
    return {
        "ends": told[:1] + told[-1:],
        "is_in_each": len(told) > 1,
        "grows": counts == sorted(counts),
        "fields": sorted({field for one in told for field in one}),
    }


def _is_stamped(event: dict[str, Any]) -> bool:
    return event.get("system_fingerprint") is not None


def _delta_text(delta: Any) -> str:
    return str(delta.get("text", "")) if isinstance(delta, dict) else str(delta or "")


def _scrub(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _scrub(one) for key, one in value.items() if key not in _VOLATILE}
    return [_scrub(one) for one in value] if isinstance(value, list) else value
