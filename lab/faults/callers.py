"""Callers of every kind at once, each with a verdict on what they got.

How a call is made and held against the right answer is `lab/load`'s; a batch job is here.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiohttp

from lab.load.answers import DoubledAnswer, KnownModel, LostAnswer, ToldSo, Verdict, judge
from lab.load.traffic import CHAT, SoakClient, Tally

JOB = "batch job"
ASKING = ("chat stream", "chat whole", "predict one", "predict batch")
HANGING_UP = ("hang-up in a stream", "hang-up of a batch")
_MIX = (*ASKING, *ASKING, *HANGING_UP)
_BACK_OFF_S = 0.2
_LOOK_TIMEOUT = aiohttp.ClientTimeout(total=5)


class MixedLoad:
    """At one gateway, or at several in turn."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        urls: Sequence[str],
        model: KnownModel,
        *,
        has_jobs: bool,
        job_limit_s: float = 120.0,
        seed: int = 1,
    ) -> None:
        self.session, self.urls, self.model = session, list(urls), model
        self.tally = Tally()
        self.in_flight: Counter[str] = Counter()
        self.got: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.examples: dict[str, str] = {}  # the first of its kind
        self._seeds = itertools.count(seed * 1000)
        self.has_jobs, self._job_limit_s = has_jobs, job_limit_s
        self._tasks: list[asyncio.Task[None]] = []
        self._jobs: list[asyncio.Task[None]] = []
        self._is_over = False
        self.closing_from = math.inf  # who comes later may find the door closing

    def start(self) -> None:
        for place, kind in enumerate(_MIX):
            client = self._build_client(self.urls[place % len(self.urls)])
            self._tasks.append(asyncio.create_task(self._call(kind, client.kinds()[kind][1])))
        if self.has_jobs:
            job = JobCaller(self.session, self.urls, self.model, self._job_limit_s)
            self._jobs.append(asyncio.create_task(self._call(JOB, job.run)))

    async def finish(self, *, are_jobs_kept: bool = False) -> None:
        """Everybody has the answer to what they have asked; a job may be kept for a later start."""
        self._is_over = True
        if are_jobs_kept:
            await self._cancel(self._jobs)
        await asyncio.gather(*self._tasks, *self._jobs, return_exceptions=are_jobs_kept)

    async def cancel(self) -> None:
        await self._cancel([*self._tasks, *self._jobs])

    async def _cancel(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def kinds(self) -> set[str]:
        return {*ASKING, JOB} if self.has_jobs else {*ASKING}

    async def try_each(self, url: str) -> bool:
        """Whether a question of each kind is answered right, now."""
        kinds = self._build_client(url).kinds()
        verdicts = await asyncio.gather(*(self._ask(one, kinds[one][1]) for one in ASKING))
        return all(one.outcome == "right" for one in verdicts)

    def _build_client(self, url: str) -> SoakClient:
        return SoakClient(self.session, url, self.model, self.tally, next(self._seeds))

    async def _call(self, kind: str, make: Callable[[], Awaitable[None]]) -> None:
        while not self._is_over:
            outcome = (await self._ask(kind, make)).outcome
            if outcome != "right" or kind in HANGING_UP:
                await asyncio.sleep(_BACK_OFF_S)

    async def _ask(self, kind: str, make: Callable[[], Awaitable[None]]) -> Verdict:
        self.in_flight[kind] += 1
        began_at = time.monotonic()
        try:
            verdict = await judge(make())
        finally:
            self.in_flight[kind] -= 1
        word = f"told {verdict.status}" if verdict.outcome == "told" else verdict.outcome
        if word == "cut" and began_at > self.closing_from:
            word = "refused"
        if verdict.outcome != "right":
            self.examples.setdefault(word, f"{kind}: {word}: {verdict.detail[:200]}")
        self.got[kind][word] += 1
        return verdict


class JobCaller:
    """Has files of questions answered by /v1/batches, one after another."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        urls: Sequence[str],
        model: KnownModel,
        limit_s: float,
        lines: int = 12,
    ) -> None:
        self._session, self._urls, self._model = session, itertools.cycle(urls), model
        self._limit_s, self._lines = limit_s, lines
        self._random = random.Random(7)

    async def run(self) -> None:
        asked = self._random.choices(self._model.pairs, k=self._lines)
        job = await self._submit(asked)
        try:
            async with asyncio.timeout(self._limit_s):
                ended = await self._wait_ended(job["id"])
                rows = [*await self._read(ended, "output"), *await self._read(ended, "error")]
        except TimeoutError:
            raise LostAnswer(f"{job['id']} has not ended within {self._limit_s:.0f} s") from None
        self._check(asked, rows, ended)

    async def _submit(self, asked: Sequence[tuple[str, str]]) -> dict[str, Any]:
        lines = [self._build_line(number, text) for number, (text, _) in enumerate(asked)]
        form = aiohttp.FormData({"purpose": "batch"})
        form.add_field("file", "\n".join(lines).encode(), filename="in.jsonl")
        file = await self._send("POST", "/v1/files", data=form)
        order = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
        return await self._send("POST", "/v1/batches", json=order)

    def _build_line(self, number: int, question: str) -> str:
        messages = [{"role": "user", "content": question}]
        fixed = {"model": self._model.name, "temperature": 0, "max_tokens": 256}
        body = {**fixed, "messages": messages}
        return json.dumps({"custom_id": str(number), "method": "POST", "url": CHAT, "body": body})

    async def _send(self, method: str, path: str, **what: Any) -> dict[str, Any]:
        async with self._session.request(method, next(self._urls) + path, **what) as answer:
            text = await answer.text()
        if answer.status != 200:
            raise ToldSo(answer.status, f"{answer.status}: {text[:200]}")
        reply: dict[str, Any] = json.loads(text)
        return reply

    async def _insist(self, path: str) -> str:
        """Whatever happens in between: what was taken is kept."""
        while True:
            try:
                url = next(self._urls) + path
                async with self._session.get(url, timeout=_LOOK_TIMEOUT) as answer:
                    text = await answer.text()
                if answer.status == 200:
                    return text
                if answer.status not in {429, 502, 503, 504}:
                    raise LostAnswer(f"{path}: {answer.status}: {text[:200]}")
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(_BACK_OFF_S)

    async def _wait_ended(self, job: str) -> dict[str, Any]:
        while True:
            state: dict[str, Any] = json.loads(await self._insist(f"/v1/batches/{job}"))
            if state["status"] in ("completed", "failed", "expired", "cancelled"):
                return state
            await asyncio.sleep(_BACK_OFF_S)

    async def _read(self, ended: dict[str, Any], which: str) -> list[dict[str, Any]]:
        name = ended[f"{which}_file_id"]
        if not name:
            return []
        text = await self._insist(f"/v1/files/{name}/content")
        return [json.loads(line) for line in text.splitlines()]

    def _check(
        self, asked: Sequence[tuple[str, str]], rows: list[dict[str, Any]], ended: dict[str, Any]
    ) -> None:
        """Each line once, and its own answer."""
        names = Counter(row["custom_id"] for row in rows)
        if twice := [name for name, number in names.items() if number > 1]:
            raise DoubledAnswer(f"{ended['id']}: lines {twice} stand there twice")
        if missing := set(map(str, range(len(asked)))) - set(names):
            raise LostAnswer(f"{ended['id']} ({ended['status']}): no word of {sorted(missing)}")
        failed: list[dict[str, Any]] = []
        for row in rows:
            question, right = asked[int(row["custom_id"])]
            if row["response"] is None or row["response"]["status_code"] != 200:
                failed.append(row)
                continue
            got = row["response"]["body"]["choices"][0]["message"]["content"]
            self._model.check(got, right, question)
        if failed:
            status = (failed[0]["response"] or {}).get("status_code", 200)
            raise ToldSo(status, f"{len(failed)} lines: {json.dumps(failed[0])[:200]}")
