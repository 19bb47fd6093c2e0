"""vLLM's side: the completion call that answers prompts, and what an engine says."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import orjson

from common.prometheus_text import parse_samples
from gateway.errors import (
    EngineAborted,
    EngineError,
    GatewayError,
    InvalidRequest,
    RouteNotServed,
)
from gateway.schemas.fields import are_texts

# Ids in four bytes each: as a list of numbers they take ten times as much while they wait.
Prompt: TypeAlias = "str | array[int]"
ID_TYPE = "I"
_CHARACTERS_A_TOKEN = 4
Answer: TypeAlias = "str | GatewayError"  # of one sequence: its text, or why there is none

_LOAD_METRICS = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:generation_tokens_total": "completion_tokens",
    "vllm:request_success_total": "finished",
    "vllm:num_preemptions_total": "preemptions",
    "vllm:prefix_cache_hits_total": "cached_tokens",
    "vllm:prefix_cache_queries_total": "looked_up_tokens",
    "vllm:time_to_first_token_seconds_sum": "first_token_sum_s",
    "vllm:time_to_first_token_seconds_count": "first_token_count",
}
# What FastAPI says where no route matches; of a model that is not there vLLM says more.
_NO_ROUTE = "Not Found"
_ENDED = ("stop", "length")
UNREADABLE = (LookupError, TypeError, ValueError, AttributeError)
_LOAD_LINE = re.compile(rf"^(?:{'|'.join(_LOAD_METRICS)})[{{ ].*$", re.MULTILINE)


def estimate_tokens(prompt: Prompt) -> int:
    return len(prompt) // _CHARACTERS_A_TOKEN if isinstance(prompt, str) else len(prompt)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn; sent with every call, since the engine's own defaults differ."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    stop: tuple[str, ...]
    seed: int | None
    stop_token_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class Completion:
    """The engine's answer to one call, in the order of the prompts."""

    answers: list[Answer]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    shared: int = 0  # prompts that were answered by another's answer
    fingerprint: str = ""  # of the engine and its settings, as it tells them


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the engine says about the model it serves."""

    name: str
    max_model_len: int | None = None
    told: Mapping[str, Any] = field(default_factory=dict, compare=False)  # all of it


@dataclass(slots=True)
class EngineLoad:
    """What an engine's own metrics say: gauges as they are, the rest counted since its start."""

    running: float = 0.0
    waiting: float = 0.0
    kv_usage: float = 0.0
    completion_tokens: float = 0.0
    finished: float = 0.0
    preemptions: float = 0.0
    cached_tokens: float = 0.0
    looked_up_tokens: float = 0.0
    first_token_sum_s: float = 0.0
    first_token_count: float = 0.0


def find_errors(answers: Sequence[Answer]) -> dict[int, GatewayError]:
    """By place."""
    if are_texts(answers):
        return {}
    return {place: one for place, one in enumerate(answers) if not isinstance(one, str)}


def garbled_answer(error: Exception) -> EngineError:
    return EngineError(
        f"the engine's answer could not be read ({type(error).__name__})", code="engine_garbled"
    )


def garbled_models() -> EngineError:
    return EngineError("the engine's model list could not be read", code="engine_garbled")


def build_completion_call(
    model: str, prompts: Sequence[Prompt], sampling: Sampling, *, is_stream: bool = False
) -> bytes:
    """The body of the one list-prompt call that answers `prompts`, all at once or, as a stream,
    each as it comes to its end.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": [one if isinstance(one, str) else one.tolist() for one in prompts],
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop": sampling.stop,
        "stop_token_ids": sampling.stop_token_ids,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if is_stream:
        # Two chunks a sequence, its first token and all the rest: one for each token would cost
        # the engine's front end more than the tokens do.
        body |= {"stream": True, "stream_interval": sampling.max_tokens}
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    return orjson.dumps(body)


class CompletionStream:
    """Puts the texts of a streamed list-prompt call together."""

    def __init__(self, n_prompts: int) -> None:
        self._texts: dict[int, list[str]] = {place: [] for place in range(n_prompts)}
        self._rest = b""
        self.chunks = 0
        self.is_at_fault = False  # what came made no sense, or told of a fault of the engine's

    def read(self, data: bytes) -> Iterator[tuple[int, Answer, int, int]]:
        """The sequences that have ended: which, how, and their tokens in and out."""
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            text = event.removeprefix(b"data: ")
            if text in (event, b"[DONE]"):
                continue
            try:
                yield from self._read_event(orjson.loads(text))
            except (EngineError, orjson.JSONDecodeError, *UNREADABLE) as error:
                self.is_at_fault = True
                if isinstance(error, EngineError):
                    raise
                raise garbled_answer(error) from error

    def _read_event(self, data: Mapping[str, Any]) -> Iterator[tuple[int, Answer, int, int]]:
        if "error" in data:
            status, message = data["error"].get("code"), str(data["error"]["message"])
            if isinstance(status, int) and 400 <= status < 500:
                raise InvalidRequest(message, code="engine_refused")
            raise EngineError(f"the engine failed in the middle: {message}")
        for choice in data["choices"]:
            self.chunks += 1
            place = choice["index"]
            parts = self._texts[place]
            parts.append(choice["text"])
            if choice.get("finish_reason") is not None:
                del self._texts[place]  # what comes after its end is nobody's
                usage = data.get("usage") or {}
                taken = _read_count(usage, "prompt_tokens")
                given = _read_count(usage, "completion_tokens")
                yield place, _read_choice({**choice, "text": "".join(parts)}), taken, given


def parse_completion_answer(status: int, body: bytes, *, n_prompts: int) -> Completion:
    if status == 200:
        return parse_completion(body, n_prompts)
    raise explain_refusal("/v1/completions", status, body)


def explain_refusal(path: str, status: int, body: bytes) -> GatewayError:
    """`InvalidRequest` for a refusal of what was asked, `RouteNotServed` where there is nobody to
    ask; any other refusal is the engine's failure: a model that is gone, a key that it wants.
    """
    if lacks_route(status, body):
        return no_route(path, status, body)
    message, param = parse_engine_error(body)
    if status in {400, 422}:
        return InvalidRequest(message, param=param, code="engine_refused")
    return EngineError(f"the engine answered {status}: {message}")


def lacks_route(status: int, body: bytes) -> bool:
    """Whether the engine has no such route: none at all, or one that its model is not for."""
    return status == 501 or (status == 404 and parse_engine_error(body)[0] == _NO_ROUTE)


def no_route(path: str, status: int, body: bytes) -> RouteNotServed:
    message, _ = parse_engine_error(body)
    return RouteNotServed(
        f"the engine answered {status}: {message}; the model that it serves is not for {path}"
    )


def parse_completion(body: bytes, n_prompts: int) -> Completion:
    """The engine's answers in prompt order; one it aborted is an error, whatever the status."""
    try:
        data = orjson.loads(body)
        choices = data["choices"]
        usage = data.get("usage") or {}
        answers: list[Answer | None] = [None] * n_prompts
        for choice in choices:
            place, text = choice["index"], choice.get("text")
            if place < 0:  # -1 would be the last one's
                raise IndexError(place)
            is_good = choice.get("finish_reason") in _ENDED and isinstance(text, str)
            answers[place] = text if is_good else _read_choice(choice)
        prompt_tokens = _read_count(usage, "prompt_tokens")
        completion_tokens = _read_count(usage, "completion_tokens")
    except (orjson.JSONDecodeError, *UNREADABLE) as error:
        raise garbled_answer(error) from error
    if len(choices) > n_prompts:
        raise EngineError("the engine answered a prompt twice", code="engine_garbled")
    if missing := answers.count(None):
        raise EngineError(
            f"the engine answered {n_prompts - missing} of {n_prompts} prompts",
            code="engine_garbled",
        )
    fingerprint = str(data.get("system_fingerprint") or "")
    present = cast("list[Answer]", answers)
    return Completion(present, prompt_tokens, completion_tokens, fingerprint=fingerprint)


def _read_choice(choice: Mapping[str, Any]) -> Answer:
    reason, text = choice.get("finish_reason"), choice.get("text")
    if reason not in _ENDED:
        return EngineAborted(f"the engine gave this prompt up (finish_reason {reason!r})")
    if not isinstance(text, str):
        raise TypeError("a text is none")
    return text


def _read_count(usage: Mapping[str, Any], name: str) -> int:
    value = usage.get(name) or 0
    if not isinstance(value, int) or value < 0:
        raise ValueError("a count of tokens is none")
    return value


def parse_engine_error(body: bytes) -> tuple[str, str | None]:
    """Message and field of an engine's error body; any other body is its own message."""
    try:
        data = orjson.loads(body)
        error = data.get("error", data)
        if isinstance(error.get("detail"), str):
            return error["detail"], None
        param = error.get("param")
        return str(error["message"]), param.rsplit(".", 1)[-1] if isinstance(param, str) else None
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return body[:300].decode("utf-8", "replace"), None


def parse_models(body: bytes) -> list[ModelCard]:
    try:
        return [
            ModelCard(str(card["id"]), card.get("max_model_len"), card)
            for card in orjson.loads(body)["data"]
        ]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise garbled_models() from error


def parse_version(status: int, body: bytes) -> str | None:
    """As `GET /version` tells it; an engine may have no such route."""
    try:
        version = orjson.loads(body)["version"] if status == 200 else None
    except (orjson.JSONDecodeError, *UNREADABLE):
        return None
    return str(version) if version is not None else None


def parse_engine_load(metrics: bytes) -> EngineLoad | None:
    """From Prometheus text; `None` where the engine counts nothing (`--disable-log-stats`)."""
    # A few of five hundred lines: reading them all takes as long as a request.
    text = "\n".join(_LOAD_LINE.findall(metrics.decode("utf-8", "replace")))
    samples = parse_samples(f"{text}\n")
    told = {
        field: [value for _, value in samples[name]]
        for name, field in _LOAD_METRICS.items()
        if name in samples
    }
    if not told:
        return None
    # One line for each data-parallel rank: its shares add up, but the fullest cache decides.
    totals = {
        field: max(values) if field == "kv_usage" else sum(values) for field, values in told.items()
    }
    return EngineLoad(**{k: v if math.isfinite(v) else 0.0 for k, v in totals.items()})
