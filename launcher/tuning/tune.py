"""`launcher tune`: measure on this host what the profile should be, keep the fastest honest one.

Rounds over all candidates, so that a slow minute of the host hits all of them.
`plan/tuned.py` writes and reads the result.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from common.errors import ProgramError, SettingsError
from common.files import write_file
from common.settings import read_settings_file
from launcher.config import TuneSettings
from launcher.engine.process import end_leftovers
from launcher.errors import NeverReady
from launcher.host_resources import Listener, hold_state
from launcher.plan.fingerprint import take_host_key
from launcher.plan.tuned import carry_tuned, write_tuned
from launcher.tuning.candidates import (
    SHIPPED,
    Candidate,
    CandidateResult,
    choose,
    combine,
    list_candidates,
    pick,
)
from launcher.tuning.measuring import CandidateMeter

Say = Callable[[str], None]
T = TypeVar("T")


def tune(settings: TuneSettings, say: Say) -> int:
    meter = CandidateMeter.prepare(settings)
    candidates = list_candidates(meter.device, meter.plan(Candidate(SHIPPED, "", "")))
    candidates = pick(candidates, settings.tune_only.split())
    say(f"profile {meter.profile} on {meter.device.title}, {meter.model.name}, {meter.vllm.title}")
    for candidate in candidates:
        changes = " ".join(f"{k}={v}" for k, v in candidate.changes.items())
        say(f"  {candidate.name:<17} {changes or '-'}  ({candidate.why})")
    if settings.dry_run:
        return 0
    if settings.tune_into and settings.tune_into.exists():
        read_settings_file(settings.tune_into)  # now, not after half an hour
    with hold_state(settings.state_path):
        asyncio.run(end_leftovers(settings.state_path / "engine.json"))
        engine = Listener(settings.engine_host, settings.engine_port, "LAUNCHER_ENGINE_PORT")
        engine.ensure_free()
        results = asyncio.run(_until_signal(_measure_all(meter, candidates, say)))
    _keep(meter, results, say)
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
            # Whoever is impatient does not change how a process ends that is about to.
            signal.signal(number, signal.SIG_IGN if caught else before[number])


async def _measure_all(
    meter: CandidateMeter, candidates: list[Candidate], say: Say
) -> list[CandidateResult]:
    rounds = Rounds(meter, time.monotonic() + meter.settings.tune_minutes * 60, say)
    say("reference answers, from the profile quality")
    rounds.reference, rounds.start_s = await meter.read_reference()
    results = [CandidateResult(candidate) for candidate in candidates]
    for number in range(1, meter.settings.tune_rounds + 1):
        await rounds.run(results, f"round {number}")
    combined = combine(results, meter.settings.tune_max_loss)
    if combined:
        # Against the shipped one again, so that both met the same minutes of the host.
        extra = [CandidateResult(combined), results[0]]
        for number in range(1, meter.settings.tune_rounds + 1):
            await rounds.run(extra, f"combined {number}")
        results.append(extra[0])
    return results


@dataclass
class Rounds:
    """Rounds over the candidates within the time there is."""

    meter: CandidateMeter
    deadline: float
    say: Say
    reference: list[str] = field(default_factory=list)
    start_s: float = 0.0

    async def run(self, results: Iterable[CandidateResult], title: str) -> None:
        for result in results:
            if result.failure:
                continue
            name = f"{title}  {result.candidate.name:<17}"
            if time.monotonic() + self._expected_s(result) > self.deadline:
                self.say(f"{name} left out: the time is used up")
                continue
            try:
                await self.meter.measure(result, self.reference)
            except ProgramError as error:
                result.failure = str(error)
            told = f"{result.speed:,.0f} tokens/s, ROUGE-L loss {result.loss:.3f}"
            left_min = (self.deadline - time.monotonic()) / 60
            self.say(f"{name} {result.failure or told}  ({left_min:.1f} min left)")

    def _expected_s(self, result: CandidateResult) -> float:
        return 1.5 * max(result.start_seconds, default=self.start_s)


def _keep(meter: CandidateMeter, results: list[CandidateResult], say: Say) -> None:
    settings, shipped = meter.settings, results[0]
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
    host_key = take_host_key(meter.vllm, meter.model, meter.device)
    measurements = settings.cache_path / f"tune-{host_key}.json"
    rows = [{**asdict(result), "tokens_per_s": round(result.speed, 1)} for result in results]
    found: Any = {
        "profile": meter.profile,
        "options": best.candidate.options,
        "environment": best.candidate.environment,
        "summary": summary,
    }
    try:
        measurements.parent.mkdir(parents=True, exist_ok=True)
        write_file(measurements, json.dumps(rows, indent=2) + "\n")
        write_tuned(
            settings.tuned_path,
            host_key=host_key,
            measurements=str(measurements),
            **found,
        )
        if settings.tune_into:
            carry_tuned(settings.tune_into, meter.vllm, meter.model, meter.device, **found)
    except OSError as error:
        say(summary)  # half an hour's work, and nowhere to put it
        changes = " ".join(f"{k}={v}" for k, v in best.candidate.changes.items())
        raise SettingsError(
            f"cannot write {error.filename or settings.tuned_path} ({error.strerror}); make room "
            f"or set LAUNCHER_CACHE_DIR. The fastest: {changes or 'the profile as shipped'}"
        ) from None
    for path in filter(None, (settings.tuned_path, settings.tune_into)):
        say(f"{path}: {summary}")
