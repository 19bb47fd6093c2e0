"""The two targets to one engine, the calls that both answer, and the client that makes them.

Calls are built before the clock starts and answers are read after it stops, so that the client
costs both targets the same and little.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import aiohttp
import orjson

from gateway.prompts.builder import PromptBuilder
from gateway.schemas.vllm import Prompt, Sampling, build_completion_call
from lab.bench.answer_book import AnswerBook
from lab.bench.bench_figures import BenchFailed
from lab.options import build_headers

# Below what any server keeps idle connections for: a closing one must not look like a failure.
_KEEPALIVE_S = 4.0
_CALL_TIMEOUT_S = 600.0
_JSON = {"Content-Type": "application/json"}


def read_clock_s() -> float:
    """What everything here is timed by: the event loop's clock, by which it also sleeps.

    One clock for both, so that a test can run a whole measurement in a time of its own.
    """
    return asyncio.get_running_loop().time()


class CallFailed(BenchFailed):
    """A call that was not answered, or not with 200."""


@dataclass(frozen=True)
class BenchCall:
    """What is sent, what is asked by it, and how its answer is read."""

    target: str
    url: str
    body: bytes
    asked: tuple[str, ...]
    is_cut: bool
    read: Callable[[bytes], list[str]]
    headers: Mapping[str, str]


@dataclass(frozen=True)
class ReceivedStream:
    """A stream as it came, with the times of its first and last piece since the call."""

    first_s: float
    total_s: float
    body: bytes


class BenchClient:
    """Sends calls; every answer goes through the book."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self.book: AnswerBook | None = None

    async def send(self, call: BenchCall) -> bytes:
        """The body of the answer, unread."""
        async with self._open(call) as answer:
            return await answer.read()

    async def stream(self, call: BenchCall) -> ReceivedStream:
        started = read_clock_s()
        async with self._open(call) as answer:
            pieces = [
                (read_clock_s() - started, piece) async for piece in answer.content.iter_any()
            ]
        if not pieces:
            raise CallFailed(f"{call.target}: {call.url} sent an empty stream")
        body = b"".join(piece for _, piece in pieces)
        return ReceivedStream(pieces[0][0], pieces[-1][0], body)

    def check(self, call: BenchCall, body: bytes) -> list[str]:
        """The answers of a body, each held against its question."""
        try:
            answers = call.read(body)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            shown = body[:200].decode(errors="replace")
            raise CallFailed(f"{call.target}: {call.url} answered {shown} ({error!r})") from None
        if self.book is not None:
            self.book.check(call.target, call.asked, answers, call.is_cut)
        return answers

    @asynccontextmanager
    async def _open(self, call: BenchCall) -> AsyncIterator[aiohttp.ClientResponse]:
        body, headers = call.body, call.headers
        try:
            async with self._session.post(call.url, data=body, headers=headers) as answer:
                if answer.status != 200:
                    text = (await answer.text())[:300]
                    raise CallFailed(f"{call.target}: {call.url} answered {answer.status}: {text}")
                if "dedup" in answer.headers.get("Server-Timing", ""):
                    raise BenchFailed(
                        "the gateway gives one answer to identical prompts, which no direct call "
                        "can match; start it with GATEWAY_DEDUP=false"
                    )
                yield answer
        except (aiohttp.ClientError, TimeoutError) as error:
            raise CallFailed(f"{call.target}: {call.url}: {error!r}") from None


@asynccontextmanager
async def open_client() -> AsyncIterator[BenchClient]:
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
    timeout = aiohttp.ClientTimeout(total=_CALL_TIMEOUT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        yield BenchClient(session)


@dataclass(frozen=True)
class PromptForm:
    """How questions are put to the model: its name, its prompts, its sampling."""

    model: str
    builder: PromptBuilder
    sampling: Sampling
    max_tokens: int

    async def build_ids(self, questions: Sequence[str]) -> list[Prompt]:
        prompts = await self.builder.build(list(questions), None, None)
        refused = [prompt for prompt in prompts if isinstance(prompt, Exception)]
        if refused:
            raise BenchFailed(f"a question is no prompt: {refused[0]}")
        return [prompt for prompt in prompts if not isinstance(prompt, Exception)]


@dataclass(frozen=True)
class Target:
    """One arm: where it asks, and whether that speaks /predict or is the engine itself."""

    name: str
    url: str
    is_gateway: bool
    form: PromptForm
    api_key: str = ""

    async def list_call(self, questions: Sequence[str], max_tokens: int) -> BenchCall:
        """All questions in one call; direct, their prompts are token ids already."""
        asked = tuple(questions)
        if self.is_gateway:
            prompt = list(asked) if len(asked) > 1 else asked[0]
            body = orjson.dumps({"prompt": prompt, "max_tokens": max_tokens})
            return self._call("/predict", body, asked, max_tokens, _read_predict)
        ids = await self.form.build_ids(asked)
        sampling = replace(self.form.sampling, max_tokens=max_tokens)
        body = build_completion_call(self.form.model, ids, sampling)
        return self._call("/v1/completions", body, asked, max_tokens, _read_completion)

    def stream_call(self, question: str, max_tokens: int) -> BenchCall:
        body = {
            "model": self.form.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "stream": True,
        }
        path = "/v1/chat/completions"
        return self._call(path, orjson.dumps(body), (question,), max_tokens, _read_stream)

    def _call(
        self,
        path: str,
        body: bytes,
        asked: tuple[str, ...],
        max_tokens: int,
        read: Callable[[bytes], list[str]],
    ) -> BenchCall:
        headers = _JSON | build_headers(self.api_key if self.is_gateway else "")
        is_cut = max_tokens < self.form.max_tokens
        return BenchCall(self.name, f"{self.url}{path}", body, asked, is_cut, read, headers)


def _read_predict(body: bytes) -> list[str]:
    data = orjson.loads(body)
    if data.get("errors"):
        raise ValueError(f"prompts were refused: {data['errors']}")
    answer = data["response"]
    return [_trim(text) for text in (answer if isinstance(answer, list) else [answer])]


def _read_completion(body: bytes) -> list[str]:
    choices = sorted(orjson.loads(body)["choices"], key=lambda choice: int(choice["index"]))
    return [_trim(choice["text"]) for choice in choices]


def _read_stream(body: bytes) -> list[str]:
    lines = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: ")]
    if not lines or lines[-1].strip() != b"[DONE]":
        raise ValueError(f"a stream ended without [DONE]: {body[-200:]!r}")
    text = ""
    for event in map(orjson.loads, lines[:-1]):
        if "error" in event:
            raise ValueError(f"an error within a stream: {event}")
        text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
    return [_trim(text)]


def _trim(text: str) -> str:
    """A limit of tokens may cut a character in two."""
    return text.strip().rstrip("\ufffd")


async def ask_all(client: BenchClient, target: Target, questions: Sequence[str]) -> dict[str, str]:
    """Every different question once, in calls that any engine takes."""
    different = list(dict.fromkeys(questions))
    pieces = [different[first : first + 256] for first in range(0, len(different), 256)]
    calls = [await target.list_call(piece, target.form.max_tokens) for piece in pieces]
    bodies = await asyncio.gather(*(client.send(call) for call in calls))
    answers = [client.check(call, body) for call, body in zip(calls, bodies, strict=True)]
    return dict(zip(different, itertools.chain.from_iterable(answers), strict=True))
