"""/predict: what callers send and what they get."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.config import Settings
from gateway.errors import GatewayError, InvalidRequest
from gateway.schemas.fields import (
    are_texts,
    is_text,
    parse_json_object,
    read_integer,
    read_number,
    read_seed,
    read_stops,
    wrong_type,
)
from gateway.schemas.large_json import scan_object
from gateway.schemas.openai import describe_error
from gateway.schemas.vllm import Sampling

SAMPLING_FIELDS = frozenset(("max_tokens", "temperature", "top_p", "top_k", "stop", "seed"))
PREDICT_FIELDS = SAMPLING_FIELDS | {"prompt", "prompts", "system"}


_CHARACTERS_AT_ONCE = 2**20
_HEADER_SAFE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class PredictRequest:
    """A parsed POST /predict."""

    questions: Sequence[str]
    is_single: bool
    sampling: Sampling
    system: str | None
    ignored_fields: tuple[str, ...] = ()
    is_length_asked: bool = False
    model: object = None  # as it was sent; of interest where several are served


def parse_predict(body: bytes, settings: Settings) -> PredictRequest:
    """The request as the contract reads it; `InvalidRequest` names the field that is wrong."""
    return _read_predict(parse_json_object(body, takes_surrogates=True), settings)


async def parse_large_predict(body: bytes, settings: Settings) -> PredictRequest:
    """The same of a body that takes long to parse: piece by piece."""
    large = await scan_object(body, settings.max_prompts)
    for name in ("prompt" if "prompt" in large.fields else "prompts", "system"):
        if name in large.fields:
            large.fields[name] = await large.load(name, takes_surrogates=True)
    return _read_predict(large.fields, settings)


def _read_predict(data: Mapping[str, Any], settings: Settings) -> PredictRequest:
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
        raise wrong_type(name, "a string or a list of strings")
    if len(questions) > settings.max_prompts:
        raise InvalidRequest(
            f"{len(questions)} prompts in one call; at most {settings.max_prompts} are taken",
            param=name,
            code="too_many_prompts",
        )
    if not are_texts(questions):
        index = next(place for place, one in enumerate(questions) if not isinstance(one, str))
        raise wrong_type(f"{name}[{index}]", "a string")
    system = data.get("system")
    if system is not None and (not isinstance(system, str) or not is_text(system)):
        raise wrong_type("system", "a string")
    return PredictRequest(
        questions=questions,
        is_single=isinstance(value, str),
        sampling=parse_sampling(data, settings),
        system=system,
        ignored_fields=_name_ignored(data),
        is_length_asked=data.get("max_tokens") is not None,
        model=data.get("model"),
    )


def _name_ignored(data: Mapping[str, Any]) -> tuple[str, ...]:
    """For a header, so only names that are safe and short there."""
    names = sorted(name for name in data.keys() - PREDICT_FIELDS if _HEADER_SAFE.fullmatch(name))
    return tuple(names[:10])


def parse_sampling(data: Mapping[str, Any], settings: Settings) -> Sampling:
    return Sampling(
        max_tokens=read_integer(data, "max_tokens", settings.max_tokens, low=1),
        temperature=read_number(data, "temperature", settings.temperature, low=0, high=2),
        top_p=read_number(data, "top_p", settings.top_p, low=0, high=1, above_low=True),
        top_k=max(0, read_integer(data, "top_k", settings.top_k, low=-1)),  # -1 and 0 both mean all
        stop=read_stops(data.get("stop"), settings.stop),
        seed=read_seed(data, settings.seed),
    )


def default_sampling(settings: Settings) -> Sampling:
    return parse_sampling({}, settings)


async def build_predict_response(
    request: PredictRequest,
    texts: Sequence[str],
    errors: Mapping[int, GatewayError],
    *,
    single_as_list: bool,
) -> bytes:
    """The body of a /predict answer. A single prompt that failed is raised, not written."""
    if request.is_single and errors:
        raise errors[0]
    is_text = request.is_single and not single_as_list
    pieces = [orjson.dumps(texts[0])] if is_text else await _dump_texts(texts)
    if errors:
        told = {str(place): describe_error(error) for place, error in errors.items()}
        pieces += [b',"errors":', orjson.dumps(told)]
    # Put together once: what is megabytes takes milliseconds to copy.
    return b"".join((b'{"response":', *pieces, b"}"))


async def _dump_texts(texts: Sequence[str]) -> list[bytes]:
    """Pieces of a list, some texts at a time: the answers of a large batch are megabytes."""
    if sum(map(len, texts)) <= _CHARACTERS_AT_ONCE:
        return [orjson.dumps(texts)]
    pieces, start, size = [b"["], 0, 0
    for place, text in enumerate(texts, start=1):
        size += len(text)
        if size > _CHARACTERS_AT_ONCE or place == len(texts):
            pieces += [orjson.dumps(texts[start:place])[1:-1], b","]
            start = place
        if size > _CHARACTERS_AT_ONCE:
            size = 0
            await asyncio.sleep(0)
    return [*pieces[:-1], b"]"]
