"""JSON objects and their fields as callers send them: one clear refusal for each mistake."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import orjson

from gateway.errors import InvalidRequest

MAX_STOPS = 4  # vLLM's own limit
MAX_STOP_CHARACTERS = 256
_WHOLE_NUMBER = re.compile(r"\s*([+-]?[0-9]{1,12})(?:\.0*)?\s*")
_TEXT = frozenset((str,))
_FLAGS: Mapping[Any, bool] = {
    **dict.fromkeys((1, "1", "on", "t", "true", "y", "yes"), True),
    **dict.fromkeys((0, "0", "off", "f", "false", "n", "no"), False),
}


def parse_json(body: bytes, takes_surrogates: bool = False) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if not takes_surrogates or "surrogate" not in str(error):
            raise InvalidRequest(f"the body is not JSON: {error}", code="invalid_json") from None
        return _parse_leniently(body, error)


def parse_json_object(body: bytes, *, takes_surrogates: bool = False) -> dict[str, Any]:
    value = parse_json(body, takes_surrogates)
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


def read_whole_number(value: str | float, name: str) -> int:
    """As the engine reads it: 5.0 and "5" are 5."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    found = _WHOLE_NUMBER.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise wrong_type(name, "a whole number")
    return int(found[1])


def read_flag(value: Any, name: str) -> bool:
    """As the engine reads it: 1 and "yes" are true."""
    known = value.lower() if isinstance(value, str) else value
    if not isinstance(known, str | int | float) or known not in _FLAGS:
        raise wrong_type(name, "true or false")
    return _FLAGS[known]


def are_texts(values: Sequence[object]) -> TypeGuard[Sequence[str]]:
    """Whether each is a string: of a batch, that takes a fraction of looking at one by one."""
    return set(map(type, values)) <= _TEXT


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: half a surrogate pair cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_storable(text: str) -> bool:
    """Whether every database takes it."""
    return "\0" not in text and is_text(text)


def read_integer(data: Mapping[str, Any], name: str, default: int, *, low: int) -> int:
    value = data.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(name, "a whole number")
    if value < low or value > 2**31 - 1:
        raise InvalidRequest(f"{name} must be at least {low} and fit 32 bits", param=name)
    return value


def read_seed(data: Mapping[str, Any], default: int | None) -> int | None:
    value = data.get("seed")
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type("seed", "a whole number")
    if not -(2**63) <= value < 2**63:
        raise InvalidRequest("seed must fit 64 bits", param="seed")
    return value


def read_number(
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
        raise wrong_type(name, "a number")
    if not low <= value <= high or (above_low and value == low):
        bound = "above" if above_low else "at least"
        raise InvalidRequest(f"{name} must be {bound} {low} and at most {high}", param=name)
    return float(value)


def read_stops(
    value: Any, default: tuple[str, ...], longest: int = MAX_STOP_CHARACTERS
) -> tuple[str, ...]:
    if value is None:
        return default
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list):
        raise wrong_type("stop", "a string or a list of strings")
    few = stops[: MAX_STOPS + 1]
    if not all(isinstance(stop, str) and is_text(stop) for stop in few):
        raise wrong_type("stop", "a string or a list of strings")
    if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= longest for stop in stops):
        raise InvalidRequest(
            f"stop takes at most {MAX_STOPS} texts of 1 to {longest} characters",
            param="stop",
        )
    return tuple(stops)


def wrong_type(param: str, expected: str) -> InvalidRequest:
    return InvalidRequest(f"{param} must be {expected}", param=param, code="invalid_type")
