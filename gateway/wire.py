"""Every JSON shape that crosses the gateway's border: what callers send, what they get, what the
engine is asked and what it says. Nothing here talks to anybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.config import Settings
from gateway.errors import EngineAborted, EngineError, GatewayError, InvalidRequest

Prompt = str | list[int]

MAX_STOPS = 16
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


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the engine says about the model it serves."""

    name: str
    max_model_len: int | None = None


def parse_json_object(body: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object", code="invalid_type")
    return value


def parse_predict(body: bytes, settings: Settings) -> PredictRequest:
    """The request as the contract reads it; `InvalidRequest` names the field that is wrong."""
    data = parse_json_object(body)
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
    if system is not None and not isinstance(system, str):
        raise _wrong_type("system", "a string")
    return PredictRequest(
        questions=questions,
        is_single=isinstance(value, str),
        sampling=parse_sampling(data, settings),
        system=system,
        ignored_fields=tuple(sorted(data.keys() - PREDICT_FIELDS)),
    )


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
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise _wrong_type("stop", "a string or a list of strings")
    if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise InvalidRequest(
            f"stop takes at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters",
            param="stop",
        )
    return tuple(stops)


def _wrong_type(param: str, expected: str) -> InvalidRequest:
    return InvalidRequest(f"{param} must be {expected}", param=param, code="invalid_type")


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
            answers[choice["index"]] = _read_choice(choice)
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
        return str(error["message"]), error.get("param")
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return body[:300].decode("utf-8", "replace"), None


def parse_models(body: bytes) -> list[ModelCard]:
    try:
        return [
            ModelCard(str(card["id"]), card.get("max_model_len"))
            for card in orjson.loads(body)["data"]
        ]
    except (orjson.JSONDecodeError, KeyError, TypeError) as error:
        raise EngineError(
            "the engine's model list could not be read", code="engine_garbled"
        ) from error
