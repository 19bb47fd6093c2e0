"""What engines answer to pieces of a list, checked and put together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.errors import EngineError, InvalidRequest
from gateway.schemas.fields import parse_json
from gateway.schemas.large_json import Pace, scan_members
from gateway.schemas.vllm import UNREADABLE, garbled_answer

_OTHER_LISTS = 10_000  # items of any other list in an engine's answer
_INDEX = re.compile(rb'\{\s*+"index"\s*+:\s*+(\d{1,9})(?=\s*+[,}])')


@dataclass(slots=True)
class PieceAnswer:
    """What an engine answered to some prompts of a list."""

    choices: list[bytes]  # in the order of their prompts, and numbered in that of the whole list
    usage: Mapping[str, Any] | None
    frame: list[bytes | str]  # the body as it came, but for members that are told by name


async def parse_piece(body: bytes, *, first: int, count: int) -> PieceAnswer:
    """Of the choices from `first` on of a list's; `EngineError` unless there is one for each."""
    try:
        members = await scan_members(body, max(count, _OTHER_LISTS))
        found = members["choices"]
        if len(found.items) > count:
            raise EngineError("the engine answered a prompt twice", code="engine_garbled")
        choices: list[bytes | None] = [None] * count
        pace = Pace()
        for start, end in found.items:
            place, choice = _move_choice(body, start, end, first)
            if not 0 <= place < count or choices[place] is not None:
                raise IndexError(place)
            choices[place] = choice
            await pace.count(end - start)
        told = members.get("usage")
        usage = parse_json(body[told.start : told.end]) if told is not None else None
        if usage is not None and not isinstance(usage, dict):
            raise TypeError("usage is no object")
        add_usage({}, usage or {})
    except (InvalidRequest, orjson.JSONDecodeError, *UNREADABLE) as error:
        raise garbled_answer(error) from error
    check_number(count - choices.count(None), count)
    named = [found] if told is None else sorted((found, told), key=lambda one: one.start)
    frame: list[bytes | str] = []
    at = 0
    for one in named:
        frame += (body[at : one.start], "choices" if one is found else "usage")
        at = one.end
    frame.append(body[at:])
    return PieceAnswer([one for one in choices if one is not None], usage, frame)


def put_together(pieces: Sequence[PieceAnswer]) -> bytes:
    """The answer to the whole list; what is not told of each prompt is as in the first piece."""
    usage: dict[str, Any] = {}
    for piece in pieces:
        add_usage(usage, piece.usage or {})
    parts: list[bytes] = []  # joined once: what is megabytes takes milliseconds to copy
    for part in pieces[0].frame:
        if isinstance(part, bytes):
            parts.append(part)
        elif part == "usage":
            parts.append(orjson.dumps(usage or None))
        else:
            choices = [choice for piece in pieces for choice in piece.choices]
            for number, choice in enumerate(choices):
                parts += (b"," if number else b"[", choice)
            parts.append(b"]")
    return b"".join(parts)


def add_usage(total: dict[str, Any], told: Mapping[str, Any]) -> None:
    """Every count, those of details too; what is no count stays as it was told first."""
    for name, value in told.items():
        known = total.get(name)
        if isinstance(value, dict):
            nested = total[name] = dict(known) if isinstance(known, dict) else {}
            add_usage(nested, value)
        elif isinstance(value, int) and not isinstance(value, bool):
            if value < 0:
                raise ValueError("a count of tokens is none")
            total[name] = value + (known if isinstance(known, int) else 0)
        elif known is None:
            total[name] = value


def read_counts(usage: Mapping[str, Any]) -> tuple[int, int]:
    """Tokens in and out."""
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    taken, given = (one if isinstance(one, int) else 0 for one in counts)
    return taken, given


def _move_choice(body: bytes, start: int, end: int, by: int) -> tuple[int, bytes]:
    """Which of its call's choices it is, and the choice with its number in the whole list."""
    if found := _INDEX.match(body, start, end):  # where engines write it
        place = int(found[1])
        before, after = body[start : found.start(1)], body[found.end() : end]
        return place, b"%s%d%s" % (before, place + by, after)
    choice = orjson.loads(body[start:end])
    place = choice["index"]
    if type(place) is not int:
        raise TypeError("an index is none")
    return place, orjson.dumps({**choice, "index": place + by})


def check_number(present: int, count: int) -> None:
    if present != count:
        raise EngineError(
            f"the engine answered {present} of {count} prompts", code="engine_garbled"
        )
