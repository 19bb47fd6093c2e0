"""One turn of an arm: what is asked of it, how fast it answered, whose answers they were."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import httpx
import orjson
from tokenizers import Tokenizer

from common.prometheus_text import parse_samples
from lab.bench.answer_book import AnswerBook, MixedUp
from lab.bench.bench_figures import BenchFailed
from lab.bench.targets import BenchCall, BenchClient, PromptForm, Target, read_clock_s
from lab.gpu.engines import RunningArm
from lab.reports.console import count

TEXTS, IDS, AGAIN, PREDICT = "texts", "ids", "ids again", "predict"
STREAM_TOKENS = 64


@dataclass(frozen=True)
class Measure:
    """One thing that is asked: a batch in one call by some way, or so many chat streams."""

    way: str
    prompts: int
    tokens: int
    is_stream: bool = False

    @property
    def load(self) -> str:
        thing = "stream" if self.is_stream else "prompt"
        return f"{count(self.prompts, thing)} x {self.tokens}"

    @property
    def name(self) -> str:
        return f"{self.way}, {self.load}"


@dataclass(frozen=True)
class AskedLoads:
    """What of every arm is measured. `is_endless`: every answer has as many tokens as asked for."""

    questions: tuple[str, ...]
    own: frozenset[str]  # those of the file; the others are variants of them
    prompts: tuple[int, ...]
    tokens: tuple[int, ...]
    streams: tuple[int, ...]
    is_endless: bool

    def list_measures(self, running: RunningArm, *, is_control: bool) -> Iterator[Measure]:
        ways = [IDS, PREDICT] if running.gateway_url else [TEXTS, IDS]
        ways += [AGAIN] if is_control else []
        for way in ways:
            for prompts in self.prompts:
                yield from (Measure(way, prompts, tokens) for tokens in self.tokens)
            if way != TEXTS:
                for at_once in self.streams:
                    yield Measure(way, at_once, STREAM_TOKENS, is_stream=True)


@dataclass
class AnswerCount:
    """Of the file's own questions: how many were as the first to their question. And of all: how
    many were another question's, which ends nothing: random weights may answer two alike.
    """

    asked: int = 0
    equal: int = 0
    mixed_up: int = 0


@dataclass
class ArmClient:
    """Asks one arm, and holds every answer against the first one to its question."""

    running: RunningArm
    form: PromptForm
    tokenizer: Tokenizer
    loads: AskedLoads
    client: BenchClient
    http: httpx.AsyncClient
    book: AnswerBook = field(default_factory=lambda: AnswerBook({}, is_by_heart=False))
    told: dict[str, AnswerCount] = field(default_factory=dict)  # by way

    async def learn(self) -> None:
        """The answers of the first call, the longest ones."""
        most, longest = max(self.loads.prompts), max(self.loads.tokens)
        calls = await self._build(Measure(IDS, most, longest))
        bodies = await asyncio.gather(*map(self.client.send, calls))
        pairs = zip(calls, bodies, strict=True)
        answers = [(call.asked, self.client.check(call, body)) for call, body in pairs]
        known = {q: a for asked, said in answers for q, a in zip(asked, said, strict=True)}
        self.book = AnswerBook(known, is_by_heart=False)

    async def wake(self) -> None:
        """A short call by each way: what slept wakes slowly, connections, clocks and caches."""
        await self.running.wake(self.http)
        for way in (IDS, PREDICT) if self.running.gateway_url else (IDS,):
            for call in await self._build(Measure(way, len(self.running.engine_urls), 2)):
                await self.client.send(call)

    async def measure(self, one: Measure) -> dict[str, float]:
        """By figure: tokens a second of a batch, milliseconds of streams, cores by role."""
        calls = await self._build(one)
        await self.running.forget_prompts(self.http)
        before, began = self.running.read_cpu_s(), read_clock_s()
        if one.is_stream:
            streams = await asyncio.gather(*map(self.client.stream, calls))
            took_s = read_clock_s() - began
            for call, stream in zip(calls, streams, strict=True):
                self.client.check(call, stream.body)
            gaps = [(s.total_s - s.first_s) / (one.tokens - 1) for s in streams]
            first_s = statistics.median(stream.first_s for stream in streams)
            values = {"first token": first_s * 1e3, "between tokens": statistics.median(gaps) * 1e3}
        else:
            bodies = await asyncio.gather(*map(self.client.send, calls))
            took_s = read_clock_s() - began
            values = {"rate": await self._check(one, calls, bodies) / took_s}
        after = self.running.read_cpu_s()
        return values | {role: (s - before.get(role, 0.0)) / took_s for role, s in after.items()}

    async def _check(
        self, one: Measure, calls: Sequence[BenchCall], bodies: Sequence[bytes]
    ) -> int:
        """The new tokens, by the engine's count."""
        tokens = 0
        told = self.told.setdefault(one.way, AnswerCount())
        for call, body in zip(calls, bodies, strict=True):
            answers = self.client.check(call, body)
            for question, answer in zip(call.asked, answers, strict=True):
                self._compare(told, call, question, answer)
            if one.way != PREDICT:
                tokens += int(orjson.loads(body)["usage"]["completion_tokens"])
        if one.way == PREDICT:
            metrics = (await self.http.get(f"{self.running.gateway_url}/metrics")).text
            tokens = int(parse_samples(metrics)["gateway_last_batch_tokens"][0][1])
        if self.loads.is_endless and tokens != one.prompts * one.tokens:
            said = f"{tokens} new tokens for {one.load}"
            raise BenchFailed(f"{self.running.arm.word}, {one.way}: {said}")
        return tokens

    def _compare(self, told: AnswerCount, call: BenchCall, question: str, answer: str) -> None:
        try:
            self.book.check(call.target, (question,), [answer], call.is_cut)
        except MixedUp:
            told.mixed_up += 1
        if question in self.loads.own:
            known = self.book.known[question]
            told.asked += 1
            told.equal += answer == known or (call.is_cut and known.startswith(answer))

    async def _build(self, one: Measure) -> list[BenchCall]:
        asked = self.loads.questions[: one.prompts]
        name, is_gateway = self.running.arm.word, one.way == PREDICT
        urls = [self.running.gateway_url] if is_gateway else self.running.engine_urls
        targets = [Target(name, url, is_gateway=is_gateway, form=self.form) for url in urls]
        if one.is_stream:
            return [
                targets[place % len(targets)].stream_call(question, one.tokens)
                for place, question in enumerate(asked)
            ]
        parts = [asked[place :: len(targets)] for place in range(len(targets))]
        pairs = zip(targets, parts, strict=True)
        calls = [await target.list_call(part, one.tokens) for target, part in pairs]
        return [self._as_texts(call) for call in calls] if one.way == TEXTS else calls

    def _as_texts(self, call: BenchCall) -> BenchCall:
        body = orjson.loads(call.body)
        texts = self.tokenizer.decode_batch(body["prompt"], skip_special_tokens=False)
        return replace(call, body=orjson.dumps({**body, "prompt": texts}))
