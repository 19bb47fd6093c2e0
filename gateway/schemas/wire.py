"""Every JSON shape that crosses the gateway's border: what callers send, what they get, what the
engine is asked and what it says. Nothing here talks to anybody.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.config import Settings
from gateway.errors import EngineAborted, EngineError, GatewayError, InvalidRequest, NotFound

Prompt = str | list[int]

_USAGE = re.compile(rb'"usage":\s*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
_FIGURE = re.compile(rb"^vllm:(\w+)(?:\{.*\})? (\S+)", re.MULTILINE)
_FIGURES = {
    b"num_requests_running": "running",
    b"num_requests_waiting": "waiting",
    b"kv_cache_usage_perc": "kv_usage",
    b"generation_tokens_total": "completion_tokens",
    b"request_success_total": "finished",
    b"num_preemptions_total": "preemptions",
    b"prefix_cache_hits_total": "cached_tokens",
    b"prefix_cache_queries_total": "looked_up_tokens",
    b"time_to_first_token_seconds_sum": "first_token_sum_s",
    b"time_to_first_token_seconds_count": "first_token_count",
}
_EVENT_STARTS = (b"event:", b"data:")
_RESPONSE_END = re.compile(rb'"type":\s*"response\.(?:completed|incomplete|failed)"')
_NO_CHOICES = b'"choices":[]'
_HEADER_SAFE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_STOPS = 4  # vLLM's own limit
MAX_STOP_CHARACTERS = 256
SAMPLING_FIELDS = frozenset(("max_tokens", "temperature", "top_p", "top_k", "stop", "seed"))
PREDICT_FIELDS = SAMPLING_FIELDS | {"prompt", "prompts", "system"}


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


@dataclass(frozen=True, slots=True)
class PredictRequest:
    """A parsed POST /predict."""

    questions: list[str]
    is_single: bool
    sampling: Sampling
    system: str | None
    ignored_fields: tuple[str, ...] = ()
    is_length_asked: bool = False


@dataclass(slots=True)  # not frozen: that doubles the cost of making one, once a request
class RelayCall:
    """What the gateway must know of a /v1 call it passes on; `body` is what the engine gets."""

    body: bytes
    model: str | None = None
    sequences: int = 1
    is_stream: bool = False
    is_greedy: bool = False
    hides_usage: bool = False
    affinity: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """One sequence as the engine ended it."""

    text: str
    finish_reason: str


@dataclass(slots=True)
class Completion:
    """The engine's answer to one call, in the order of the prompts."""

    answers: list[Answer | GatewayError]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    shared: int = 0  # prompts that were answered by another's answer


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the engine says about the model it serves."""

    name: str
    max_model_len: int | None = None


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


def parse_json_object(body: bytes, *, takes_surrogates: bool = False) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if not takes_surrogates or "surrogate" not in str(error):
            raise InvalidRequest(f"the body is not JSON: {error}", code="invalid_json") from None
        value = _parse_leniently(body, error)
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object", code="invalid_type")
    return value


def _parse_leniently(body: bytes, error: Exception) -> Any:
    """JSON's grammar allows half a surrogate pair, orjson does not: one prompt pays for it."""
    with contextlib.suppress(ValueError, RecursionError):
        # Of bytes it would take UTF-16 too, which is nobody's JSON.
        return json.loads(body.decode(), parse_constant=_refuse_constant)
    raise InvalidRequest(f"the body is not JSON: {error}", code="invalid_json") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: half a surrogate pair cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_predict(body: bytes, settings: Settings) -> PredictRequest:
    """The request as the contract reads it; `InvalidRequest` names the field that is wrong."""
    data = parse_json_object(body, takes_surrogates=True)
    name = "prompt" if "prompt" in data else "prompts"
    if name not in data:
        raise InvalidRequest(
            'send {"prompt": "a question"} or {"prompt": ["a question", …]}',
            param="prompt",
            code="missing_field",
        )
    value = data[name]
    questions = [value] if isinstance(value, str) else value
    if not isinstance(questions, list):
        raise _wrong_type(name, "a string or a list of strings")
    for index, question in enumerate(questions):
        if not isinstance(question, str):
            raise _wrong_type(f"{name}[{index}]", "a string")
    if len(questions) > settings.max_prompts:
        raise InvalidRequest(
            f"{len(questions)} prompts in one call; at most {settings.max_prompts} are taken",
            param=name,
            code="too_many_prompts",
        )
    system = data.get("system")
    if system is not None and (not isinstance(system, str) or not is_text(system)):
        raise _wrong_type("system", "a string")
    return PredictRequest(
        questions=questions,
        is_single=isinstance(value, str),
        sampling=parse_sampling(data, settings),
        system=system,
        ignored_fields=_name_ignored(data),
        is_length_asked=data.get("max_tokens") is not None,
    )


def _name_ignored(data: Mapping[str, Any]) -> tuple[str, ...]:
    """For a header, so only names that are safe and short there."""
    names = sorted(name for name in data.keys() - PREDICT_FIELDS if _HEADER_SAFE.fullmatch(name))
    return tuple(names[:10])


def parse_sampling(data: Mapping[str, Any], settings: Settings) -> Sampling:
    return Sampling(
        max_tokens=_integer(data, "max_tokens", settings.max_tokens, low=1),
        temperature=_number(data, "temperature", settings.temperature, low=0, high=2),
        top_p=_number(data, "top_p", settings.top_p, low=0, high=1, above_low=True),
        top_k=max(0, _integer(data, "top_k", settings.top_k, low=-1)),  # -1 and 0 both mean all
        stop=_stops(data.get("stop"), settings.stop),
        seed=_seed(data, settings),
    )


def default_sampling(settings: Settings) -> Sampling:
    return parse_sampling({}, settings)


def _integer(data: Mapping[str, Any], name: str, default: int, *, low: int) -> int:
    value = data.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong_type(name, "a whole number")
    if value < low or value > 2**31 - 1:
        raise InvalidRequest(f"{name} must be at least {low} and fit 32 bits", param=name)
    return value


def _seed(data: Mapping[str, Any], settings: Settings) -> int | None:
    value = data.get("seed")
    if value is None:
        return settings.seed
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong_type("seed", "a whole number")
    if not -(2**63) <= value < 2**63:
        raise InvalidRequest("seed must fit 64 bits", param="seed")
    return value


def _number(
    data: Mapping[str, Any],
    name: str,
    default: float,
    *,
    low: float,
    high: float,
    above_low: bool = False,
) -> float:
    value = data.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(name, "a number")
    if not low <= value <= high or (above_low and value == low):
        bound = "above" if above_low else "at least"
        raise InvalidRequest(f"{name} must be {bound} {low} and at most {high}", param=name)
    return float(value)


def _stops(value: Any, default: tuple[str, ...]) -> tuple[str, ...]:
    if value is None:
        return default
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(
        isinstance(stop, str) and is_text(stop) for stop in stops
    ):
        raise _wrong_type("stop", "a string or a list of strings")
    if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise InvalidRequest(
            f"stop takes at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters",
            param="stop",
        )
    return tuple(stops)


def _wrong_type(param: str, expected: str) -> InvalidRequest:
    return InvalidRequest(f"{param} must be {expected}", param=param, code="invalid_type")


def parse_relay_call(path: str, body: bytes, settings: Settings) -> RelayCall:
    """Bounds what could harm the engine or other callers; passes every other field on untouched."""
    try:
        return _parse_relay_call(path, body, settings)
    except orjson.JSONEncodeError as error:
        # Read but not writable again: nested too deep, or half a surrogate pair.
        raise InvalidRequest(
            f"the body cannot be passed on: {error}", code="invalid_json"
        ) from None


def _parse_relay_call(path: str, body: bytes, settings: Settings) -> RelayCall:
    data = parse_json_object(body)
    model = data.get("model")
    if model is not None and not isinstance(model, str):
        raise _wrong_type("model", "a string")
    changed = False
    if model is not None and model in settings.alias_map:
        model = data["model"] = settings.alias_map[model]
        changed = True
    if data.pop("priority", None) is not None:
        changed = True  # who goes first is the gate's business
    sequences = _bound_sequences(data, settings)
    _bound_sizes(data, settings)
    _bound_lengths(data, settings)
    is_stream = _is_set(data, "stream", "stream")
    hides_usage = False
    if is_stream and path in {"/v1/completions", "/v1/chat/completions"}:
        hides_usage = _ask_for_usage(data)
        changed = changed or hides_usage
    return RelayCall(
        body=orjson.dumps(data) if changed else body,
        model=model,
        sequences=sequences,
        is_stream=is_stream,
        is_greedy=data.get("temperature") == 0,
        hides_usage=hides_usage,
        affinity=_affinity(data, settings),
    )


def _is_set(data: Mapping[str, Any], name: str, param: str) -> bool:
    """The engine reads "yes" and 1 as true: streams whose tokens nobody would count."""
    value = data.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong_type(param, "true or false")
    return bool(value)


def _bound_sequences(data: Mapping[str, Any], settings: Settings) -> int:
    # Which of the two a route reads is the engine's affair; the other is no way around the bound.
    prompts = max(_count_prompts(data.get("prompt")), _count_prompts(data.get("input")))
    if prompts > settings.max_prompts_per_call:
        raise InvalidRequest(
            f"{prompts} prompts in one call; at most {settings.max_prompts_per_call} are taken",
            param="prompt",
            code="too_many_prompts",
        )
    copies = max(_count(data, "n", settings.max_n), _count(data, "best_of", settings.max_n))
    return max(1, prompts) * copies


def _count_prompts(prompt: Any) -> int:
    return len(prompt) if isinstance(prompt, list) and _holds_prompts(prompt) else 1


def _holds_prompts(prompt: list[Any]) -> bool:
    """Not the ids of one prompt, nor the turns of a conversation."""
    return not prompt or isinstance(prompt[0], str | list)


def _count(data: Mapping[str, Any], name: str, most: int) -> int:
    value = data.get(name)
    if value is None:
        return 1
    if not isinstance(value, int) or isinstance(value, bool):
        # The engine would read "500" or 500.0 as a number, past the bound.
        raise _wrong_type(name, "a whole number")
    if value > most:
        raise InvalidRequest(f"{name} must be at most {most}", param=name)
    return max(1, value)


def _bound_sizes(data: Mapping[str, Any], settings: Settings) -> None:
    for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
        value = data.get(name)
        if isinstance(value, str | float):
            raise _wrong_type(name, "a whole number")
        # The engine takes -1 for the whole vocabulary.
        if isinstance(value, int) and not 0 <= value <= settings.max_logprobs:
            raise InvalidRequest(f"{name} must be 0 to {settings.max_logprobs}", param=name)
    stop = data.get("stop")
    if isinstance(stop, str | list):
        _stops(stop, ()) if stop else None
    for name in ("response_format", "structured_outputs", "tools", "guided_json", "text"):
        if name in data and len(orjson.dumps(data[name])) > settings.max_schema_bytes:
            raise InvalidRequest(
                f"{name} is larger than {settings.max_schema_bytes} bytes", param=name
            )


def _bound_lengths(data: Mapping[str, Any], settings: Settings) -> None:
    """What is no number is the engine's to refuse."""
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens"):
        value = data.get(name)
        if isinstance(value, str | float):
            raise _wrong_type(name, "a whole number")
        if isinstance(value, int) and value > settings.max_new_tokens:
            raise InvalidRequest(f"{name} must be at most {settings.max_new_tokens}", param=name)


def _ask_for_usage(data: dict[str, Any]) -> bool:
    """Has the engine end a stream with its token counts; true if nobody else had asked."""
    options = data.get("stream_options")
    if options is not None and not isinstance(options, dict):
        return False
    if options and _is_set(options, "include_usage", "stream_options.include_usage"):
        return False
    data["stream_options"] = {**(options or {}), "include_usage": True}
    return True


def _affinity(data: Mapping[str, Any], settings: Settings) -> str:
    if settings.routing == "session":
        session = data.get("prompt_cache_key") or data.get("user")
        return session if isinstance(session, str) else ""
    if settings.routing == "prefix":
        start = data.get("messages") or data.get("prompt") or data.get("input") or ""
        text = start if isinstance(start, str) else orjson.dumps(start).decode()
        return text[: settings.prefix_characters]
    return ""


def parse_usage(body: bytes) -> tuple[int, int] | None:
    """Tokens in and out from the last usage object in a body or in the events of a stream.

    A caller's text cannot pass for one: inside a JSON string its quotes are escaped. What a caller
    sent and a response repeats, such as tools, stands before it.
    """
    is_event = body.startswith(_EVENT_STARTS) and b'"object":"response"' in body
    if is_event and not _RESPONSE_END.search(body):
        return None
    objects = _USAGE.findall(body)
    if not objects:
        return None
    try:
        usage = orjson.loads(objects[-1])
    except orjson.JSONDecodeError:
        return None
    taken = usage.get("prompt_tokens", usage.get("input_tokens")) or 0
    given = usage.get("completion_tokens", usage.get("output_tokens")) or 0
    return (taken, given) if isinstance(taken, int) and isinstance(given, int) else None


def drop_usage_events(events: bytes) -> bytes:
    """The events of a stream without those that only tell the usage, which nobody asked for."""
    kept = [event for event in events.split(b"\n\n") if _NO_CHOICES not in event]
    return b"\n\n".join(kept)


def build_stream_error(error: GatewayError, path: str, number: int) -> bytes:
    """The event that ends a stream whose engine failed, in the dialect of the route; where events
    are numbered, this one comes after all others.
    """
    if path == "/v1/messages":
        data = orjson.dumps({"type": "error", "error": describe_error(error)})
        return b"event: error\ndata: " + data + b"\n\n"
    if path == "/v1/responses":
        data = orjson.dumps({**describe_error(error), "type": "error", "sequence_number": number})
        return b"event: error\ndata: " + data + b"\n\n"
    return b"data: " + build_error(error) + b"\n\ndata: [DONE]\n\n"


def build_models(body: bytes, aliases: Mapping[str, str], wanted: str | None) -> bytes:
    """The engine's model list with the names that also stand for its models, or one of them."""
    if not aliases and wanted is None:
        return body
    try:
        data = orjson.loads(body)
        cards = {card["id"]: card for card in data["data"]}
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise _garbled_models() from error
    for alias, target in aliases.items():
        if target in cards:
            cards[alias] = {**cards[target], "id": alias}
    if wanted is None:
        return orjson.dumps({**data, "data": list(cards.values())})
    if wanted not in cards:
        raise NotFound(
            f"there is no model {wanted!r}; GET /v1/models lists what there is",
            param="model",
            code="model_not_found",
        )
    return orjson.dumps(cards[wanted])


def _garbled_models() -> EngineError:
    return EngineError("the engine's model list could not be read", code="engine_garbled")


def build_predict_response(
    request: PredictRequest, answers: Sequence[str | GatewayError], *, single_as_list: bool
) -> bytes:
    """The body of a /predict answer. A single prompt that failed is raised, not written."""
    if request.is_single and isinstance(answers[0], GatewayError):
        raise answers[0]
    texts = [answer if isinstance(answer, str) else "" for answer in answers]
    body: dict[str, Any] = {"response": texts}
    if request.is_single and not single_as_list:
        body["response"] = texts[0]
    errors = {
        str(index): describe_error(answer)
        for index, answer in enumerate(answers)
        if isinstance(answer, GatewayError)
    }
    if errors:
        body["errors"] = errors
    return orjson.dumps(body)


def describe_error(error: GatewayError) -> dict[str, Any]:
    return {
        "message": error.message,
        "type": error.kind,
        "code": error.error_code,
        "param": error.param,
        "source": error.source,
    }


def build_error(error: GatewayError) -> bytes:
    return orjson.dumps({"error": describe_error(error)})


def build_completion_call(model: str, prompts: Sequence[Prompt], sampling: Sampling) -> bytes:
    """The body of the one list-prompt call that answers `prompts`."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(prompts),
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop": sampling.stop,
        "stop_token_ids": sampling.stop_token_ids,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    return orjson.dumps(body)


def parse_completion(body: bytes, n_prompts: int) -> Completion:
    """The engine's answers in prompt order; one it aborted is an error, whatever the status."""
    try:
        data = orjson.loads(body)
        choices = data["choices"]
        usage = data.get("usage") or {}
        answers: list[Answer | GatewayError | None] = [None] * n_prompts
        for choice in choices:
            place = range(n_prompts).index(choice["index"])  # -1 would be the last one's
            answers[place] = _read_choice(choice)
        prompt_tokens = int(usage.get("prompt_tokens") or 0)
        completion_tokens = int(usage.get("completion_tokens") or 0)
    except (orjson.JSONDecodeError, KeyError, TypeError, IndexError, ValueError) as error:
        raise EngineError(
            f"the engine's answer could not be read ({type(error).__name__})", code="engine_garbled"
        ) from error
    present = [answer for answer in answers if answer is not None]
    if len(present) != n_prompts:
        raise EngineError(
            f"the engine answered {len(present)} of {n_prompts} prompts", code="engine_garbled"
        )
    return Completion(present, prompt_tokens, completion_tokens)


def _read_choice(choice: Mapping[str, Any]) -> Answer | EngineError:
    reason = choice.get("finish_reason")
    if reason not in {"stop", "length"}:
        return EngineAborted(f"the engine gave this prompt up (finish_reason {reason!r})")
    return Answer(str(choice["text"]), str(reason))


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


def name_stream_errors(events: bytes) -> tuple[bytes, bool]:
    """The engine's own error events, with who failed; and whether it was the engine's fault.

    vLLM checks some of what a caller sent only after its 200: that is his mistake all the same.
    """
    is_fault = False
    lines = events.split(b"\n")
    for place, line in enumerate(lines):
        if line.startswith(b'data: {"error"'):
            with contextlib.suppress(orjson.JSONDecodeError, AttributeError):
                data = orjson.loads(line[6:])
                error = data["error"]
                error.setdefault("source", EngineError.source)
                status = error.get("code")
                is_fault |= not (isinstance(status, int) and 400 <= status < 500)
                lines[place] = b"data: " + orjson.dumps(data)
    return b"\n".join(lines), is_fault


def name_engine_error(status: int, body: bytes) -> bytes:
    """An engine's refusal as it is, with who refused; what is no error object becomes one."""
    try:
        data = orjson.loads(body)
        error = data["error"]
        error.setdefault("source", EngineError.source)
        return orjson.dumps(data)
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        message, param = parse_engine_error(body)
        text = f"the engine answered {status}: {message}".rstrip(": ")
        return build_error(EngineError(text, param=param))


def parse_models(body: bytes) -> list[ModelCard]:
    try:
        return [
            ModelCard(str(card["id"]), card.get("max_model_len"))
            for card in orjson.loads(body)["data"]
        ]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise _garbled_models() from error


def parse_engine_load(metrics: bytes) -> EngineLoad | None:
    """From Prometheus text; `None` where the engine counts nothing (`--disable-log-stats`)."""
    load: EngineLoad | None = None
    for name, value in _FIGURE.findall(metrics):
        field_name = _FIGURES.get(name)
        if field_name is None:
            continue
        load = load or EngineLoad()
        known, told = getattr(load, field_name), float(value)
        # One line for each data-parallel rank: its shares add up, but the fullest cache decides.
        total = max(known, told) if field_name == "kv_usage" else known + told
        setattr(load, field_name, total if math.isfinite(total) else 0.0)
    return load
