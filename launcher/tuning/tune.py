"""`launcher tune`: measure on this host what the profile should be, keep the fastest honest one.

Rounds over all candidates, so that a slow minute of the host hits all of them; each is a real start
of the engine and the same batch of questions. `tuned.py` keeps and reads the result.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import signal
import statistics
import sys
import time
import tomllib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx

from common.errors import ProgramError, SettingsError
from common.settings import suggest
from launcher.config import TuneSettings
from launcher.engine.probe import EngineProbe
from launcher.engine.supervisor import RestartRule, Supervisor
from launcher.engine.terminal import Output
from launcher.engine.vllm_server import Engine
from launcher.errors import NeverReady
from launcher.models.model import Model, find_model
from launcher.plan.command import InstalledVllm, build_command, find_vllm
from launcher.plan.engine_plan import Choice, Plan, build_plan, choose_profile, parse_overrides
from launcher.plan.fingerprint import take_host_key
from launcher.plan.flags import Flags, read_flags
from launcher.plan.hardware import Device, count_cores, find_device
from launcher.plan.tuned import write_tuned
from launcher.session import Listener, hold_state
from launcher.tuning.rouge import mean_rouge_l

_FILE = Path(__file__).parent / "candidates.toml"
_SHIPPED = "as shipped"
_COMBINED = "together"
# Less than this is noise between two starts of the same engine.
_WORTH_IT = 1.02
_BATCH_TIMEOUT_S = 600.0
_EXIT_PATIENCE_S = 2.0
# Below it the model does not know the answers, so losing some of its score proves nothing.
_TELLING_SCORE = 0.3

Say = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Candidate:
    name: str
    axis: str
    why: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def changes(self) -> dict[str, Any]:
        return {**self.options, **self.environment}


@dataclass
class Result:
    """What one candidate did, over all rounds."""

    candidate: Candidate
    speeds: list[float] = field(default_factory=list)  # output tokens a second, one a batch
    start_seconds: list[float] = field(default_factory=list)
    loss: float = 0.0
    failure: str = ""

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds) if self.speeds else 0.0


@dataclass(frozen=True)
class Question:
    text: str
    answer: str


@dataclass(frozen=True)
class Batch:
    """One measured batch: its answers and how fast they came."""

    answers: list[str]
    tokens_per_s: float


def list_candidates(device: Device, plan: Plan) -> list[Candidate]:
    """The profile as shipped, and every change that applies here and changes anything."""
    kinds = {"gpu", device.generation} if device.is_gpu else {"cpu"}
    present = {choice.name: choice.value for choice in (*plan.options, *plan.environment)}
    found = [Candidate(_SHIPPED, "", f"the profile {plan.profile}, unchanged")]
    for row in tomllib.loads(_FILE.read_text(encoding="utf-8"))["candidate"]:
        environment = {
            name: value.format(cores=count_cores())
            for name, value in row.get("environment", {}).items()
        }
        candidate = Candidate(
            row["name"], row["axis"], row["why"], row.get("options", {}), environment
        )
        is_new = any(str(present.get(k, "auto")) != str(v) for k, v in candidate.changes.items())
        is_double = any(candidate.changes == other.changes for other in found)
        if kinds & set(row["on"]) and is_new and not is_double:
            found.append(candidate)
    return found


def pick(candidates: list[Candidate], names: Sequence[str]) -> list[Candidate]:
    """The profile as shipped and those asked for; all of them when none is."""
    known = [candidate.name for candidate in candidates[1:]]
    for name in names:
        if name not in known:
            raise SettingsError(
                f"tune_only: {name} is no candidate here{suggest(name, known)} "
                f"(there are: {', '.join(known)})"
            )
    return [one for one in candidates if not names or one.name in (_SHIPPED, *names)]


def tune(settings: TuneSettings, say: Say) -> int:
    bench = Bench.prepare(settings)
    candidates = list_candidates(bench.device, bench.plan(Candidate(_SHIPPED, "", "")))
    candidates = pick(candidates, settings.tune_only.split())
    say(f"profile {bench.profile} on {bench.device.title}, {bench.model.name}, {bench.vllm.title}")
    for candidate in candidates:
        changes = " ".join(f"{k}={v}" for k, v in candidate.changes.items())
        say(f"  {candidate.name:<17} {changes or '-'}  ({candidate.why})")
    if settings.dry_run:
        return 0
    with hold_state(settings.state_path):
        engine = Listener(settings.engine_host, settings.engine_port, "LAUNCHER_ENGINE_PORT")
        engine.ensure_free()
        results = asyncio.run(_until_signal(_measure_all(bench, candidates, say)))
    _keep(bench, results, say)
    return 0


async def _until_signal(work: Coroutine[Any, Any, T]) -> T:
    """A signal cancels it, so that the engine is ended before we leave."""
    task, caught = asyncio.ensure_future(work), list[int]()

    def leave(number: int) -> None:
        if not caught:  # the engine is killed at once: another signal would only break that off
            task.cancel()
        caught.append(number)

    loop = asyncio.get_running_loop()
    # A shell without job control has its background ignore Ctrl-C: that stays.
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handled = [number for number, known in before.items() if known != signal.SIG_IGN]
    for number in handled:
        loop.add_signal_handler(number, leave, number)
    try:
        return await task
    except asyncio.CancelledError:
        if caught:
            sys.exit(128 + caught[0])
        raise
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
            signal.signal(number, before[number])


async def _measure_all(bench: Bench, candidates: list[Candidate], say: Say) -> list[Result]:
    course = Course(bench, time.monotonic() + bench.settings.tune_minutes * 60, say)
    say("reference answers, from the profile quality")
    course.reference, course.start_s = await bench.read_reference()
    results = [Result(candidate) for candidate in candidates]
    for number in range(1, bench.settings.tune_rounds + 1):
        await course.run(results, f"round {number}")
    combined = combine(results, bench.settings.tune_max_loss)
    if combined:
        # Against the shipped one again, so that both met the same minutes of the host.
        extra = [Result(combined), results[0]]
        for number in range(1, bench.settings.tune_rounds + 1):
            await course.run(extra, f"combined {number}")
        results.append(extra[0])
    return results


@dataclass
class Course:
    """Rounds over the candidates within the time there is."""

    bench: Bench
    deadline: float
    say: Say
    reference: list[str] = field(default_factory=list)
    start_s: float = 0.0

    async def run(self, results: Iterable[Result], title: str) -> None:
        for result in results:
            if result.failure:
                continue
            name = f"{title}  {result.candidate.name:<17}"
            if time.monotonic() + self._expected_s(result) > self.deadline:
                self.say(f"{name} left out: the time is used up")
                continue
            try:
                await self.bench.measure(result, self.reference)
            except ProgramError as error:
                result.failure = str(error)
            told = f"{result.speed:,.0f} tokens/s, ROUGE-L loss {result.loss:.3f}"
            left_min = (self.deadline - time.monotonic()) / 60
            self.say(f"{name} {result.failure or told}  ({left_min:.1f} min left)")

    def _expected_s(self, result: Result) -> float:
        return 1.5 * max(result.start_seconds, default=self.start_s)


def combine(results: list[Result], max_loss: float) -> Candidate | None:
    """The best honest change of every axis, together; None when fewer than two axes gained."""
    shipped = results[0].speed
    best: dict[str, Result] = {}
    for result in results[1:]:
        is_honest = result.loss <= max_loss and not result.failure
        is_gain = result.speed > shipped * _WORTH_IT and is_honest
        axis = result.candidate.axis
        if is_gain and (axis not in best or best[axis].speed < result.speed):
            best[axis] = result
    if len(best) < 2:
        return None
    winners = [result.candidate for result in best.values()]
    return Candidate(
        _COMBINED,
        "all",
        " + ".join(winner.name for winner in winners),
        dict(itertools.chain.from_iterable(w.options.items() for w in winners)),
        dict(itertools.chain.from_iterable(w.environment.items() for w in winners)),
    )


def choose(results: list[Result], max_loss: float) -> Result:
    """The fastest honest one; what was shipped stays unless it is beaten by more than noise."""
    shipped = results[0]
    honest = [r for r in results[1:] if r.speeds and r.loss <= max_loss and not r.failure]
    best = max(honest, key=lambda r: r.speed, default=shipped)
    return best if best.speed > shipped.speed * _WORTH_IT else shipped


def _keep(bench: Bench, results: list[Result], say: Say) -> None:
    settings, shipped = bench.settings, results[0]
    if not shipped.speeds:
        reason = shipped.failure or (
            f"{settings.tune_minutes:g} minutes are too short for it (LAUNCHER_TUNE_MINUTES)"
        )
        raise NeverReady(f"the profile as shipped could not be measured: {reason}")
    for result in results:
        if result.speeds and result.loss > settings.tune_max_loss:
            say(f"refused {result.candidate.name}: ROUGE-L loss {result.loss:.3f}")
    best = choose(results, settings.tune_max_loss)
    gain = f"{best.speed / shipped.speed:.2f} times the profile as shipped"
    summary = f"{best.candidate.name}, {best.speed:,.0f} tokens/s, {gain}"
    host_key = take_host_key(bench.vllm, bench.model, bench.device)
    measurements = settings.cache_path / f"tune-{host_key}.json"
    rows = [{**asdict(result), "tokens_per_s": round(result.speed, 1)} for result in results]
    try:
        measurements.parent.mkdir(parents=True, exist_ok=True)
        measurements.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        write_tuned(
            settings.tuned_path,
            host_key=host_key,
            profile=bench.profile,
            options=best.candidate.options,
            environment=best.candidate.environment,
            summary=summary,
            measurements=str(measurements),
        )
    except OSError as error:
        say(summary)  # half an hour's work, and nowhere to put it
        changes = " ".join(f"{k}={v}" for k, v in best.candidate.changes.items())
        raise SettingsError(
            f"cannot write {error.filename or settings.tuned_path} ({error.strerror}); make room "
            f"or set LAUNCHER_CACHE_DIR. The fastest: {changes or 'the profile as shipped'}"
        ) from None
    say(f"{settings.tuned_path}: {summary}")


@dataclass(frozen=True)
class Bench:
    """Everything that stays the same between candidates."""

    settings: TuneSettings
    vllm: InstalledVllm
    flags: Flags
    device: Device
    model: Model
    profile: str
    asked: list[Choice]
    questions: list[Question]

    @classmethod
    def prepare(cls, settings: TuneSettings) -> Bench:
        vllm = find_vllm()
        flags = read_flags(vllm.version, settings.cache_path)
        device = find_device(settings.gpu, engine_build=vllm.build)
        profile = choose_profile(settings.profile, device)
        model = find_model(settings)
        questions = read_questions(settings.tune_questions, settings.tune_prompts)
        asked = parse_overrides(settings.set, flags)
        return cls(settings, vllm, flags, device, model, profile, asked, questions)

    def plan(self, candidate: Candidate, profile: str = "") -> Plan:
        tried = [
            Choice(name, value, "candidate", "tune", "tune")
            for name, value in candidate.changes.items()
        ]
        name = profile or self.profile
        return build_plan(
            name, self.device, self.model, self.flags, overrides=[*tried, *self.asked]
        )

    async def read_reference(self) -> tuple[list[str], float]:
        """The answers of the profile quality, and how long an engine takes to start here."""
        plan = self.plan(Candidate("quality", "", ""), "quality")
        async with self._running(plan) as (client, start_s):
            return (await self._ask(client, plan)).answers, start_s

    async def measure(self, result: Result, reference: list[str]) -> None:
        plan = self.plan(result.candidate)
        async with self._running(plan) as (client, start_s):
            result.start_seconds.append(start_s)
            warm = await self._ask(client, plan)
            result.loss = max(result.loss, self._loss(warm.answers, reference))
            for _ in range(self.settings.tune_repeats):
                result.speeds.append((await self._ask(client, plan)).tokens_per_s)

    def _loss(self, answers: list[str], reference: list[str]) -> float:
        """What is lost of quality's score; where that says little, how far from its answers."""
        truth = [question.answer for question in self.questions]
        best = mean_rouge_l(reference, truth) if all(truth) else 0.0
        if best < _TELLING_SCORE:
            return 1.0 - mean_rouge_l(answers, reference)
        return max(0.0, best - mean_rouge_l(answers, truth))

    @contextlib.asynccontextmanager
    async def _running(self, plan: Plan) -> AsyncIterator[tuple[httpx.AsyncClient, float]]:
        """The engine of this plan, ready; nothing of it is left afterwards."""
        settings = self.settings
        command = build_command(plan, settings, self.vllm, self.flags)
        served = plan.model.served_name
        async with (
            EngineProbe(settings.engine_url, served) as probe,
            httpx.AsyncClient(base_url=settings.engine_url, trust_env=False) as client,
        ):
            engine = Engine(command, settings, probe, served)
            output = Output(settings.log_format, "none")
            supervisor = Supervisor(engine, RestartRule(0, 1, 0, 0), output, settings.state_path)
            engine.lines = supervisor.lines
            running = asyncio.create_task(supervisor.run())
            ready = asyncio.create_task(supervisor.ready.wait())
            try:
                await asyncio.wait({running, ready}, return_when=asyncio.FIRST_COMPLETED)
                if running.done():
                    running.result()
                yield client, supervisor.standing.start_seconds or 0.0
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

    async def _ask(self, client: httpx.AsyncClient, plan: Plan) -> Batch:
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
        return Batch([choice["text"].strip() for choice in choices], tokens / seconds)

    async def _tokenize(
        self, client: httpx.AsyncClient, plan: Plan, question: Question
    ) -> list[int]:
        turn = {"role": "user", "content": question.text}
        extra = {"chat_template_kwargs": {"enable_thinking": False}}
        body = {"model": plan.model.served_name, "messages": [turn], **extra}
        reply = await client.post("/tokenize", json=body, timeout=_BATCH_TIMEOUT_S)
        if reply.status_code != httpx.codes.OK:  # a model without a chat template
            plain = {"model": plan.model.served_name, "prompt": question.text}
            reply = await client.post("/tokenize", json=plain, timeout=_BATCH_TIMEOUT_S)
        reply.raise_for_status()
        return list(reply.json()["tokens"])

    async def _complete(
        self, client: httpx.AsyncClient, plan: Plan, prompts: list[list[int]]
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


def read_questions(path: Path, count: int) -> list[Question]:
    """As many as asked for; a shorter file is read again from its start."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [json.loads(line) for line in lines]
        questions = [Question(row["question"], row.get("answer", "")) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"tune_questions: {path} cannot be read: {error}") from None
    if not questions:
        raise SettingsError(f"tune_questions: {path} is empty")
    return list(itertools.islice(itertools.cycle(questions), count))
