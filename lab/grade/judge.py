"""The judge's side of the contract: POST the questions, each once, within the limit.

It never repeats a call and never repairs an answer. What is wrong with one becomes a `Problem`
with a name; what is missing stays blank.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import httpx

from lab import readiness
from lab.grade.replies import Reply, read_reply, refuse_reply
from lab.readiness import Mode, Problem, describe_error, describe_redirect
from lab.reports.console import ProgressLine, ticking

_PROBES_TO_BE_GONE = 3
# After one of these, further calls and runs would only say the same again.
FINAL_PROBLEMS = ("server_died", "too_slow")


@dataclass(frozen=True)
class JudgeCall:
    """One POST /predict: which questions, when, and what came of it."""

    first: int
    asked: int
    answered: int
    started_s: float
    seconds: float
    status: int | None
    problems: tuple[Problem, ...] = ()

    @property
    def is_final(self) -> bool:
        return any(problem.code in FINAL_PROBLEMS for problem in self.problems)


@dataclass
class JudgeRun:
    """All questions once: the answers in the questions' order, blank where there is none.

    `received` holds the places for which an answer came, be it a blank one.
    """

    answers: list[str]
    received: set[int] = field(default_factory=set)
    calls: list[JudgeCall] = field(default_factory=list)
    refusals: dict[int, str] = field(default_factory=dict)
    elapsed_s: float = 0.0


@dataclass(frozen=True)
class SendingPlan:
    """How the questions are sent."""

    mode: Mode
    chunk_size: int = 0
    concurrency: int = 1
    limit_s: float = 360.0

    def cut(self, count: int) -> list[range]:
        size = 1 if self.mode == "ok" else self.chunk_size or count
        return [range(at, min(at + size, count)) for at in range(0, count, max(1, size))]

    def describe(self, count: int) -> str:
        calls = len(self.cut(count))
        if self.mode == "ok":
            how = "one by one"
        elif calls == 1:
            how = "in one call"
        else:
            how = f"in {calls} calls of up to {self.chunk_size}"
        return f"{how}, {self.concurrency} at a time" if self.concurrency > 1 else how


class Judge:
    """Asks one server every question once."""

    def __init__(
        self, url: str, client: httpx.AsyncClient, questions: Sequence[str], plan: SendingPlan
    ) -> None:
        self._url, self._client = url, client
        self._questions, self._plan = questions, plan
        self._pieces: Iterator[range] = iter(())
        self._started = self._ended = 0.0

    async def ask(self, progress: ProgressLine) -> JudgeRun:
        pieces = self._plan.cut(len(self._questions))
        run = JudgeRun([""] * len(self._questions))
        self._pieces = iter(pieces)
        self._started = self._ended = time.perf_counter()

        def tell() -> None:
            answered = sum(call.answered for call in run.calls)
            progress.asking(answered, len(self._questions), time.perf_counter() - self._started)

        async with ticking(tell), asyncio.TaskGroup() as group:
            for _ in range(min(self._plan.concurrency, len(pieces))):
                group.create_task(self._work(run))
        tell()
        run.elapsed_s = self._ended - self._started
        run.calls.sort(key=lambda call: call.first)
        return run

    async def _work(self, run: JudgeRun) -> None:
        while (piece := next(self._pieces, None)) is not None:
            call, reply = await self._call(piece)
            run.calls.append(call)
            places = range(piece.start, piece.start + len(reply.answers))
            run.answers[places.start : places.stop] = reply.answers
            run.received.update(places)
            run.refusals |= {piece.start + place: why for place, why in reply.refusals.items()}
            self._ended = max(self._ended, self._started + call.started_s + call.seconds)
            if call.is_final:
                self._pieces = iter(())

    async def _call(self, piece: range) -> tuple[JudgeCall, Reply]:
        began = time.perf_counter()
        status: int | None = None
        loss: httpx.HTTPError | None = None
        reply = Reply([], ())
        try:
            async with asyncio.timeout(max(0.0, self._started + self._plan.limit_s - began)):
                answer = await self._post(self._questions[piece.start : piece.stop])
                status = answer.status_code
                reply = read_reply(status, answer.content, len(piece), self._plan.mode)
                if answer.is_redirect:
                    text = f"POST /predict answered {status}{describe_redirect(answer)}"
                    reply = refuse_reply("http_error", text)
        except httpx.DecodingError as error:
            reply = refuse_reply("not_json", f"the answer cannot be unpacked: {error}")
        except TimeoutError:
            text = f"no answer within the limit of {self._plan.limit_s:g} s"
            reply = refuse_reply("too_slow", text)
        except httpx.HTTPError as error:
            loss = error
        seconds = time.perf_counter() - began
        if loss is not None:
            reply = Reply([], (await self._explain_loss(loss, piece, seconds),))
        answered = sum(bool(text.strip()) for text in reply.answers)
        times = (began - self._started, seconds)
        call = JudgeCall(piece.start, len(piece), answered, *times, status, reply.problems)
        return call, reply

    async def _post(self, questions: Sequence[str]) -> httpx.Response:
        prompt = questions[0] if self._plan.mode == "ok" else list(questions)
        body = json.dumps({"prompt": prompt}, ensure_ascii=False).encode()
        headers = {"Content-Type": "application/json"}
        url = f"{self._url}/predict"
        return await self._client.post(url, content=body, headers=headers, timeout=None)

    async def _explain_loss(self, error: httpx.HTTPError, piece: range, seconds: float) -> Problem:
        """A connection that broke: is the server gone, or only this call?"""
        where = f"questions {piece.start + 1} to {piece.stop} of {len(self._questions)}"
        broke = f"the connection broke {seconds:.1f} s into the call for {where}"
        broke += f" ({describe_error(error)})"
        for _ in range(_PROBES_TO_BE_GONE):
            try:
                async with asyncio.timeout(2 * readiness.PROBE_TIMEOUT_S):
                    await self._client.get(f"{self._url}/", timeout=readiness.PROBE_TIMEOUT_S)
            except (httpx.ReadTimeout, TimeoutError):
                break  # it holds the request, so it lives
            except httpx.HTTPError as other:
                gone = describe_error(other)
                await asyncio.sleep(readiness.POLL_S)
            else:
                break
        else:
            return Problem("server_died", f"{broke}, and GET / fails since: {gone}")
        return Problem("connection_lost", f"{broke}; GET / still answers")
