"""The traffic of a soak: each request asks for something that only it has asked for.

What is not here: faults, samples of processes, and the sums at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from lab.load.answers import (
    NOT_TRUE,
    PREDICT,
    KnownModel,
    LostAnswer,
    ToldSo,
    WrongAnswer,
    judge,
)

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# What a fault may cost those who meet it: an honest error, or their connection.
_FAULT_STATUSES = frozenset((502, 503, 504))
_MOST_EXAMPLES = 20
_BAD_REQUESTS = (
    (PREDICT, b"{", 400),
    (PREDICT, b'{"prompt": 7}', 400),
    (PREDICT, b'{"prompt": [1]}', 400),
    (CHAT, b'{"model": "nobody", "messages": []}', 404),
    (COMPLETIONS, b'{"model": "nobody", "prompt": "x", "n": 10000}', 400),
    ("/v1/nothing", b"{}", 404),
)


@dataclass
class Tally:
    """What was sent and what came back."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    hung_up: Counter[str] = field(default_factory=Counter)
    unanswered: Counter[str] = field(default_factory=Counter)
    characters: int = 0
    examples: list[str] = field(default_factory=list)

    def note(self, kind: str, outcome: str, example: str = "") -> None:
        self.outcomes[kind, outcome] += 1
        if example and len(self.examples) < _MOST_EXAMPLES:
            self.examples.append(f"{kind}: {outcome}: {example[:300]}")

    def note_status(self, path: str, status: int) -> None:
        self.statuses[path if path != "/v1/nothing" else "other", status] += 1

    def count(self, outcome: str) -> int:
        return sum(number for (_, one), number in self.outcomes.items() if one == outcome)


class SoakClient:
    """One client's requests, one after another."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        model: KnownModel,
        tally: Tally,
        seed: int,
        *,
        pause_s: float = 0.0,
    ) -> None:
        """Between two requests there is up to twice the pause."""
        self._session, self._url, self._pause_s = session, url, pause_s
        self._known_model, self._tally = model, tally
        self._model, self._known = model.name, model.pairs
        self._random = random.Random(seed)
        self._number = seed * 1_000_000

    def kinds(self) -> dict[str, tuple[int, Callable[[], Awaitable[None]]]]:
        """Each with its weight."""
        return {
            "predict one": (6, self.predict_one),
            "predict batch": (2, self.predict_batch),
            "chat stream": (5, self.chat_stream),
            "chat whole": (3, self.chat_whole),
            "completion with echo": (4, self.complete_echo),
            "tokens there and back": (3, self.tokens),
            "slow reader": (1, self.slow_reader),
            "hang-up in a stream": (2, self.hang_up_stream),
            "hang-up of a batch": (1, self.hang_up_batch),
            "bad request": (3, self.bad_request),
        }

    async def run(self, until: float, is_fault_time: Callable[[], bool]) -> None:
        kinds = self.kinds()
        names, weights = list(kinds), [weight for weight, _ in kinds.values()]
        while time.monotonic() < until:
            await asyncio.sleep(self._random.uniform(0, 2 * self._pause_s))
            name = self._random.choices(names, weights)[0]
            began_in_fault = is_fault_time()
            verdict = await judge(kinds[name][1]())
            if verdict.outcome == "right":
                self._tally.note(name, "good")
            elif verdict.outcome in NOT_TRUE:
                self._tally.note(name, "wrong", verdict.detail)
            else:
                excused = began_in_fault or is_fault_time()
                self._tally.note(name, "lost to a fault" if excused else "failed", verdict.detail)
                await asyncio.sleep(0.2 if excused else 0)

    # --- the kinds of traffic ---

    async def predict_one(self) -> None:
        question, answer = self._random.choice(self._known)
        reply = await self._post(PREDICT, {"prompt": question})
        self._tally.characters += len(reply["response"])
        self._known_model.check(reply["response"], answer, question)

    async def predict_batch(self) -> None:
        pairs = self._random.choices(self._known, k=self._random.randint(2, 24))
        reply = await self._post(PREDICT, {"prompt": [question for question, _ in pairs]})
        self._tally.characters += sum(map(len, reply["response"]))
        if "errors" in reply:
            raise ToldSo(200, json.dumps(reply["errors"])[:200])
        for (question, answer), got in zip(pairs, reply["response"], strict=True):
            self._known_model.check(got, answer, question)

    async def chat_whole(self) -> None:
        question, answer = self._random.choice(self._known)
        reply = await self._post(CHAT, self._chat(question))
        self._known_model.check(reply["choices"][0]["message"]["content"], answer, question)

    async def chat_stream(self, pause_s: float = 0.0) -> None:
        question, answer = self._random.choice(self._known)
        pieces = []
        async for event in self._stream(self._chat(question, stream=True), pause_s):
            pieces += [choice["delta"].get("content") or "" for choice in event["choices"]]
        self._known_model.check("".join(pieces), answer, question)

    async def slow_reader(self) -> None:
        await self.chat_stream(pause_s=0.1)

    async def complete_echo(self) -> None:
        text = f"number-{self._next()}."
        body = {"prompt": text, "echo": True, "max_tokens": 1, "temperature": 0}
        reply = await self._post(COMPLETIONS, {"model": self._model, **body})
        if not reply["choices"][0]["text"].startswith(text):
            raise WrongAnswer(f"asked {text}, got {reply['choices'][0]['text']!r}")

    async def tokens(self) -> None:
        text = f"number-{self._next()}: 共享内存"
        known = {"model": self._model, "add_special_tokens": False}
        ids = (await self._post("/tokenize", {**known, "prompt": text}))["tokens"]
        back = await self._post("/detokenize", {"model": self._model, "tokens": ids})
        self._known_model.check(back["prompt"], text, text)

    async def hang_up_stream(self) -> None:
        question, _ = self._random.choice(self._known)
        body = self._chat(question, stream=True)
        self._tally.hung_up[CHAT] += 1
        async with self._session.post(self._url + CHAT, json=body) as answer:
            if self._random.random() < 0.5:
                await answer.content.readany()
            answer.close()

    async def hang_up_batch(self) -> None:
        pairs = self._random.choices(self._known, k=16)
        self._tally.hung_up[PREDICT] += 1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._random.uniform(0.01, 0.1)):
                body = {"prompt": [question for question, _ in pairs]}
                async with self._session.post(self._url + PREDICT, json=body) as answer:
                    answer.close()

    async def bad_request(self) -> None:
        path, body, status = self._random.choice(_BAD_REQUESTS)
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self._url + path, data=body, headers=headers) as answer:
            got = await answer.json()
            self._tally.note_status(path, answer.status)
            if answer.status in _FAULT_STATUSES:
                raise ToldSo(answer.status, f"{answer.status}: {got}")
            if answer.status not in {400, 404} or not got["error"]["message"]:
                said = f"{answer.status} instead of {status}: {got}"
                raise WrongAnswer(f"{path} {body!r}: {said}")

    # --- how they are sent ---

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _chat(self, question: str, **fields: object) -> dict[str, object]:
        messages = [{"role": "user", "content": question}]
        fixed = {"model": self._model, "messages": messages, "temperature": 0, "max_tokens": 256}
        return {**fixed, **fields}

    async def _post(self, path: str, body: dict[str, object]) -> dict[str, Any]:
        async with self._open(path, body) as answer:
            text = await answer.text()
            self._tally.note_status(path, answer.status)
        if answer.status != 200:
            raise ToldSo(answer.status, f"{answer.status}: {text[:200]}")
        reply: dict[str, Any] = json.loads(text)
        return reply

    async def _stream(
        self, body: dict[str, object], pause_s: float
    ) -> AsyncIterator[dict[str, Any]]:
        is_done, told = False, ""
        async with self._open(CHAT, body) as answer:
            if answer.status != 200:
                text = await answer.text()
                self._tally.note_status(CHAT, answer.status)
                raise ToldSo(answer.status, f"{answer.status}: {text[:200]}")
            async for line in answer.content:
                if pause_s:
                    await asyncio.sleep(pause_s)
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        told = f"in the stream: {event['error']}"
                        continue  # who leaves before its end has hung up
                    yield event
                is_done = is_done or line.startswith(b"data: [DONE]")
            self._tally.note_status(CHAT, 200)
        if told:
            raise ToldSo(200, told)
        if not is_done:
            raise LostAnswer("a stream without its end")

    @contextlib.asynccontextmanager
    async def _open(
        self, path: str, body: dict[str, object]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self._session.post(self._url + path, json=body) as answer:
                yield answer
        except (aiohttp.ClientError, TimeoutError):
            self._tally.unanswered[path] += 1
            raise
