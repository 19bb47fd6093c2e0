"""Arms side by side on this host's GPUs: all stopped but the one that is measured.

    python -m lab gpu                                       every arm that the host has room for
    python -m lab gpu --arms default entries course course-stock --record docs/results/gpu.json
    python -m lab gpu --model FOLDER --load-format dummy    a model's shape, with random weights
    python -m lab gpu --arms course '2*course' --prompts 358,716          two cards, two engines
    python -m lab gpu --arms course 'course attention-backend=FLASH_ATTN' --streams 1,16,64,256

An arm is a profile of the launcher (PROFILE-stock: with vLLM's own scheduler), `default` (`vllm
serve` as it comes), or `entries` (the flags that published entries of the course share). The first
arm is what the others are held against. docs/gpu.md says what is asked of each and how.

Exit codes: 0 measured; 1 answers mixed up, or not those that they must be; 2 bad options; 3 no
figures.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
from tokenizers import Tokenizer

from common.project import DEMO_MODEL
from common.questions import QuestionSet, read_questions
from gateway.config import Settings
from gateway.prompts.builder import PromptBuilder
from gateway.schemas.predict import default_sampling
from lab import options
from lab.bench.bench_figures import BenchFailed
from lab.bench.targets import PromptForm, open_client
from lab.failures import BadOptions
from lab.gpu.arms import (
    ArmPlanner,
    AskedBatch,
    PlannedArm,
    group_arms,
    list_default_arms,
    parse_arm,
)
from lab.gpu.calls import STREAM_TOKENS, ArmClient, AskedLoads
from lab.gpu.endless import build_endless
from lab.gpu.engines import RunningArm, list_cards
from lab.gpu.gpu_result import GpuResult
from lab.paths import OUT
from lab.reports.console import ProgressLine, count
from lab.reports.output_files import ensure_writable
from lab.service import open_http

_START_TIMEOUT_S = 400.0
_STOP_S = 15.0  # what stopping a group of engines takes


def main(words: Sequence[str]) -> int:
    arguments = options.parse_options(build_parser(), words)
    if arguments.launcher_options:
        raise BadOptions("an arm has options of its own: --arms 'course KEY=VALUE …'")
    asked = read_questions(Path(arguments.questions).expanduser(), needs_answers=False)
    for path in filter(None, (arguments.out, arguments.record)):
        ensure_writable(Path(path))
    progress = ProgressLine()
    try:
        result = asyncio.run(GpuRun(arguments, asked, progress).measure())
    finally:
        progress.close()
    print("\n".join(result.describe()))
    return 0 if result.is_good else 1


class GpuRun:
    """One run: the arms in groups that the cards hold, each group in rounds."""

    def __init__(
        self, arguments: argparse.Namespace, asked: QuestionSet, progress: ProgressLine
    ) -> None:
        self._arguments, self._progress = arguments, progress
        self._deadline = time.monotonic() + arguments.seconds
        self._chance = random.Random(arguments.seed)
        model = Path(arguments.model).expanduser()
        if not (model / "tokenizer.json").is_file():
            raise BadOptions(f"--model: {model} is no folder of a model with a tokenizer.json")
        self._folder = Path(arguments.out).resolve().parent / "gpu"
        is_endless = arguments.load_format == "dummy"
        self._model = build_endless(model, self._folder) if is_endless else model
        self._folder.mkdir(parents=True, exist_ok=True)
        questions = take_different(asked.questions, max(arguments.prompts + arguments.streams))
        self._loads = AskedLoads(
            questions,
            frozenset(asked.questions),
            arguments.prompts,
            arguments.tokens,
            arguments.streams,
            is_endless,
        )

    async def measure(self) -> GpuResult:
        builder = PromptBuilder(settings := Settings(tokenizer=self._model))
        sampling = builder.complete(default_sampling(settings))
        # In a thread: it asks nvidia-smi, by an event loop of its own.
        planner = await asyncio.to_thread(ArmPlanner, self._model, self._arguments.load_format)
        form = PromptForm(planner.model.served_name, builder, sampling, max(self._loads.tokens))
        longest = max(map(len, await form.build_ids(self._loads.questions)))
        planned = await asyncio.to_thread(self._plan_arms, planner, longest)
        names = {"model": planner.model.served_name, "vllm": planner.vllm.title}
        result = GpuResult(self._arguments, self._loads, tuple(planned), names)
        cards = len(list_cards())
        groups = group_arms(planned, planner.device, min(self._arguments.gpus or cards, cards))
        # Less than any server keeps an idle connection for: a closing one is no failure.
        limits = httpx.Limits(keepalive_expiry=2.0)
        async with open_http(timeout=30.0, limits=limits) as http:
            for number, group in enumerate(groups):
                now = time.monotonic()
                deadline = now + (self._deadline - now) / (len(groups) - number)
                await self._measure_group(group, http, form, result, deadline - _STOP_S)
        if not result.rounds:
            raise BenchFailed(f"nothing was measured; the logs are in {self._folder}")
        return result

    def _plan_arms(self, planner: ArmPlanner, longest: int) -> list[PlannedArm]:
        arguments, tokens = self._arguments, self._loads.tokens
        batch = AskedBatch(len(self._loads.questions), longest, max(*tokens, STREAM_TOKENS))
        words = arguments.arms or list_default_arms(planner.device)
        planned = [planner.plan(parse_arm(word), batch) for word in words]
        if not arguments.arms:
            planned = leave_doubles_out(planned)
        profiles = [one.arm.word for one in planned if one.plan]
        arguments.control = arguments.control or next(iter(profiles), words[0])
        if arguments.control not in {one.arm.word for one in planned}:
            raise BadOptions(f"--control {arguments.control!r} is none of the arms")
        for one in planned:
            self._say(f"{one.arm.word}: {one.describe()}")
        return planned

    async def _measure_group(
        self,
        group: Sequence[PlannedArm],
        http: httpx.AsyncClient,
        form: PromptForm,
        result: GpuResult,
        deadline: float,
    ) -> None:
        self._say(f"starting {', '.join(one.arm.word for one in group)}")
        running = [RunningArm(one, self._folder) for one in group]
        try:
            tokenizer = Tokenizer.from_file(str(self._model / "tokenizer.json"))
            starting = [self._start(one, http, deadline) for one in running]
            came_up = await asyncio.gather(*starting)
            ready = [one for one, is_up in zip(running, came_up, strict=True) if is_up]
            async with open_client() as client:
                arms = [ArmClient(one, form, tokenizer, self._loads, client, http) for one in ready]
                await self._take_rounds(arms, result, deadline)
        finally:
            self._say("stopping")
            await asyncio.gather(*(one.end() for one in running))

    async def _start(self, one: RunningArm, http: httpx.AsyncClient, deadline: float) -> bool:
        """Whether it came up; one that did not is told of and left out."""
        began = time.monotonic()
        try:
            await one.wait_ready(http, min(deadline, began + _START_TIMEOUT_S))
        except BenchFailed as error:
            self._say(str(error))
            return False
        self._say(f"{one.arm.word}: ready in {time.monotonic() - began:.0f} s")
        one.sleep()
        return True

    async def _take_rounds(self, arms: list[ArmClient], result: GpuResult, deadline: float) -> None:
        """The first one warms up, and is no round."""
        longest_s = 0.0
        for number in range(self._arguments.rounds + 1):
            began = time.monotonic()
            if not arms:
                break
            if number > 1 and began + longest_s > deadline:
                self._say(f"the time is used up after {count(number - 1, 'round')}")
                break
            taken: dict[str, dict[str, dict[str, float]]] = {}
            for arm in self._chance.sample(arms, len(arms)):
                try:
                    taken[arm.running.arm.word] = await self._measure_arm(arm, is_first=number == 0)
                except (BenchFailed, httpx.HTTPError) as error:
                    self._say(f"{arm.running.arm.word} is left out from here on: {error!r}")
                    arms.remove(arm)
            longest_s = max(longest_s, time.monotonic() - began)
            if number and taken:
                result.add_round(taken, arms)
                self._say(f"round {number}: {result.describe_round(taken)}")

    async def _measure_arm(self, arm: ArmClient, *, is_first: bool) -> dict[str, dict[str, float]]:
        running = arm.running
        is_control = running.arm.word == self._arguments.control
        measures = list(self._loads.list_measures(running, is_control=is_control))
        taken = {}
        try:
            await arm.wake()
            if is_first:
                await arm.learn()
            for one in self._chance.sample(measures, len(measures)):
                taken[one.name] = await arm.measure(one)
        finally:
            running.sleep()
        return taken

    def _say(self, text: str) -> None:
        """With the seconds left: a run on a lent machine is watched."""
        self._progress.say(f"[{self._deadline - time.monotonic():4.0f} s left] {text}")


def leave_doubles_out(planned: Sequence[PlannedArm]) -> list[PlannedArm]:
    """A profile that has vLLM's scheduler anyway is no other arm with it."""
    commands = [one.command for one in planned]
    return [one for place, one in enumerate(planned) if one.command not in commands[:place]]


def take_different(questions: Sequence[str], wanted: int) -> tuple[str, ...]:
    """The file's own, then variants of them: the gateway answers equal ones with one answer."""
    own = dict.fromkeys(questions)
    variants = (f"{one} {number}" for number in itertools.count(2) for one in own)
    return tuple(itertools.islice(itertools.chain(own, variants), wanted))


def build_parser() -> argparse.ArgumentParser:
    parser = options.build_parser("gpu", __doc__)
    options.add_questions(parser)
    numbers, positive = options.whole_numbers, options.whole_number(1)
    add = parser.add_argument_group("what is compared").add_argument
    add("--model", default=str(DEMO_MODEL), metavar="FOLDER", help="default: the demo")
    help_ = "`dummy`: random weights, and every answer as long as was asked for"
    add("--load-format", default="", metavar="FORMAT", help=help_)
    add("--arms", nargs="+", metavar="ARM", help="[K*]NAME, or 'NAME KEY=VALUE …' (default: all)")
    help_ = "asked twice, so that chance has a figure too (default: the first profile)"
    add("--control", default="", metavar="ARM", help=help_)
    add("--gpus", type=positive, metavar="N", help="cards that may be used (default: all)")
    add = parser.add_argument_group("what is measured").add_argument
    add("--prompts", type=numbers, default=(358,), metavar="N,…", help="in one call (default: 358)")
    add("--tokens", type=numbers, default=(128, 256), metavar="N,…", help="new ones (128,256)")
    add("--streams", type=numbers, default=(), metavar="N,…", help="chat streams at once (none)")
    add("--rounds", type=positive, default=8, metavar="N", help="at most (default: 8)")
    help_ = "for everything, starts included (default: 540)"
    add("--seconds", type=options.seconds, default=540.0, metavar="S", help=help_)
    add("--seed", type=int, default=1, help="of the order of turns (default: 1)")
    add = parser.add_argument_group("what comes of it").add_argument
    default = str(OUT / "gpu.json")
    help_ = f"every figure of every round; logs go beside it in gpu/ (default: {default})"
    add("--out", default=default, metavar="FILE", help=help_)
    options.add_record(parser)
    return parser
