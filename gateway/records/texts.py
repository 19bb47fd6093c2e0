"""What people wrote and read of a call's body and of its answer: their texts, without the JSON.

By the names of fields, not by route: OpenAI's, Anthropic's and the gateway's own bodies keep texts
under few names, and pictures and sounds under others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

_TEXTS = frozenset(
    (
        *("prompt", "prompts", "system", "content", "text", "input", "instructions", "response"),
        *("query", "documents", "texts", "text_1", "text_2", "queries", "arguments", "refusal"),
        *("reasoning", "reasoning_content", "thinking", "partial_json", "output"),
    )
)
_DEEPEST = 64


def read_texts(body: bytes) -> str:
    """Of a whole body, one below the other; what is no JSON is taken as it is, if it is text."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode("utf-8", "replace")
    return "\n".join(_walk(value, is_text=False, depth=0))


def read_stream(events: bytes) -> str:
    """Of a stream's events: the pieces of each choice put together."""
    pieces: dict[int, list[str]] = {}
    for line in events.splitlines():
        if line.startswith(b"data: {"):
            try:
                event = orjson.loads(line[6:])
            except orjson.JSONDecodeError:
                continue  # it is cut off here
            for place, text in _read_event(event):
                pieces.setdefault(place, []).append(text)
    return "\n".join("".join(pieces[place]) for place in sorted(pieces))


def _read_event(event: dict[str, Any]) -> Iterator[tuple[int, str]]:
    kind = event.get("type")
    if isinstance(kind, str):
        # Anthropic's, and those of OpenAI's responses, which tell at their end all of it again.
        if kind.endswith("delta"):
            place = event.get("output_index", event.get("index", 0))
            for text in _walk(event.get("delta"), is_text=True, depth=0):
                yield _as_place(place), text
        return
    choices = event.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict):
            said = choice.get("delta", choice.get("text"))
            for text in _walk(said, is_text=True, depth=0):
                yield _as_place(choice.get("index", 0)), text


def _as_place(value: object) -> int:
    return value if isinstance(value, int) else 0


def _walk(value: Any, *, is_text: bool, depth: int) -> Iterator[str]:
    if isinstance(value, str):
        if is_text:
            yield value
    elif depth < _DEEPEST:
        if isinstance(value, list):
            for one in value:
                yield from _walk(one, is_text=is_text, depth=depth + 1)
        elif isinstance(value, dict):
            for name, one in value.items():
                yield from _walk(one, is_text=name in _TEXTS, depth=depth + 1)
