"""One case, and the pieces that all kinds of cases are built of.

Each case carries a number of its own in its prompt, `#000123#`, which no other's answer may hold.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lab.fuzz.raw_http import build_request

KEY = "fuzz-key"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
RESPONSES, MESSAGES, PREDICT = "/v1/responses", "/v1/messages", "/predict"
DEEP, HUGE = "@deep@", "@huge@"
ID = "@id@"  # in a step: the id that the answer before it told
_SPLICES = {
    f'"{DEEP}"'.encode(): b"[" * 1500 + b"]" * 1500,
    f'"{HUGE}"'.encode(): b"9" * 5000,
}
# served: 200. answered: one answer. torn: the framing itself is in doubt.
Outcome = Literal["served", "answered", "torn"]
Headers = list[tuple[str, str | bytes]]


@dataclass(frozen=True)
class Target:
    """Whom the cases are for.

    `echoes`: whatever is asked comes back with its answer, as from the tests' stand-in for an
    engine; vLLM itself gives a prompt back where `echo` asks for it.
    """

    model: str = "fake"
    key: str = KEY
    echoes: bool = True
    ids: Mapping[str, str] = field(default_factory=dict)  # of what is stored there, by kind


@dataclass(frozen=True, slots=True)
class Case:
    """One connection's worth of bytes and what may come back."""

    number: int
    pieces: tuple[bytes, ...]
    outcome: Outcome
    kind: str = ""
    method: str = "POST"
    answers: int = 1
    keeps_prompt: bool = False
    leaves_after: int | None = None  # so many bytes of the answer
    then: tuple[bytes, ...] = ()  # requests that follow a 200, with ID where its id goes

    @property
    def sent(self) -> bytes:
        return b"".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Body:
    """A call that is right, before anybody spoils it."""

    path: str
    prompt: str  # the field that holds it
    data: dict[str, Any]


def mark(number: int) -> str:
    return f"#{number:06d}#"


@dataclass(frozen=True, slots=True)
class Draw:
    """What one case is made of: chances of its own, its number, whom it is for."""

    chance: random.Random
    number: int
    target: Target

    @property
    def text(self) -> str:
        return f"say {mark(self.number)}"

    def is_one_in(self, share: float) -> bool:
        return self.chance.random() < share

    def body(self, path: str = "") -> Body:
        """A right one, of any route or of this one."""
        bodies = list_bodies(self.text, self.target.model)
        return self.chance.choice([one for one in bodies if path in ("", one.path)])

    def comes_back(self, body: Body) -> bool:
        """Whether its number is in a good answer."""
        return self.target.echoes or bool(body.data.get("echo"))

    def headers(self) -> Headers:
        headers: Headers = [("Authorization", f"Bearer {self.target.key}")]
        if self.is_one_in(0.5):
            headers.append(("Content-Type", "application/json"))
        return headers

    def dump(self, value: Any) -> bytes:
        text = json.dumps(value, ensure_ascii=self.is_one_in(0.7))
        data = text.encode("utf-8", "surrogatepass")
        for place, splice in _SPLICES.items():
            data = data.replace(place, splice)
        return data

    def post(self, path: str, value: Any) -> bytes:
        return build_request("POST", path, self.dump(value), self.headers())

    def slice(self, data: bytes) -> tuple[bytes, ...]:
        """Now and then in several pieces."""
        if self.is_one_in(0.7):
            return (data,)
        cuts = sorted(self.chance.randrange(len(data)) for _ in range(self.chance.randint(1, 3)))
        pieces = (data[start:end] for start, end in itertools.pairwise((0, *cuts, len(data))))
        return tuple(filter(None, pieces))

    def flip(self, data: bytes) -> bytes:
        """Some bytes are others, missing, or too many."""
        spoilt = bytearray(data)
        for _ in range(self.chance.choice((1, 1, 2, 8))):
            place = self.chance.randrange(len(spoilt))
            match self.chance.randrange(3):
                case 0 if spoilt[place] not in b"0123456789":  # not one number into another
                    spoilt[place] ^= 1 << self.chance.randrange(8)
                case 1:
                    spoilt.insert(place, self.chance.randrange(256))
                case _ if len(spoilt) > 1:
                    del spoilt[place]
        return bytes(spoilt)

    def some(self, values: Sequence[Any], most: int) -> list[Any]:
        """A few of them, maybe none."""
        return self.chance.sample(values, self.chance.randint(0, min(most, len(values))))

    def answered(self, path: str, data: Any) -> Case:
        """One whose framing is right; what is in it is up to whoever asks."""
        return Case(self.number, (self.post(path, data),), "answered")


def list_bodies(text: str, model: str) -> tuple[Body, ...]:
    turn = [{"role": "user", "content": text}]
    turns = [{"role": "system", "content": "short"}, *turn]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    shape = {"name": "a", "schema": {"type": "object"}}
    warm = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "stop": ["x"], "seed": 1}
    echo = {"model": model, "echo": True, "max_tokens": 1}
    few = {"model": model, "max_tokens": 3}
    return (
        Body(PREDICT, "prompt", {"prompt": text, "max_tokens": 2}),
        Body(
            PREDICT, "prompt", {"prompt": ["什么是 warp？", text, "", "x" * 3000], "max_tokens": 4}
        ),
        Body(PREDICT, "prompts", {"prompts": [text], "system": "Sei kurz.", "max_tokens": 4}),
        Body(PREDICT, "prompt", {"prompt": text, **warm, "max_tokens": 4}),
        Body(COMPLETIONS, "prompt", {**echo, "prompt": text}),
        Body(COMPLETIONS, "prompt", {**echo, "prompt": ["a", text], "n": 1}),
        Body(COMPLETIONS, "prompt", {**echo, "prompt": text, "stream": True}),
        Body(CHAT, "messages", {**few, "messages": turns}),
        Body(
            CHAT,
            "messages",
            {
                **few,
                "messages": turns,
                "stream": True,
                "stream_options": {"include_usage": True},
                "tools": [tool],
                "tool_choice": "none",
                "response_format": {"type": "json_schema", "json_schema": shape},
                "logprobs": True,
                "top_logprobs": 2,
            },
        ),
        Body(RESPONSES, "input", {"model": model, "input": text, "max_output_tokens": 3}),
        Body(MESSAGES, "messages", {**few, "messages": turn, "system": "short"}),
    )
