"""How fast one candidate answers a batch: a real start of the engine, the batch as the gateway
sends it, the answers beside those of the profile quality.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx

from common.errors import ProgramError, SettingsError
from common.questions import BadQuestions, QuestionPair, read_questions
from launcher.config import TuneSettings
from launcher.engine.probe import EngineProbe
from launcher.engine.supervisor import RestartPolicy, Supervisor
from launcher.engine.terminal import Terminal
from launcher.engine.vllm_server import VllmServer
from launcher.models.model import Model, find_model
from launcher.plan.command import InstalledVllm, build_command, find_vllm
from launcher.plan.engine_plan import (
    EngineOption,
    EnginePlan,
    build_plan,
    choose_profile,
    parse_overrides,
)
from launcher.plan.flags.known_flags import Flags, read_flags
from launcher.plan.hardware import Device, find_device
from launcher.plan.scheduler import choose_scheduler
from launcher.tuning.candidates import Candidate, CandidateResult
from launcher.tuning.rouge import mean_rouge_l

_BATCH_TIMEOUT_S = 600.0
_EXIT_PATIENCE_S = 2.0
# Below it the model does not know the answers, so losing some of its score proves nothing.
_TELLING_SCORE = 0.3


@dataclass(frozen=True)
class MeasuredBatch:
    """One measured batch: its answers and how fast they came."""

    answers: list[str]
    tokens_per_s: float


@dataclass(frozen=True)
class CandidateMeter:
    """Everything that stays the same between candidates."""

    settings: TuneSettings
    vllm: InstalledVllm
    flags: Flags
    device: Device
    model: Model
    profile: str
    asked: list[EngineOption]
    questions: tuple[QuestionPair, ...]

    @classmethod
    def prepare(cls, settings: TuneSettings) -> CandidateMeter:
        vllm = find_vllm()
        flags = read_flags(vllm.version, settings.cache_path)
        device = find_device(settings.gpu, engine_build=vllm.build, gpus=settings.gpus)
        profile = choose_profile(settings.profile, device)
        model = find_model(settings)
        try:
            questions = read_questions(settings.tune_questions, needs_answers=False)
        except BadQuestions as error:
            raise SettingsError(f"tune_questions: {error}") from None
        pairs = questions.take(settings.tune_prompts).pairs
        asked = parse_overrides(settings.set, flags)
        return cls(settings, vllm, flags, device, model, profile, asked, pairs)

    def plan(self, candidate: Candidate, profile: str = "") -> EnginePlan:
        tried = [
            EngineOption(name, value, "candidate", "tune", "tune")
            for name, value in candidate.changes.items()
        ]
        name = profile or self.profile
        plan = build_plan(
            name, self.device, self.model, self.flags, overrides=[*tried, *self.asked]
        )
        return choose_scheduler(plan, self.vllm)

    async def read_reference(self) -> tuple[list[str], float]:
        """The answers of the profile quality, and how long an engine takes to start here."""
        plan = self.plan(Candidate("quality", "", ""), "quality")
        async with self._running(plan) as (client, start_s):
            return (await self._ask(client, plan)).answers, start_s

    async def measure(self, result: CandidateResult, reference: list[str]) -> None:
        plan = self.plan(result.candidate)
        async with self._running(plan) as (client, start_s):
            result.start_seconds.append(start_s)
            warm = await self._ask(client, plan)
            result.loss = max(result.loss, self._loss(warm.answers, reference))
            for _ in range(self.settings.tune_repeats):
                result.speeds.append((await self._ask(client, plan)).tokens_per_s)

    def _loss(self, answers: list[str], reference: list[str]) -> float:
        """What is lost of quality's score; where that says little, how far from its answers."""
        truth = [question.reference for question in self.questions]
        best = mean_rouge_l(reference, truth) if all(truth) else 0.0
        if best < _TELLING_SCORE:
            return 1.0 - mean_rouge_l(answers, reference)
        return max(0.0, best - mean_rouge_l(answers, truth))

    @contextlib.asynccontextmanager
    async def _running(self, plan: EnginePlan) -> AsyncIterator[tuple[httpx.AsyncClient, float]]:
        """The engine of this plan, ready; nothing of it is left afterwards."""
        settings = self.settings
        command = build_command(plan, settings, self.vllm, self.flags)
        served = plan.model.served_name
        async with (
            EngineProbe(settings.engine_url, served) as probe,
            httpx.AsyncClient(base_url=settings.engine_url, trust_env=False) as client,
        ):
            engine = VllmServer(command, settings, probe)
            terminal = Terminal(settings.log_format, "none")
            supervisor = Supervisor(
                engine, RestartPolicy(0, 1, 0, 0), terminal, settings.state_path
            )
            engine.lines = supervisor.lines
            running = asyncio.create_task(supervisor.run())
            ready = asyncio.create_task(supervisor.ready.wait())
            try:
                await asyncio.wait({running, ready}, return_when=asyncio.FIRST_COMPLETED)
                if running.done():
                    running.result()
                yield client, supervisor.status.start_seconds or 0.0
            except httpx.HTTPError as error:
                # The line breaks a moment before the exit is known, and that says more.
                await asyncio.wait({running}, timeout=_EXIT_PATIENCE_S)
                if running.done():
                    running.result()
                raise ProgramError(f"the engine lost the batch: {error!r}") from None
            finally:
                ready.cancel()
                task = asyncio.current_task()
                if task and task.cancelling():
                    supervisor.hurry()  # nobody waits for an answer any more
                else:
                    supervisor.ask_to_stop()
                await asyncio.wait({running})
                if not running.cancelled():
                    running.exception()  # was told above, or nobody is left to be told

    async def _ask(self, client: httpx.AsyncClient, plan: EnginePlan) -> MeasuredBatch:
        """The batch as the gateway sends it: one call an API server, prompts as token ids."""
        prompts = await asyncio.gather(*(self._tokenize(client, plan, q) for q in self.questions))
        servers = int(plan.value("api-server-count", 1))
        size = math.ceil(len(prompts) / servers)
        shards = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        began = time.perf_counter()
        replies = await asyncio.gather(*(self._complete(client, plan, shard) for shard in shards))
        seconds = time.perf_counter() - began
        choices = [choice for reply in replies for choice in reply["choices"]]
        tokens = sum(reply["usage"]["completion_tokens"] for reply in replies)
        return MeasuredBatch([choice["text"].strip() for choice in choices], tokens / seconds)

    async def _tokenize(
        self, client: httpx.AsyncClient, plan: EnginePlan, question: QuestionPair
    ) -> list[int]:
        turn = {"role": "user", "content": question.question}
        extra = {"chat_template_kwargs": {"enable_thinking": False}}
        body = {"model": plan.model.served_name, "messages": [turn], **extra}
        reply = await client.post("/tokenize", json=body, timeout=_BATCH_TIMEOUT_S)
        if reply.status_code != httpx.codes.OK:  # a model without a chat template
            plain = {"model": plan.model.served_name, "prompt": question.question}
            reply = await client.post("/tokenize", json=plain, timeout=_BATCH_TIMEOUT_S)
        reply.raise_for_status()
        return list(reply.json()["tokens"])

    async def _complete(
        self, client: httpx.AsyncClient, plan: EnginePlan, prompts: list[list[int]]
    ) -> dict[str, Any]:
        body = {
            "model": plan.model.served_name,
            "prompt": prompts,
            "max_tokens": self.settings.tune_max_tokens,
            "temperature": 0,
        }
        reply = await client.post("/v1/completions", json=body, timeout=_BATCH_TIMEOUT_S)
        if reply.status_code != httpx.codes.OK:
            raise ProgramError(f"the engine refused the batch: {reply.text[:300]}")
        answer: dict[str, Any] = reply.json()
        answer["choices"].sort(key=lambda choice: choice["index"])
        return answer
