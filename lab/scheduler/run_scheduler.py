"""What planning and booking a step costs: vLLM's scheduler and the launcher's, without a GPU.

Both plan the same decoding requests over vLLM's real KV-cache manager and a made-up model, in turn
and as often as told, and must give the same answers. Figures are CPU time a step in which every
request decodes, of `schedule` and `update_from_output`, medians over the rounds. Exit codes: 0 all
well, 1 the answers differ or ours takes more than --limit of vLLM's time, 2 bad options or no vLLM.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import options
from lab.failures import LabFailure
from lab.records.record import RecordFigure, RunRecord, take_facts, write_record
from lab.reports.output_files import ensure_writable
from lab.scheduler.engine_setup import EngineSetup

_VOCABULARY = 1000
_KINDS = {"whole": "whole answers", "stream": "streams"}
_OURS, _VLLMS = "the launcher's", "vLLM's"


@dataclass
class Measured:
    """One scheduler and one kind of request, over all rounds; milliseconds a step."""

    schedule: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    answers: dict[str, list[int]] = field(default_factory=dict)

    @property
    def total(self) -> list[float]:
        return [a + b for a, b in zip(self.schedule, self.update, strict=True)]


def main(words: Sequence[str]) -> int:
    arguments = parse_arguments(words)
    if arguments.record:
        ensure_writable(Path(arguments.record))
    if importlib.util.find_spec("vllm") is None:
        raise LabFailure("vLLM is not installed in this environment; `make setup` installs it")
    print("loading vLLM …", file=sys.stderr, flush=True)
    figures, worst, agree = [], 0.0, True
    for kind in arguments.kinds:
        ours, vllms = measure(arguments, kind)
        shares = [a / b for a, b in zip(ours.total, vllms.total, strict=True)]
        worst = max(worst, statistics.median(shares))
        agree &= ours.answers == vllms.answers
        rows = build_figures(kind, ours, vllms, shares)
        figures += rows
        for row in rows:
            print(f"{row.name:58} {row.value:8.3f} {row.unit:5} {row.low:.3f} to {row.high:.3f}")
    print("the same answers" if agree else "THE ANSWERS DIFFER")
    if arguments.record:
        title = f"Scheduling {arguments.requests} decoding requests, no GPU"
        about = (
            f"{arguments.tokens} tokens each, {arguments.rounds} interleaved rounds; CPU time of "
            "schedule and update_from_output, medians"
        )
        facts = take_facts(arguments.machine)
        record = RunRecord(title, figures=tuple(figures), about=about, **facts)
        write_record(record, Path(arguments.record))
    return int(not agree or worst > arguments.limit)


def measure(arguments: argparse.Namespace, kind: str) -> tuple[Measured, Measured]:
    # Imported late: vLLM takes seconds and gigabytes of address space.
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: PLC0415

    from launcher.plugins.decode_scheduler import build_scheduler  # noqa: PLC0415

    arms: list[tuple[Callable[..., Any], Measured]] = [
        (build_scheduler, Measured()),
        (AsyncScheduler, Measured()),
    ]
    for number in range(arguments.rounds):
        # In turn, the first of a round being another each time: machines get slower and faster.
        for build, measured in arms[:: 1 if number % 2 else -1]:
            run_round(arguments, kind, build, measured)
    return arms[0][1], arms[1][1]


def run_round(
    arguments: argparse.Namespace, kind: str, build: Callable[..., Any], measured: Measured
) -> None:
    from lab.scheduler import made_up_engine  # noqa: PLC0415

    setup = EngineSetup(blocks=arguments.requests * (200 + arguments.tokens) // 16)
    config = made_up_engine.build_config(setup)
    scheduler = made_up_engine.build_scheduler(setup, config, build)
    hasher = made_up_engine.build_hasher(setup)
    numbers = random.Random(1)
    for place in range(arguments.requests):
        prompt = [numbers.randrange(_VOCABULARY) for _ in range(60 + place % 40)]
        scheduler.add_request(
            made_up_engine.build_request(
                f"cmpl-{place:032x}-{place}", prompt, arguments.tokens, kind == "stream", hasher
            )
        )
    worker = made_up_engine.MadeUpWorker(setup, _VOCABULARY)
    engine = made_up_engine.MadeUpEngine(scheduler, worker, places=2)
    clock = StepClock(scheduler, arguments.requests)
    answers: dict[str, list[int]] = {}
    gc.collect()
    while scheduler.has_requests() or engine.under_way:
        for group in engine.step()[1].values():
            for output in group.outputs:
                answers.setdefault(output.request_id, []).extend(output.new_token_ids)
    measured.schedule.append(statistics.mean(clock.schedule_ms))
    measured.update.append(statistics.mean(clock.update_ms))
    measured.answers = answers


class StepClock:
    """CPU time of each step in which all the requests decode and none is new."""

    def __init__(self, scheduler: Any, requests: int) -> None:
        self.schedule_ms: list[float] = []
        self.update_ms: list[float] = []
        self._requests = requests
        self._schedule, self._update = scheduler.schedule, scheduler.update_from_output
        scheduler.schedule, scheduler.update_from_output = self.schedule, self.update

    def schedule(self, *arguments: Any) -> Any:
        began = time.thread_time()
        step = self._schedule(*arguments)
        self._note(self.schedule_ms, began, step)
        return step

    def update(self, step: Any, tokens: Any) -> Any:
        began = time.thread_time()
        outputs = self._update(step, tokens)
        self._note(self.update_ms, began, step)
        return outputs

    def _note(self, into: list[float], began: float, step: Any) -> None:
        spent_ms = (time.thread_time() - began) * 1000
        if step.total_num_scheduled_tokens == self._requests and not step.scheduled_new_reqs:
            into.append(spent_ms)


def build_figures(
    kind: str, ours: Measured, vllms: Measured, shares: Sequence[float]
) -> list[RecordFigure]:
    rows: list[tuple[str, Sequence[float], str]] = []
    for name, measured in ((_VLLMS, vllms), (_OURS, ours)):
        rows.append((f"{_KINDS[kind]}, {name} schedule", measured.schedule, "ms"))
        rows.append((f"{_KINDS[kind]}, {name} update_from_output", measured.update, "ms"))
    rows.append((f"{_KINDS[kind]}, both, {_OURS} of {_VLLMS}", shares, ""))
    return [
        RecordFigure(
            name,
            round(statistics.median(values), 4),
            unit,
            round(min(values), 4),
            round(max(values), 4),
        )
        for name, values, unit in rows
    ]


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = options.build_parser("scheduler", __doc__)
    add = parser.add_argument
    add("--requests", type=options.whole_number(2), default=358, help="that decode (default: 358)")
    add("--tokens", type=options.whole_number(8), default=128, help="of each (default: 128)")
    add("--rounds", type=options.whole_number(1), default=5, help="of each kind (default: 5)")
    add("--kinds", nargs="+", choices=tuple(_KINDS), default=list(_KINDS), metavar="KIND")
    add("--limit", type=options.share, default=1 / 3, help="of vLLM's time (default: a third)")
    add("--machine", default="", help="what to write down as the machine, if it is another one")
    options.add_record(parser)
    return options.parse_options(parser, words)
