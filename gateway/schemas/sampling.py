"""Sampling fields of /v1 whose values the engine cannot take: it would answer some of them with 500
or only when the call runs already. What it refuses well is its own to refuse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import orjson

from gateway.errors import InvalidRequest
from gateway.schemas.constraints.grammars import CONSTRAINING
from gateway.schemas.fields import wrong_type

_INT32 = 2**31 - 1
_RANGES: Mapping[str, tuple[float, float]] = {
    "top_k": (-1, _INT32),
    "repetition_penalty": (0, 100),
    "length_penalty": (-10, 10),
    "truncate_prompt_tokens": (-1, _INT32),
    "thinking_token_budget": (-1, _INT32),
    "stream_interval": (1, _INT32),
}
TOKEN_LISTS = ("stop_token_ids", "allowed_token_ids", "logprob_token_ids")
_CHECKED = frozenset((*_RANGES, *TOKEN_LISTS, "logit_bias", "vllm_xargs"))
_MOST_TOKEN_DIGITS = 10
# What vLLM hands on to its other processes as it came, whatever is in it.
_HANDED_ON = CONSTRAINING | {
    *("repetition_detection", "vllm_xargs", "kv_transfer_params", "ec_transfer_params")
}
_GREAT = 2.0**63
# How engines hand work to each other; it names hosts that the engine would then speak to.
_INTERNAL_ARGUMENTS = ("kv_transfer_params", "ec_transfer_params")


def check_sampling(data: Mapping[str, Any]) -> None:
    """`InvalidRequest` names the field; what is no number is the engine's to refuse."""
    if _CHECKED.isdisjoint(data):
        return
    for name in _RANGES.keys() & data.keys():
        value = data[name]
        if isinstance(value, int | float):
            low, high = _RANGES[name]
            if not low <= value <= high:
                raise InvalidRequest(f"{name} must be {low} to {high}", param=name)
    for name in TOKEN_LISTS:
        _check_tokens(name, data.get(name))
    _check_biases(data.get("logit_bias"))
    extra = data.get("vllm_xargs")
    if isinstance(extra, dict):
        for name in _INTERNAL_ARGUMENTS:
            if name in extra:
                raise InvalidRequest(
                    f"vllm_xargs.{name} is no field for callers; leave it out",
                    param=f"vllm_xargs.{name}",
                )


def renew_great_numbers(data: dict[str, Any]) -> bool:
    """Whether something that vLLM hands on holds a whole number of more than 64 bits, at which its
    processes cannot be told of the call. Here it has been read as a float, and such a field becomes
    another object: of a large body, what is still the same one is passed on as it came.
    """
    if _HANDED_ON.isdisjoint(data):
        return False
    great = [name for name in _HANDED_ON & data.keys() if _holds_great_number(data[name])]
    for name in great:
        data[name] = orjson.loads(orjson.dumps(data[name]))
    return bool(great)


def _holds_great_number(field: Any) -> bool:
    pending = [field]
    while pending:
        value = pending.pop()
        if isinstance(value, float):
            if abs(value) >= _GREAT:
                return True
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return False


def _check_tokens(name: str, tokens: Any) -> None:
    if not isinstance(tokens, list):
        return
    for token in tokens:
        if isinstance(token, int | float) and not 0 <= token <= _INT32:
            raise InvalidRequest(f"{name} takes ids of tokens, 0 and above", param=name)


def _check_biases(biases: Any) -> None:
    if not isinstance(biases, dict):
        return
    for token, bias in biases.items():
        if len(token) > _MOST_TOKEN_DIGITS or (token.isdecimal() and int(token) > _INT32):
            raise InvalidRequest("logit_bias takes ids of tokens as names", param="logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise wrong_type("logit_bias", "an object of numbers by token id")
        if not math.isfinite(bias):
            raise InvalidRequest("logit_bias takes numbers of -100 to 100", param="logit_bias")
