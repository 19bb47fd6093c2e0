"""What the gateway costs: gateway against direct in one run, every answer checked.

Three arms take turns in random order: the engine itself, the engine once more (the control) and
the gateway before that engine. Without --url it starts `python -m launcher up` and stops it again;
what stands behind `--` goes to the launcher:

    python -m lab bench                              everything, ten minutes on two cores
    python -m lab bench --quick                      a minute's look
    python -m lab bench --only batch,relay           some parts alone
    python -m lab bench --peers                      the relay beside other routers for vLLM
    python -m lab bench --beside ../older            the relay beside another checkout's
    python -m lab bench --against out/before.json    which figures have really changed?
    python -m lab bench --url http://127.0.0.1:8000 --direct-url http://127.0.0.1:8001
    python -m lab bench --model Qwen/Qwen3-0.6B -- --profile course

Parts: one (prompt), batch, calls, streams, outside (`vllm bench serve`), relay (beside a plain
relay and a stand-in engine). docs/benchmarks.md says how to read the figures.

Exit codes: 0 measured; 1 a bound surely broken, really worse than --against, or answers mixed up;
2 bad options, or a file that cannot be written; 3 no figures.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from common.ports import find_free_row
from common.questions import QuestionSet, read_questions
from gateway.config import Settings
from gateway.prompts.builder import PromptBuilder
from gateway.schemas.predict import default_sampling
from lab import options
from lab.bench import bench_options
from lab.bench.answer_book import MixedUp, build_book
from lab.bench.bench_figures import BenchFailed
from lab.bench.cpu_time import build_meter
from lab.bench.relay.peers import install_peers, place_checkout
from lab.bench.relay.relay_comparison import RelayResult, measure_relay
from lab.bench.report.bench_console import describe_result
from lab.bench.report.bench_result import BenchFacts, BenchResult
from lab.bench.report.earlier_run import StoredRun, compare_runs, read_run
from lab.bench.rounds import BenchSetup, Say, WorkloadRounds, measure_workload
from lab.bench.targets import PromptForm, Target, ask_all, open_client
from lab.bench.vllm_bench import NoVllm, VllmBenchTargets, measure_vllm_bench
from lab.failures import BadOptions
from lab.launched_server import LaunchCommand, launch
from lab.paths import ROOT
from lab.readiness import Problem, wait_ready
from lab.records.record import take_facts, take_record, write_record
from lab.reports.console import ProgressLine
from lab.reports.output_files import ensure_writable
from lab.service import LauncherStatus, open_http, read_launcher, read_model, read_settings

_QUIET_LOAD = 0.5
_HOST = "127.0.0.1"
_READY_TIMEOUT_S = 600.0


def main(words: Sequence[str]) -> int:
    arguments = bench_options.parse_arguments(words, __doc__)
    # Whatever is wrong with the files is said before minutes are spent.
    before = read_run(Path(arguments.against)) if arguments.against else None
    asked = read_questions(Path(arguments.questions).expanduser())
    out = Path(arguments.out)
    for path in (out, Path(arguments.record or out)):
        ensure_writable(path)
    result = run_bench(arguments, asked)
    if before:
        now = StoredRun(tuple(result.rows()), result.facts.setting)
        changes = tuple(compare_runs(before, now))
        result = replace(result, changes=changes, against=arguments.against)
    result.write(out)
    print("\n".join(describe_result(result, coloured=sys.stdout.isatty())))
    print(f"saved: {out}")
    if arguments.record:
        keep_record(result, Path(arguments.record))
    return 0 if result.is_good else 1


def run_bench(arguments: argparse.Namespace, asked: QuestionSet) -> BenchResult:
    progress = ProgressLine()
    try:
        return asyncio.run(BenchRun(arguments, asked, progress).measure())
    except MixedUp as error:
        said = f"ANSWERS WERE MIXED UP, so there are no figures: {error}"
        raise MixedUp(said) from None
    finally:
        progress.close()


def keep_record(result: BenchResult, path: Path) -> None:
    facts = result.facts
    engine = ", ".join(f"{k} {v}" for k, v in facts.engine.items() if k != "command")
    about = (
        f"Gateway against direct, {facts.model or 'a stand-in engine'}, in {facts.seconds:.0f} s; "
        "medians and their 95 % intervals; × direct is taken round by round, over both direct arms."
    )
    about += f" Engine: {engine}." if engine else ""
    name = f"Benchmark, {facts.model or 'relay'}"
    figures = result.figures()
    record = take_record(name, figures, about=about, command=facts.command, machine=facts.machine)
    write_record(record, path)


@dataclass(frozen=True)
class BenchStack:
    """Where gateway, engine and launcher answer, and what they say of themselves.

    Empty where the stand-in engine alone is measured.
    """

    gateway_url: str = ""
    engine_url: str = ""
    model: str = ""
    launcher: LauncherStatus = field(default_factory=LauncherStatus)
    settings: dict[str, str] = field(default_factory=dict)


class BenchRun:
    """One run."""

    def __init__(
        self, arguments: argparse.Namespace, asked: QuestionSet, progress: ProgressLine
    ) -> None:
        self._arguments, self._progress = arguments, progress
        self._scale: bench_options.BenchScale = arguments.scale
        self._parts: tuple[str, ...] = arguments.parts
        self._pairs = {pair.question: pair.reference for pair in asked.pairs}
        self._digest = asked.digest
        self._asked = bench_options.AskedQuestions(tuple(self._pairs), arguments.max_tokens)
        self._chance = random.Random(arguments.seed)
        folder = Path(arguments.out).resolve().parent / "peers"
        self._peers = folder if arguments.peers else None
        beside = Path(arguments.beside).resolve() if arguments.beside else None
        self._beside = [place_checkout(beside)] if beside else []
        self._notes: list[str] = []

    async def measure(self) -> BenchResult:
        began, load_before = time.monotonic(), os.getloadavg()[0]
        if load_before > _QUIET_LOAD * len(os.sched_getaffinity(0)):
            self._progress.say(
                f"this machine is busy already (load {load_before:.1f}): the control will tell"
            )
        stack, measured = BenchStack(), dict[str, Any]()
        with ExitStack() as exits:
            if set(self._parts) != {"relay"}:
                stack = await self._open_stack(exits)
                measured = await self._measure_parts(stack)
        relayed = await self._measure_relay() if "relay" in self._parts else None
        answers = measured.pop("answers", "")
        facts = self._collect_facts(stack, answers, load_before, time.monotonic() - began)
        return BenchResult(
            facts=facts,
            relayed=relayed,
            batch_title=bench_options.batch_title(self._scale.prompts),
            single_title=bench_options.SINGLE_TITLE,
            notes=tuple(self._notes),
            **measured,
        )

    async def _open_stack(self, exits: ExitStack) -> BenchStack:
        """One that runs already, or one of our own; waited for, and asked what it is."""
        arguments = self._arguments
        urls = (arguments.url, arguments.direct_url, arguments.status_url)
        find_end: Callable[[], Problem | None] | None = None
        if not arguments.url:
            urls, find_end = self._start_stack(exits)
        gateway, engine, status = urls
        self._progress.working("waiting for the gateway")
        async with open_http(headers=options.build_headers(arguments.api_key)) as client:
            await wait_ready(gateway, client, self._progress, _READY_TIMEOUT_S, find_end)
            settings = await read_settings(gateway, client)
        async with open_http() as client:
            model = await read_model(engine, client)
            launcher = await read_launcher(status, client)
        if not model:
            said = f"no engine answers at {engine}/v1/models"
            raise BenchFailed(f"{said}; --direct-url says where it is")
        return BenchStack(gateway, engine, model, launcher, settings)

    def _start_stack(
        self, exits: ExitStack
    ) -> tuple[tuple[str, str, str], Callable[[], Problem | None]]:
        """On free ports."""
        folder = Path(self._arguments.out).resolve().parent
        port = find_free_row(3)
        environment = {
            # The same prompts are asked again and again: sharing answers would be cheating.
            "GATEWAY_DEDUP": "false",
            # Not one folder for each of the ports that happened to be free.
            "LAUNCHER_STATE_DIR": os.environ.get("LAUNCHER_STATE_DIR", str(folder / "bench-state")),
            "LAUNCHER_ENGINE_PORT": str(port + 1),
            "LAUNCHER_STATUS_PORT": str(port + 2),
        }
        words = self._arguments.launcher_options
        command = LaunchCommand(_HOST, port, self._arguments.model, words, environment)
        launched = exits.enter_context(launch(command, folder / "bench-stack.log", self._progress))
        gateway, engine, status = (f"http://{_HOST}:{port + above}" for above in range(3))
        return (gateway, engine, status), launched.find_end

    async def _measure_parts(self, stack: BenchStack) -> dict[str, Any]:
        """Fields of the result, and in a sentence how answers were checked."""
        targets = self._build_targets(stack)
        meter = build_meter(stack.launcher)
        if meter is None:
            self._notes.append(
                "no CPU times: no launcher on this machine says which processes are measured"
            )
        workloads: list[WorkloadRounds] = []
        outside = None
        async with open_client() as client:
            self._progress.working("asking every question once, directly")
            learned = await ask_all(client, targets[0], self._asked.known)
            client.book = book = build_book(self._pairs, learned)
            setup = BenchSetup(targets, client, meter, self._chance, self._progress.working)
            chosen = bench_options.list_workloads(self._parts, self._scale, self._asked)
            for workload, budget in chosen:
                told = replace(setup, say=self._announce(workload.title))
                workloads.append(await measure_workload(workload, told, budget))
        if "outside" in self._parts:
            outside = await self._measure_outside(stack)
        if book.differing:
            self._notes.append(
                f"{book.differing} of {book.checked} answers differed from the first one to their "
                "question (greedy decoding may depend on the batch); none was another question's"
            )
        how = "known by heart" if book.is_by_heart else "as the engine itself answered at first"
        answers = f"{book.checked:,} answers held against their questions, {how}"
        return {"workloads": tuple(workloads), "outside": outside, "answers": answers}

    def _build_targets(self, stack: BenchStack) -> tuple[Target, ...]:
        settings = Settings(tokenizer=self._find_tokenizer(stack))
        builder = PromptBuilder(settings)
        sampling = builder.complete(default_sampling(settings))
        form = PromptForm(stack.model, builder, sampling, self._arguments.max_tokens)
        key = self._arguments.api_key
        return (
            Target("direct", stack.engine_url, is_gateway=False, form=form),
            Target("control", stack.engine_url, is_gateway=False, form=form),
            Target("gateway", stack.gateway_url, is_gateway=True, form=form, api_key=key),
        )

    def _find_tokenizer(self, stack: BenchStack) -> Path:
        given = self._arguments.tokenizer
        folder = Path(given).expanduser() if given else stack.launcher.model_folder
        if folder is None or not (folder / "tokenizer.json").is_file():
            raise BadOptions(
                f"{folder or 'no folder'} has no tokenizer.json; --tokenizer names the folder of "
                "the served model (direct calls send token ids, as the gateway does)"
            )
        return folder

    async def _measure_outside(self, stack: BenchStack) -> WorkloadRounds | None:
        engine, gateway = stack.engine_url, stack.gateway_url
        urls = {"direct": engine, "control": engine, "gateway": gateway}
        folder, key = self._find_tokenizer(stack), self._arguments.api_key
        targets = VllmBenchTargets(urls, stack.model, folder, key)
        asked, budget = self._scale.outside, self._scale.budget("outside", 20)
        say = self._announce(asked.title)
        try:
            series = await measure_vllm_bench(targets, asked, budget, self._chance, say)
        except NoVllm as error:
            self._notes.append(f"no outside opinion: {error}")
            return None
        return WorkloadRounds(asked.title, tuple(series), (), None)

    async def _measure_relay(self) -> RelayResult:
        say = self._announce("relay beside a stand-in engine")
        budget = self._scale.budget("relay", 20)
        contenders = list(self._beside)
        if self._peers:
            contenders += await asyncio.to_thread(install_peers, self._peers, say)
        return await measure_relay(self._scale.relay, budget, self._chance, say, contenders)

    def _announce(self, title: str) -> Say:
        """On a terminal the line that changes says it too."""
        if not self._progress.is_terminal:
            self._progress.say(title)
        return lambda text: self._progress.working(f"{title}: {text}")

    def _collect_facts(
        self, stack: BenchStack, answers: str, load_before: float, seconds: float
    ) -> BenchFacts:
        arguments = self._arguments
        engine = stack.launcher.describe_engine()
        asked: dict[str, Any] = {
            "prompts": self._scale.prompts,
            "max tokens": arguments.max_tokens,
            "scale": "quick" if arguments.quick else "full",
            "questions": f"{arguments.questions} {self._digest}".removeprefix(f"{ROOT}/"),
        }
        facts = take_facts(arguments.machine, arguments.api_key)
        same_engine = {
            "machine": facts["machine"],
            "model": stack.model,
            "engine configuration": str(engine.get("fingerprint", "")),
            "workload": hashlib.sha256(repr(sorted(asked.items())).encode()).hexdigest()[:12],
        }
        same_relay = {"machine": facts["machine"], "load": repr(self._scale.relay)}
        return BenchFacts(
            **facts,
            gateway_url=stack.gateway_url,
            engine_url=stack.engine_url,
            model=stack.model,
            answers=answers,
            asked=asked,
            engine=engine,
            gateway=stack.settings,
            load_before=load_before,
            load_after=os.getloadavg()[0],
            seconds=seconds,
            seed=arguments.seed,
            setting={"engine": same_engine, "relay": same_relay},
        )
