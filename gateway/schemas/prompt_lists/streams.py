"""The streams that engines answer to pieces of a list, as one stream of the whole list."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from gateway.errors import EngineError
from gateway.schemas.openai import name_engine_error, name_stream_errors
from gateway.schemas.prompt_lists.answers import add_usage, check_number, read_counts
from gateway.schemas.vllm import UNREADABLE, garbled_answer

DONE = b"data: [DONE]\n\n"
_DATA = b"data:"
_EVENT_END = re.compile(rb"\r?\n\r?\n")


def build_refusal_event(status: int, body: bytes, path: str) -> bytes:
    """For a stream that has begun before an engine refused another piece of its list."""
    error = orjson.loads(name_engine_error(status, body, path))["error"]
    return b"data: " + orjson.dumps({"error": {"code": status, **error}}) + b"\n\n" + DONE


class StreamRefused(Exception):
    """An engine tells in its stream that it goes on no further."""

    def __init__(self, event: bytes, *, is_fault: bool) -> None:
        super().__init__()
        self.event, self.is_fault = event, is_fault


class StreamHead:
    """What the events of all pieces have in common, as the first of them tells it."""

    def __init__(self) -> None:
        self._names: dict[str, Any] = {}
        self._end: dict[str, Any] = {}  # the event that tells the usage
        self._usage: dict[str, Any] = {}

    def put_on(self, event: dict[str, Any]) -> None:
        for name in event.keys() & {"id", "created"}:
            event[name] = self._names.setdefault(name, event[name])

    def note_end(self, event: dict[str, Any]) -> Mapping[str, Any]:
        """The usage that a piece's last event tells."""
        usage: dict[str, Any] = event.get("usage") or {}
        add_usage(self._usage, usage)
        self._end = self._end or event
        return usage

    def build_end(self) -> bytes:
        """One event with the usage of all, where engines tell it, and the end of the stream."""
        if not self._end:
            return DONE
        self.put_on(self._end)
        return b"data: " + orjson.dumps({**self._end, "usage": self._usage}) + b"\n\n" + DONE


class PieceStream:
    """The events of one piece's stream, as those of the whole list's."""

    def __init__(self, head: StreamHead, first: int, count: int) -> None:
        self._head, self._first, self._count = head, first, count
        # At least a token for each event, of the choices that are still running.
        self._open = dict.fromkeys(range(count), 0)
        self.ended_tokens = 0  # the same of those that have ended
        self._rest = bytearray()
        self._is_done = False
        self.usage: Mapping[str, Any] = {}
        self.is_at_fault = False  # what came made no sense, or told of a fault of the engine's

    def read(self, data: bytes) -> tuple[bytes, int]:
        """Whole events to pass on, and how many choices have ended with them."""
        seen = max(0, len(self._rest) - 3)  # an end may have begun
        self._rest += data
        ends = [found.end() for found in _EVENT_END.finditer(self._rest, seen)]
        if not ends:
            return b"", 0
        whole = bytes(self._rest[: ends[-1]])
        del self._rest[: ends[-1]]
        before = len(self._open)
        try:
            events = [self._read_event(event) for event in _EVENT_END.split(whole)]
        except (orjson.JSONDecodeError, *UNREADABLE) as error:
            self.is_at_fault = True
            raise garbled_answer(error) from error
        return b"".join(events), before - len(self._open)

    def check_end(self) -> None:
        """`EngineError` unless all has come."""
        self.is_at_fault = bool(self._open) and self._is_done
        if self._is_done:
            check_number(self._count - len(self._open), self._count)
        else:
            raise EngineError("the engine's stream ended without its end")

    def count_open_tokens(self) -> int:
        return sum(self._open.values())

    def _read_event(self, event: bytes) -> bytes:
        if not event.startswith(_DATA):  # a comment, or nothing
            return b""
        text = event[len(_DATA) :].strip()
        if text == b"[DONE]":
            self._is_done = True
            return b""
        data: dict[str, Any] = orjson.loads(text)
        if "error" in data:
            named, is_fault = name_stream_errors(b"data: " + text)
            raise StreamRefused(named + b"\n\n", is_fault=is_fault)
        self._head.put_on(data)
        choices = data["choices"]
        if not choices:
            self.usage = self._head.note_end(data)
            return b""
        # Where it is asked for, each event tells how far its choice has come.
        _, told = read_counts(data.get("usage") or {})
        for choice in choices:
            place = choice["index"]
            if place not in self._open:  # of no prompt, or after its end
                raise IndexError(place)
            choice["index"] = place + self._first
            self._open[place] = told or self._open[place] + 1
            if choice.get("finish_reason") is not None:
                self.ended_tokens += self._open.pop(place)
        return b"data: " + orjson.dumps(data) + b"\n\n"
